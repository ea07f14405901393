"""Starts and ends the workers of one attempt with Ray Train's `TorchTrainer`.

Ray Train retries whatever fails, from the last checkpoint that was reported to it. Here it starts the workers once per
attempt: the cause of a failure decides whether there is another (`restart_policy`), and the workers find their newest
valid checkpoint themselves. `Result.metrics` is not used: Ray sets it with its own checkpoints only.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from orchestrator.execution.cluster import start_thread
from orchestrator.execution.deaths import death
from orchestrator.execution.nodes import call_on_nodes, choose_nodes, list_nodes, worker_resources
from orchestrator.execution.ray_internals import StartWatch, placement_groups_of_this_job
from orchestrator.experiment.placement import smaller
from trainers import flight_recorder
from trainers.contract import clock
from trainers.contract.channel import Start
from trainers.contract.events import Event, GroupStarted, WorkerFailed, WorkerStarted
from trainers.contract.plan import TrialPlan
from trainers.worker import train_loop_per_worker

logger = logging.getLogger(__name__)

DRIVER_RANK = -1

END_TIMEOUT_SECONDS = 30.0
"""Longest wait for workers, or for Ray Train, to be gone."""

END_POLL_INTERVAL_SECONDS = 0.2
"""How often an attempt that is being ended is looked at."""

SETTLE_SECONDS = 1.0
"""How old a reservation must be before it is taken away: in Ray 2.60, a worker that asks for its place in one that has
just been removed waits without end, and so does Ray Train."""

NODES_POLL_INTERVAL_SECONDS = 1.0
"""How often the cluster is asked for room for an attempt."""


_marks = itertools.count(1)


class WorkerGroup:
    """The workers of one attempt: started once, in a thread, and ended for certain.

    Args:
        plan: The trial.
        attempt: Number of this start of it, from 0.
        telemetry: The actor that workers send their events to.
        ray_dir: Folder for Ray Train's own files.
        at_once: Fewest workers that it starts with as soon as they have room; None for all. With fewer, as far as the
            plan allows it, where there has been no room for more for a while.
        gate: The actor at which workers of a standby group wait; None for workers that train at once.
        nodes: Where the workers of a standby group wait.
    """

    def __init__(
        self,
        plan: TrialPlan,
        attempt: int,
        telemetry: Any,
        ray_dir: str,
        at_once: int | None = None,
        gate: Any = None,
        nodes: list[dict[str, str]] | None = None,
    ) -> None:
        self.plan = plan
        """The trial, with as many workers as there was room for."""
        self.nodes = nodes
        """The node of each worker, as Ray's label selector; None before there was room."""
        self.started: float | None = None
        """When there was room and Ray Train was called (Unix seconds); None before, and while a standby group waits."""
        self.error: Exception | None = None
        """What ended the workers; None where they returned, or have not yet."""
        self._attempt, self._telemetry, self._ray_dir, self._gate = attempt, telemetry, ray_dir, gate
        self._at_once = at_once or plan.world_size
        # So many bytes of memory are reserved for each worker: by them, Ray's table shows which reservations are its.
        self._mark = next(_marks)
        self._ended = threading.Event()
        # In a thread, so that the main thread can receive signals and watch the workers meanwhile.
        self._thread = start_thread(self._fit, "fit")

    def wait(self, seconds: float) -> bool:
        """Waits for the end; returns whether it has come."""
        self._thread.join(timeout=seconds)
        return not self._thread.is_alive()

    def reserve(self) -> PlacementGroup:
        """Reserves what a standby group needs in order to train, where its workers are and as long as they live."""
        bundle = {**worker_resources(self.plan), "memory": self._mark}
        group: PlacementGroup = placement_group([bundle] * self.plan.world_size, bundle_label_selector=self.nodes or [])
        return group

    def kill(self, workers: Sequence[WorkerStarted]) -> None:
        """Kills worker processes on their nodes: a frozen one reacts to nothing else."""
        pids = {node: [worker.pid for worker in workers if worker.node_id == node.id] for node in list_nodes()}
        calls = {node: (numbers,) for node, numbers in pids.items() if numbers}
        for node, outcome in call_on_nodes(_kill_processes, calls, END_TIMEOUT_SECONDS).items():
            if isinstance(outcome, Exception):  # the node may be gone, and its processes with it
                logger.warning("workers on %s could not be killed: %s", node.host, outcome)

    def end(self) -> None:
        """Ends the attempt, whatever it is doing: Ray ends the workers whose resources are taken away.

        Ray Train, which loses its workers, ends in turn. It may have been about to reserve resources, so that is
        repeated until it has ended.
        """
        self._ended.set()
        began, seen = time.monotonic(), dict[ray.PlacementGroupID, float]()
        while time.monotonic() - began < END_TIMEOUT_SECONDS:
            now = time.monotonic()
            for group in self._reserved():
                if now - seen.setdefault(group.id, now) >= SETTLE_SECONDS:
                    remove_placement_group(group)
            if self.wait(END_POLL_INTERVAL_SECONDS):
                return
        logger.warning("Ray Train did not end within %g s", END_TIMEOUT_SECONDS)

    def _reserved(self) -> list[PlacementGroup]:
        """What this group has reserved."""
        if not ray.is_initialized():  # Ray was left meanwhile, which gives back all that a job has reserved
            return []
        return [
            group
            for group in placement_groups_of_this_job()
            for bundle in list(placement_group_table(group).get("bundles", {}).values())[:1]
            if bundle.get("memory") == self._mark
        ]

    def _fit(self) -> None:
        try:
            self.nodes = self.nodes or self._wait_for_nodes()
            if self.nodes and not self._ended.is_set():
                # Somebody else may take the room before the workers do: Ray Train waits for it as long as for a start.
                os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(self.plan.timeouts["setup"])
                self.started = None if self._gate else clock.now()
                self._trainer(self.nodes).fit()
        except Exception as error:  # noqa: BLE001 - whatever ended the workers; the main thread looks for the cause
            self.error = error
        finally:
            with contextlib.suppress(Exception):  # of any type: the cluster may be lost
                for group in self._reserved():  # a controller that died leaves its workers their resources
                    remove_placement_group(group)

    def _trainer(self, nodes: list[dict[str, str]]) -> TorchTrainer:
        plan, attempt = self.plan, self._attempt
        name, task, reserved = f"{plan.name}-attempt{attempt}", {}, worker_resources(plan)
        callbacks, environment = [], _nccl_settings() if plan.device == "cuda" else {}
        if self._gate:
            # Ray has a process compute with as many threads as it reserves CPUs, which is none here.
            environment = {**environment, "OMP_NUM_THREADS": str(plan.cpus_per_worker)}
            name, task, reserved = f"{name}-standby{self._mark}", {"gate": self._gate}, {}
        else:
            report = _StartReport(plan, attempt, self._telemetry, clock.anchor())
            task = {"start": Start(plan, attempt, self._telemetry)}
            callbacks = [StartWatch(report.lost, report.started)]
        return TorchTrainer(
            train_loop_per_worker,
            train_loop_config={**task, "clock": clock.anchor()},
            scaling_config=ScalingConfig(
                num_workers=plan.world_size,
                use_gpu=plan.device == "cuda",
                resources_per_worker={**reserved, "memory": self._mark},
                label_selector=nodes,
            ),
            torch_config=TorchConfig(
                backend="nccl" if plan.device == "cuda" else "gloo",
                # Later than the watchdog, which knows what a rank does: some wait in a collective for an evaluation.
                timeout_s=int(max(plan.timeouts.values())) + 60,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=self._ray_dir,
                worker_runtime_env={"env_vars": environment},
                callbacks=callbacks,
                failure_config=FailureConfig(
                    max_failures=0,
                    controller_failure_limit=0,
                    max_preemption_failures=0,
                    # A rank hears of a preemption after the evaluation or checkpoint it is at, if the node lasts.
                    preemption_grace_s=plan.timeouts["evaluation"] + plan.timeouts["checkpoint"],
                ),
            ),
        )

    def _wait_for_nodes(self) -> list[dict[str, str]] | None:
        """The workers' nodes, as soon as there are enough: a lost one may be on its way back."""
        plan, began = self.plan, time.monotonic()
        while not self._ended.is_set():
            waited = time.monotonic() - began
            fewest = 1 if waited > plan.resize_after_seconds else self._at_once
            for candidate in [plan, *smaller(plan)]:
                if candidate.world_size >= fewest and (nodes := choose_nodes(candidate)):
                    self.plan = candidate
                    return nodes
            if waited > plan.timeouts["setup"]:
                on = f"{plan.num_nodes} hosts" if plan.num_nodes else "any number of hosts"
                raise TimeoutError(f"no room for {plan.world_size} workers, equally many on each of {on}")
            self._ended.wait(NODES_POLL_INTERVAL_SECONDS)
        return None


@dataclass(frozen=True)
class _StartReport:
    """Reports from Ray Train's controller, which starts the workers, what they could not report themselves."""

    plan: TrialPlan
    attempt: int
    telemetry: Any
    driver_clock: str

    def lost(self, rank: int | None, reason: RayActorError) -> None:
        """Reports that a process died; which of several it was is not known before ranks are given."""
        kind, message = death(reason)
        known = 0 if rank is None and self.plan.world_size == 1 else rank
        rank = DRIVER_RANK if known is None else known
        self._emit(WorkerFailed, rank=rank, failure=kind, iteration=0, section="setup", message=message)

    def started(self, began: float, living: float, connected: float) -> None:
        """Reports how long the start took."""
        parts = {"processes": living - began, "process_group": connected - living}
        self._emit(GroupStarted, rank=DRIVER_RANK, part_seconds=parts)

    def _emit(self, kind: type[Event], **fields: object) -> None:
        clock.adopt(self.driver_clock)
        event = kind(trial=self.plan.name, attempt=self.attempt, time=clock.now(), **fields)  # type: ignore[arg-type]
        with contextlib.suppress(ray.exceptions.RayError):  # then the attempt ends because the actor is lost
            ray.get(self.telemetry.push.remote(event), timeout=END_TIMEOUT_SECONDS)


def _nccl_settings() -> dict[str, str]:
    """What has workers record their collectives, where no other group of workers on their nodes does.

    The folder must exist on every node: torch ends a process that cannot make its pipe. This one's `TMPDIR` may not.
    """
    return flight_recorder.settings(f"/tmp/nccl-{uuid.uuid4().hex}-rank")  # noqa: S108 - a name nobody can guess


def _kill_processes(pids: Sequence[int]) -> None:
    """Kills processes that are still Ray's: the number of one may have been given to another."""
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if any("ray::" in part for part in process.cmdline()):
                process.kill()
