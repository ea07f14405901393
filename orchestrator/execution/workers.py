"""Starts and ends a trial's workers with Ray Train: the only file that builds a TorchTrainer.

Ray Train retries whatever fails, from the last checkpoint that was reported to it. Here it starts the workers once per
attempt; whether there is another is decided by what went wrong (see `attempts`), and workers find their newest
checkpoint that verifies themselves. `Result.metrics` is not used: it is bound to Ray's own checkpoints.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup as TrainWorkerGroup
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.execution.cluster import choose_nodes
from orchestrator.experiment.placement import smaller
from trainers.contract.events import WorkerStarted
from trainers.contract.plan import Attempt, TrialPlan

logger = logging.getLogger(__name__)

KILL_TIMEOUT_SECONDS = 20.0
"""Longest wait for a process to be gone."""

NODES_POLL_INTERVAL_SECONDS = 1.0
"""How often it is asked whether the nodes for an attempt are there."""

SMALLER_AFTER_SECONDS = 60.0
"""How long a lost node is waited for before a trial that may goes on with fewer workers."""


class _NodesAreThere(FixedScalingPolicy):  # type: ignore[misc]
    """Asks no autoscaler for nodes, and needs no actor to do so: `choose_nodes` has named those that are there."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _Workers(TrainWorkerGroup):  # type: ignore[misc]
    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        # Ray Train's settings are in the environment of the cluster or of the job (`start_ray`). An actor that brings
        # its own gets a process by way of a second Python and a shell, where Ray has one waiting for the others.
        return dict(custom_runtime_env)

    def _init_train_context_on_workers(self, workers: list[Any], sync_actor: Any, arguments: dict[str, Any]) -> None:
        # As Ray Train does it, but for the controller's handle: workers ask it for Ray's own checkpoints only.
        context = {
            "train_run_context": self._train_run_context,
            "synchronization_actor": sync_actor,
            "storage_context": self._storage_context,
            "worker_callbacks": self._worker_callbacks_to_propagate,
            "controller_actor": None,
        }
        started = []
        for i, worker in enumerate(workers):
            own = {name: values[i] for name, values in arguments.items()}
            place = worker.distributed_context
            started.append(worker.actor.init_train_context.remote(distributed_context=place, **context, **own))
        ray.get(started)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):  # type: ignore[misc]
    worker_group_cls = _Workers


class _BareTorchTrainer(TorchTrainer):  # type: ignore[misc]
    """Without the processes of Ray Train that are of no use here: each starts and imports before a worker can.

    The controller is an actor by default; here it runs in the thread that called `fit`. The placement group cleaner
    asks the dashboard whether the controller lives. Where there is none, in a cluster of our own, that question holds
    up the end of every attempt for 12 s; `_clear_placement_groups` does its work.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        controller = _Controller(**parts | {"scaling_policy": _NodesAreThere(self.scaling_config)})
        try:
            asyncio.run(controller.run())
            return controller.get_result()
        finally:
            # Its parts refer to each other, and to actors that live as long as something refers to them.
            del controller
            gc.collect()


class WorkerGroup:
    """The workers of one attempt: started once, in a thread of its own, and ended for certain.

    Args:
        plan: The trial.
        attempt: Which start of it this is.
        telemetry: The actor that workers send their events to.
        ray_dir: Folder for Ray Train's own files.

    Attributes:
        plan: The trial, with as many workers as there was room for.
        error: What ended the workers, None for their own end.
    """

    def __init__(self, plan: TrialPlan, attempt: Attempt, telemetry: Any, ray_dir: str) -> None:
        from trainers.worker import train_loop_per_worker

        # How long Ray Train waits for resources, after a node was lost for example; read when the trainer starts.
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(plan.timeouts["setup"])
        self._make_trainer: Callable[[TrialPlan, Any], Any] = lambda plan, nodes: _BareTorchTrainer(
            train_loop_per_worker,
            train_loop_config={"plan": plan, "attempt": attempt, "telemetry": telemetry},
            scaling_config=ScalingConfig(
                num_workers=plan.world_size,
                use_gpu=plan.device == "cuda",
                resources_per_worker={"CPU": plan.cpus_per_worker} | ({"GPU": 1} if plan.device == "cuda" else {}),
                label_selector=nodes,
            ),
            torch_config=TorchConfig(
                backend="nccl" if plan.device == "cuda" else "gloo",
                # Behind the watchdog, which knows what a rank is at: some wait in a collective while others evaluate.
                timeout_s=int(max(plan.timeouts.values())) + 60,
            ),
            run_config=RunConfig(
                name=f"{plan.name}-attempt{attempt.number}",
                storage_path=ray_dir,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            ),
        )
        self.plan, self._may_be_smaller = plan, attempt.number > 0
        self._ended = threading.Event()
        self.error: BaseException | None = None
        # In a thread of its own, so that the driver's can hear signals and look after the workers meanwhile.
        self._thread = threading.Thread(target=self._fit, name="fit", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Waits for the end; returns whether it has come."""
        self._thread.join(timeout=seconds)
        return not self._thread.is_alive()

    def kill(self, workers: Sequence[WorkerStarted]) -> None:
        """Kills worker processes on their nodes: a frozen one answers to nothing else."""
        kill = ray.remote(num_cpus=0, max_retries=0)(_end_process)
        tasks = []
        for worker in workers:
            where = NodeAffinitySchedulingStrategy(worker.node_id, soft=False)
            tasks.append(kill.options(scheduling_strategy=where).remote(worker.pid))
        try:
            ray.get(tasks, timeout=KILL_TIMEOUT_SECONDS)
        except Exception as error:  # the node may be gone, and its processes with it
            logger.warning("workers could not be killed: %s", error)

    def end(self) -> None:
        """Ends the attempt, whatever it is at: Ray ends the workers whose place is taken away."""
        self._ended.set()
        _clear_placement_groups()
        self.wait(KILL_TIMEOUT_SECONDS)

    def _fit(self) -> None:
        try:
            _clear_placement_groups()
            nodes = self._wait_for_nodes()
            if nodes:
                self._make_trainer(self.plan, nodes).fit()
        except BaseException as error:
            self.error = error

    def _wait_for_nodes(self) -> list[dict[str, str]] | None:
        """The workers' nodes, as soon as there are enough: a lost one may be on its way back."""
        plan, began = self.plan, time.monotonic()
        while not self._ended.is_set():
            waited = time.monotonic() - began
            late = self._may_be_smaller and waited > SMALLER_AFTER_SECONDS
            for each in [plan, *(smaller(plan) if late else [])]:
                if nodes := choose_nodes(each):
                    self.plan = each
                    return nodes
            if waited > plan.timeouts["setup"]:
                on = f"{plan.num_nodes} hosts" if plan.num_nodes else "any number of hosts"
                raise TimeoutError(f"no room for {plan.world_size} workers, equally many on each of {on}")
            self._ended.wait(NODES_POLL_INTERVAL_SECONDS)
        return None


def _clear_placement_groups() -> None:
    """Gives back the workers' places, and ends who is there: a job keeps its placement groups to its end."""
    job = ray.get_runtime_context().get_job_id()
    for group, values in ray.util.placement_group_table().items():
        if group.endswith(job) and values["state"] != "REMOVED":  # the last bytes of its id are the job's that made it
            ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))


def _end_process(pid: int) -> None:
    """Kills a process if it is still one of Ray's: its number may have been given to another."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if any("ray::" in part for part in process.cmdline()):
            process.kill()
