"""A second group of workers next to the one that trains: it has imported everything and waits to take over.

Of the seconds from a failure to the next step, nine in ten are processes that start and import. A standby group
reserves nothing but its mark, so that it keeps nobody from starting. When the group that trains is lost, the standby's
workers train on as the next attempt, on the room that the lost ones gave back; where they cannot, workers are started
as ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.train import WorkerGroupError

from orchestrator.execution.cluster import start_thread
from orchestrator.execution.deaths import death
from orchestrator.execution.gate import Gate
from orchestrator.execution.nodes import NODE_ID, lost_nodes
from orchestrator.execution.ray_internals import cause_of_death
from orchestrator.execution.restart_policy import standby_is_due
from orchestrator.execution.workers import WorkerGroup
from orchestrator.experiment.spec import Faults
from trainers.contract import clock
from trainers.contract.channel import Start
from trainers.contract.events import Event, GroupStarted, StandbyLost, StandbyReady
from trainers.contract.plan import TrialPlan

POLL_INTERVAL_SECONDS = 1.0
"""How often it is decided whether to start one."""

CALL_POLL_INTERVAL_SECONDS = 0.1
"""How often a standby that is called is looked at."""

MAX_LOST = 3
"""Standby groups in a row that may be lost, none of which was needed, before no other one is started."""


class Standby:
    """The standby groups of one trial, one at a time.

    Args:
        faults: The experiment's policy.
        ray_dir: Folder for Ray Train's own files.
        emit: Emits an event of the driver from its class and fields.
    """

    def __init__(self, faults: Faults, ray_dir: str, emit: Callable[..., Any]) -> None:
        self._faults, self._ray_dir, self._emit = faults, ray_dir, emit
        self._group: WorkerGroup | None = None
        self._gate: Any = None
        self._ready: Any = None  # answers when its workers wait
        self._began = 0.0
        self._lost = 0
        self._looked = 0.0

    def tend(self, running: WorkerGroup, attempt: int, iteration: int, events: Callable[[], Sequence[Event]]) -> None:
        """Starts a standby group when it is time, and notices that one was lost.

        Args:
            running: The workers that train.
            attempt: The number of their attempt.
            iteration: Iterations that all of them have done.
            events: Returns the events of the trial.
        """
        now = time.monotonic()
        if now - self._looked < POLL_INTERVAL_SECONDS:
            return
        self._looked = now
        if self._group is not None:
            if self._group.wait(0):
                self._lose(_in_short(self._group.error))
            elif self._ready and ray.wait([self._ready], timeout=0)[0]:
                self._ready = None
                self._emit(StandbyReady, iteration=iteration, start_seconds=clock.now() - self._began)
        elif self._lost < MAX_LOST and standby_is_due(self._faults, running.plan, attempt, iteration, events):
            self._start(running, attempt)

    def take_over(
        self, plan: TrialPlan, attempt: int, telemetry: Any, wanted: Callable[[], bool]
    ) -> WorkerGroup | None:
        """Makes the standby group the workers of an attempt; None where there is none that can be.

        One that is still starting is waited for: it is ahead of any that would be started now.

        Args:
            plan: The trial.
            attempt: The number of the attempt.
            telemetry: The actor that takes the workers' events.
            wanted: Returns whether there still is to be an attempt.
        """
        group = self._group
        if group is None:
            return None
        began = clock.now()
        if lost_nodes() & {node[NODE_ID] for node in group.nodes or ()}:
            self._lose("their node was lost")
            return None
        plan = dataclasses.replace(group.plan, mtbf_hours=plan.mtbf_hours)
        silent = time.monotonic() + plan.timeouts["heartbeat"]  # as long as a process may be silent
        ready = time.monotonic() + plan.timeouts["setup"] if self._ready else silent
        needed = {group.reserve().ready(): silent, self._gate.call.remote(): ready}
        try:
            while left := ray.wait(list(needed), num_returns=2, timeout=CALL_POLL_INTERVAL_SECONDS)[1]:
                if not wanted():  # they are not lost for that
                    self.end()
                    return None
                if group.wait(0) or any(time.monotonic() > needed[each] for each in left):
                    self._lose("its workers did not answer, or there was no room for them")
                    return None
            ray.get(list(needed))
            ray.get(self._gate.give.remote(Start(plan, attempt, telemetry)), timeout=plan.timeouts["heartbeat"])
        except ray.exceptions.RayError as error:
            self._lose(_in_short(error))
            return None
        self._group, self._gate, self._lost = None, None, 0
        group.started = clock.now()
        self._emit(GroupStarted, part_seconds={"standby": group.started - began})
        return group

    def end(self) -> None:
        """Ends the standby group, if there is one; nobody has to wait for that."""
        group, self._group, self._gate, self._ready = self._group, None, None, None
        if group is not None:
            start_thread(_end, "end-standby", group)

    def _start(self, running: WorkerGroup, attempt: int) -> None:
        plan = running.plan
        here = {NODE_ID: ray.get_runtime_context().get_node_id()}
        options = {"num_cpus": 0, "label_selector": here, "max_concurrency": plan.world_size + 3}
        self._began = clock.now()
        self._gate = ray.remote(Gate).options(**options).remote(plan.world_size)
        self._ready = self._gate.ready.remote()
        self._group = WorkerGroup(plan, attempt, None, self._ray_dir, gate=self._gate, nodes=running.nodes)

    def _lose(self, reason: str) -> None:
        self._lost += 1
        self.end()
        self._emit(StandbyLost, message=reason)


def _in_short(error: Exception | None) -> str:
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    for reason in filter(None, map(cause_of_death, failures)):
        return death(reason)[1]
    first, _, _ = str(error).partition("\n")
    return f"{type(error).__name__}: {first}"


def _end(group: WorkerGroup) -> None:
    with contextlib.suppress(Exception):  # of any type: Ray may be left meanwhile, which ends them too
        group.end()
