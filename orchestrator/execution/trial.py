"""Runs one trial to its end: starts its workers, watches them, and starts them again where that can help.

Ray Train would wait for a stuck worker forever and repeat failures that can never succeed. Here every wait is bounded,
and every end has a cause that is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from ray.exceptions import RayActorError
from ray.train import WorkerGroupError

from orchestrator.execution.cluster import lost_daemon
from orchestrator.execution.deaths import death, is_preemption, killed_for_memory, kind_of
from orchestrator.execution.event_pump import EventPump
from orchestrator.execution.growth import Growth
from orchestrator.execution.nodes import lost_nodes, release_nodes
from orchestrator.execution.ray_internals import cause_of_death
from orchestrator.execution.restart_policy import Policy
from orchestrator.execution.standby import Standby
from orchestrator.execution.stop import StopRequest
from orchestrator.execution.stuck_dumps import save_stuck
from orchestrator.execution.supervisor import ClusterLostError
from orchestrator.execution.watchdog import Stuck, Watchdog
from orchestrator.execution.workers import DRIVER_RANK, WorkerGroup
from orchestrator.experiment.spec import Faults
from orchestrator.figures.causes import changes_text, root_cause
from orchestrator.figures.early_stop import early_stop_reason
from orchestrator.figures.goodput import PREEMPTED, RESIZED, RESUMED, measured_mtbf_hours
from orchestrator.runlog.outbox import RunFolderError
from trainers.contract import clock
from trainers.contract.events import (
    ClockChanged,
    Event,
    EventsLost,
    Heartbeat,
    LoopFinished,
    LoopStarted,
    RunStarted,
    StepsDone,
    TrialEnded,
    TrialRestarted,
    TrialStarted,
    WorkerFailed,
    WorkerStarted,
)
from trainers.contract.memory import batch_hint
from trainers.contract.plan import TrialPlan

POLL_INTERVAL_SECONDS = 0.2
"""How often the driver looks at the workers."""

E = TypeVar("E", bound=Event)


def run_trial(plan: TrialPlan, faults: Faults, pump: EventPump, ray_dir: str, stop: StopRequest) -> TrialEnded:
    """Runs a trial to its end, with as many attempts as the policy allows.

    A trial that `pump` has events of already goes on from its newest checkpoint, as the next attempt.

    Args:
        plan: The trial.
        faults: What is done about failures.
        pump: Takes its events.
        ray_dir: Folder for Ray Train's own files.
        stop: Set when the user or the job server wants an end.

    Returns:
        How it ended, which the pump has as its last event.

    Raises:
        ClusterLostError: The local cluster is gone; neither pump nor Ray can be used any more.
    """
    trial = _Trial(plan, faults, pump, ray_dir, stop)
    try:
        return trial.run()
    finally:
        if lost_daemon() is None:
            trial.standby.end()
        release_nodes(plan.name)


class _Trial:
    def __init__(self, plan: TrialPlan, faults: Faults, pump: EventPump, ray_dir: str, stop: StopRequest) -> None:
        self.plan, self.pump, self.ray_dir, self.stop = plan, pump, ray_dir, stop
        self.policy = Policy(faults)
        self.standby = Standby(faults, ray_dir, self._emit)
        self.number = 0
        self.at_once = plan.world_size
        self.grow_to: int | None = None
        self.deviation = 0.0

    def run(self) -> TrialEnded:
        earlier = self._events()
        begun = any(event.kind != EventsLost.kind for event in earlier)
        self.number = max(event.attempt for event in earlier) + 1 if begun else 0
        if not any(isinstance(event, TrialStarted) for event in earlier):  # it is new, or its start is lost
            self._emit(TrialStarted, plan=dataclasses.asdict(self.plan))
        if begun:
            last = next((event for event in reversed(earlier) if isinstance(event, TrialEnded)), None)
            message = f"resumed after {last.reason}" if last else "resumed after its driver was lost"
            starts = (event for event in reversed(self.pump.events) if isinstance(event, RunStarted))
            if (start := next(starts, None)) and start.changes:
                message += f", with {changes_text(start.changes)}"
            self._emit(TrialRestarted, failure=RESUMED, message=message, iteration=_iterations(earlier))
        while True:
            cause, reason = self._attempt()
            if cause is None or reason or self.stop.requested:
                break
            iteration = max(cause.iteration, _iterations(self._own(Event)))
            self.number += 1
            message = f"rank {cause.rank}: {cause.message}" if cause.rank != DRIVER_RANK else cause.message
            self._emit(TrialRestarted, failure=cause.failure, message=message, iteration=iteration)
        if cause is None:
            return self._emit(TrialEnded, status="FINISHED", reason=early_stop_reason(self.plan, self._events()))
        if self.stop.requested:
            return self._emit(TrialEnded, status="KILLED", reason="stopped by the user")
        return self._emit(TrialEnded, status="FAILED", reason=reason)

    def _attempt(self) -> tuple[WorkerFailed | None, str]:
        """One start of the workers, to its end.

        Returns:
            What ended it, None when training is done; and why there must be no other start, "" when there may be.
        """
        self.pump.begin(self.plan.name, self.number)
        mtbf_hours = self.plan.mtbf_hours or measured_mtbf_hours(self._events())
        plan = dataclasses.replace(self.plan, mtbf_hours=mtbf_hours)
        group = self.standby.take_over(plan, self.number, self.pump.actor, lambda: not self.stop.requested)
        group = group or WorkerGroup(plan, self.number, self.pump.actor, self.ray_dir, self.at_once)
        try:
            self._watch(group)
        except RunFolderError:
            group.end()
            raise
        _check_cluster()
        self.pump.drain()
        grow_to, self.grow_to = self.grow_to, None
        self.at_once = grow_to or group.plan.world_size  # what did with fewer workers waits for no more
        finished = next(reversed(self._own(LoopFinished)), None)
        if finished and finished.reason in ("target", "patience", "max_iter"):
            return None, ""
        if grow_to and finished and finished.reason == "preempted":
            message = f"room for {grow_to} workers instead of {group.plan.world_size}"
            self.standby.end()
            return self._failure(RESIZED, DRIVER_RANK, message), ""
        if is_preemption(group.error) or (finished and finished.reason == "preempted"):
            self.standby.end()
            return self._failure(PREEMPTED, DRIVER_RANK, "a node is being taken away"), ""
        if self.pump.lost:
            message = "the actor that takes the workers' events was lost"
            self.pump.emit(self._failure("communication", DRIVER_RANK, message))
        else:
            self._emit_dead_ranks(group.error)
        cause = root_cause(self._own(WorkerFailed))
        if cause is None:
            message = f"{type(group.error).__name__}: {group.error}" if group.error else "the workers ended early"
            kind = kind_of(group.error)
            if isinstance(group.error, RayActorError):
                kind, message = "communication", f"Ray Train's controller was lost: {message.splitlines()[0]}"
            cause = self._failure(kind, DRIVER_RANK, message)
            if not self.stop.requested:
                self.pump.emit(cause)
        return cause, self.policy.give_up(cause, self._own(Event))

    def _watch(self, group: WorkerGroup) -> None:
        """Waits until the workers have ended, and ends them where they have to."""
        watchdog: Watchdog | None = None
        growth: Growth | None = None
        stopping = False
        while not group.wait(POLL_INTERVAL_SECONDS):
            _check_cluster()
            self.pump.check()
            self._note_clock()
            if self.stop.requested and not stopping:
                stopping = True
                self.pump.order("stop", self.plan.name, self.number)
                if not self._own(LoopStarted):  # nothing has been trained that a checkpoint could hold
                    return group.end()
            if self.stop.overdue or self.pump.lost:
                return group.end()
            if watchdog is None and group.started is not None:  # waiting for room has a limit of its own
                # Fewer workers than planned, where a node did not come back.
                watchdog = Watchdog(self.plan.timeouts, group.plan.world_size, group.started)
                growth = Growth(self.plan, group.plan, group.started, self.number, self._events)
            if not (self.grow_to or stopping):
                done = (sample.heartbeat.iteration for sample in self.pump.heartbeats.values())
                self.standby.tend(group, self.number, min(done, default=0), self._events)
            if growth and not (self.grow_to or stopping):
                self.grow_to = growth.look(clock.now())
                if self.grow_to:
                    self.pump.order("preempt", self.plan.name, self.number)
            if watchdog and (stuck := watchdog.look(self.pump.heartbeats, self.pump.drained)):
                return self._end_stuck(group, stuck)
            if watchdog and watchdog.all_ended(self.pump.heartbeats, self.pump.drained):
                return group.end()
        return None

    def _note_clock(self) -> None:
        deviation = clock.deviation()
        if abs(deviation - self.deviation) > clock.TOLERANCE_SECONDS:
            self.deviation = deviation
            self._emit(ClockChanged, seconds=deviation)

    def _end_stuck(self, group: WorkerGroup, stuck: list[Stuck]) -> None:
        workers = self._own(WorkerStarted)
        files = save_stuck(workers, self.plan.trial_dir)
        where = f"; what all ranks were doing is in {files}" if files else ""
        for one in stuck:
            self.pump.emit(self._failure("stuck", one.rank, one.message + where, one.last, one.began))
        ranks = {one.rank for one in stuck}
        group.kill([worker for worker in workers if worker.rank in ranks])
        if not group.wait(self.plan.timeouts["heartbeat"]):
            group.end()

    def _emit_dead_ranks(self, error: Exception | None) -> None:
        """Reports the ranks whose process or node was lost: they could not do so themselves.

        Of a lost node, a peer's broken connection may be the only sign, or that its processes do not answer.
        """
        reported = self._own(WorkerFailed)
        failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
        dead = {rank: failure for rank, failure in failures.items() if rank not in {event.rank for event in reported}}
        if not dead and {event.failure for event in reported} != {"communication"}:
            return
        nodes = lost_nodes()
        lost = {worker.rank: worker.host for worker in self._own(WorkerStarted) if worker.node_id in nodes}
        for rank, host in lost.items():
            self._emit_dead("worker_lost", f"its node {host} was lost", rank)
        gone = dead.keys() - lost.keys()
        killed = killed_for_memory([worker for worker in self._own(WorkerStarted) if worker.rank in gone])
        for rank in gone:
            reason = cause_of_death(dead[rank])
            if reason is None:  # the training function raised before it could report that, as an import may do
                kind = kind_of(dead[rank])
                self._emit_dead(kind, f"{type(dead[rank]).__name__}: {dead[rank]}", rank)
                continue
            self._emit_dead(*death(reason, killed.get(rank, "")), rank)

    def _emit_dead(self, kind: str, message: str, rank: int) -> None:
        sample = self.pump.heartbeats.get(rank)
        last, began = (sample.heartbeat, sample.received) if sample else (None, None)
        if kind == "out_of_memory" and last and last.section == "step":
            message += batch_hint(self.plan, None)
        self.pump.emit(self._failure(kind, rank, message, last, began))

    def _failure(
        self, kind: str, rank: int, message: str, last: Heartbeat | None = None, began: float | None = None
    ) -> WorkerFailed:
        return WorkerFailed(
            trial=self.plan.name,
            attempt=self.number,
            rank=rank,
            time=clock.now(),
            failure=kind,  # type: ignore[arg-type]
            iteration=last.iteration if last else _iterations(self._own(Event)),
            section=last.section if last else "setup",
            message=message,
            image_files=last.image_files if last and last.section == "step" else (),
            began=began,
        )

    def _emit(self, kind: type[E], **fields: object) -> E:
        event = kind(trial=self.plan.name, attempt=self.number, rank=DRIVER_RANK, time=clock.now(), **fields)
        self.pump.emit(event)
        return event

    def _events(self) -> list[Event]:
        """Events of this trial."""
        return [event for event in self.pump.events if event.trial == self.plan.name]

    def _own(self, kind: type[E]) -> list[E]:
        """Events of this attempt."""
        return [event for event in self._events() if isinstance(event, kind) and event.attempt == self.number]


def _check_cluster() -> None:
    """Looks whether there still is a cluster: what fails without it says nothing about the trial.

    Raises:
        ClusterLostError: There is none.
    """
    if daemon := lost_daemon():
        raise ClusterLostError(f"the Ray cluster was lost: its {daemon} has ended")


def _iterations(events: Sequence[Event]) -> int:
    """Iterations that the last attempt among some events had done when it was last heard of."""
    last = max((event.attempt for event in events), default=0)
    own = [event for event in events if event.attempt == last]
    done = [event.iteration for event in own if isinstance(event, StepsDone | LoopStarted | WorkerFailed)]
    return max(done, default=0)
