"""Runs one trial to its end: starts its workers, looks after them, and decides about another start when they fail.

The trap it protects against: Ray Train waits for a stuck worker forever and starts again after failures that can never
succeed. Here every wait has an end, and every end has a cause that is told.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TypeVar

from ray.train import TrainingFailedError

from orchestrator.execution.cluster import draining_nodes, lost_nodes
from orchestrator.execution.event_pump import EventPump
from orchestrator.execution.restart_policy import NOT_COUNTED, Policy
from orchestrator.execution.stop import StopRequest
from orchestrator.execution.watchdog import Watchdog
from orchestrator.execution.workers import WorkerGroup
from orchestrator.experiment.spec import Faults
from orchestrator.figures.causes import root_cause
from orchestrator.figures.sections import began
from trainers.contract.events import (
    Event,
    Heartbeat,
    LoopFinished,
    LoopStarted,
    StepsDone,
    TrialEnded,
    TrialRestarted,
    TrialStarted,
    WorkerFailed,
    WorkerStarted,
)
from trainers.contract.plan import Attempt, TrialPlan

POLL_INTERVAL_SECONDS = 0.2
"""How often the driver looks after the workers."""

DRAINING_POLL_INTERVAL_SECONDS = 1.0
"""How often it asks whether a node is to be taken away."""

E = TypeVar("E", bound=Event)


def run_trial(plan: TrialPlan, faults: Faults, pump: EventPump, ray_dir: str, stop: StopRequest) -> TrialEnded:
    """Runs a trial to its end, with as many attempts as the policy allows.

    A trial that `pump` has events of already goes on from its newest checkpoint, as the next attempt.

    Args:
        plan: The trial.
        faults: What is done about failures.
        pump: Where its events go.
        ray_dir: Folder for Ray Train's own files.
        stop: Set when the user or the job server wants an end.

    Returns:
        How it ended; the same has been told to the pump.
    """
    return _Trial(plan, faults, pump, ray_dir, stop).run()


class _Trial:
    def __init__(self, plan: TrialPlan, faults: Faults, pump: EventPump, ray_dir: str, stop: StopRequest) -> None:
        self.plan, self.pump, self.ray_dir, self.stop = plan, pump, ray_dir, stop
        self.policy = Policy(faults)
        self.number = 0

    def run(self) -> TrialEnded:
        earlier = [event for event in self.pump.events if event.trial == self.plan.name]
        if earlier:
            self.number = max(event.attempt for event in earlier) + 1
            last = next((event for event in reversed(earlier) if isinstance(event, TrialEnded)), None)
            message = f"resumed after {last.reason}" if last else "resumed after its driver was lost"
            self._emit_restart("resumed", message, _iterations(earlier))
        else:
            self._emit(TrialStarted, plan=dataclasses.asdict(self.plan))
        while True:
            cause, reason = self._attempt()
            if cause is None or reason or self.stop.requested:
                break
            iterations = max(cause.iteration, _iterations(self._own(Event)))
            self.number += 1
            message = f"rank {cause.rank}: {cause.message}" if cause.rank >= 0 else cause.message
            self._emit_restart(cause.failure, message, iterations)
        if cause is None:
            return self._emit(TrialEnded, status="FINISHED", reason="")
        if self.stop.requested:
            return self._emit(TrialEnded, status="KILLED", reason="stopped by the user")
        return self._emit(TrialEnded, status="FAILED", reason=reason)

    def _attempt(self) -> tuple[WorkerFailed | None, str]:
        """One start of the workers, to its end.

        Returns:
            What ended it, None when training is done; and why there must be no other start, "" when there may be.
        """
        self.pump.begin(self.number)
        earlier = [event for event in self.pump.events if event.trial == self.plan.name]
        attempt = Attempt(self.number, began(earlier) if self.number else None)
        group = WorkerGroup(self.plan, attempt, self.pump.actor, self.ray_dir)
        preempted = self._look_after(group)
        self.pump.drain()
        finished = self._last(LoopFinished)
        if finished and finished.reason in ("target", "max_iter"):
            return None, ""
        if self.pump.lost:
            message = "the actor that takes the workers' events was lost"
            self.pump.emit(self._failure("communication", -1, message))
        self._emit_lost(group.error)
        cause = root_cause(self._own(WorkerFailed))
        if preempted or (finished and finished.reason == "preempted"):
            return self._failure(NOT_COUNTED, -1, "a node is being taken away"), ""
        if cause is None:
            message = f"{type(group.error).__name__}: {group.error}" if group.error else "the workers ended early"
            cause = self._failure("unknown", -1, message)
            if not self.stop.requested:
                self.pump.emit(cause)
        return cause, self.policy.give_up(cause, self._own(Event))

    def _look_after(self, group: WorkerGroup) -> bool:
        """Waits for the workers; returns whether they had to leave a node that is being taken away."""
        watchdog = Watchdog(self.plan.timeouts, self.plan.world_size, time.time())
        stopping = preempted = False
        next_drain_look = 0.0
        while not group.wait(POLL_INTERVAL_SECONDS):
            if self.stop.requested and not stopping:
                stopping = True
                self.pump.order("stop", self.number)
                if not self._own(LoopStarted):  # nothing has been trained that a checkpoint could keep
                    group.end()
                    break
            if self.stop.overdue or self.pump.lost:
                group.end()
                break
            if not preempted and not stopping and time.monotonic() >= next_drain_look:
                next_drain_look = time.monotonic() + DRAINING_POLL_INTERVAL_SECONDS
                if draining_nodes() & {worker.node_id for worker in self._own(WorkerStarted)}:
                    preempted = True
                    self.pump.order("preempt", self.number)
            watchdog.world_size = group.plan.world_size  # fewer than planned, where a node did not come back
            stuck = watchdog.look(self.pump.heartbeats, self.pump.drained)
            if stuck:
                for one in stuck:
                    self.pump.emit(self._failure("stuck", one.rank, one.message, one.last, one.began))
                ranks = {one.rank for one in stuck}
                group.kill([worker for worker in self._own(WorkerStarted) if worker.rank in ranks])
                if not group.wait(self.plan.timeouts["heartbeat"]):
                    group.end()
                break
        return preempted

    def _emit_lost(self, error: BaseException | None) -> None:
        """Tells of the ranks whose process or node went away: they could not tell it themselves.

        Of a lost node, a peer's broken connection may be all that was heard, or that its processes do not answer.
        """
        told = self._own(WorkerFailed)
        failures = getattr(error, "worker_failures", {}) if isinstance(error, TrainingFailedError) else {}
        dead = {rank: failure for rank, failure in failures.items() if rank not in {event.rank for event in told}}
        if not dead and {event.failure for event in told} != {"communication"}:
            return
        nodes = lost_nodes()
        lost = {worker.rank: worker.host for worker in self._own(WorkerStarted) if worker.node_id in nodes}
        for rank, host in lost.items():
            self._emit_dead("worker_lost", rank, f"its node {host} was lost")
        for rank in dead.keys() - lost.keys():
            reason = getattr(dead[rank], "health_check_failure", dead[rank])
            out_of_memory = "OOM" in str(reason) and "memory pressure" in str(reason)
            kind = "out_of_memory" if out_of_memory else "worker_lost"
            message = f"its process died: {str(reason).splitlines()[0] if str(reason) else type(reason).__name__}"
            self._emit_dead(kind, rank, message)

    def _emit_dead(self, kind: str, rank: int, message: str) -> None:
        sign = self.pump.heartbeats.get(rank)
        last, began = (sign.heartbeat, sign.received) if sign else (None, None)
        self.pump.emit(self._failure(kind, rank, message, last, began))

    def _failure(
        self, kind: str, rank: int, message: str, last: Heartbeat | None = None, began: float | None = None
    ) -> WorkerFailed:
        return WorkerFailed(
            trial=self.plan.name,
            attempt=self.number,
            rank=rank,
            time=time.time(),
            failure=kind,  # type: ignore[arg-type]
            iteration=last.iteration if last else _iterations(self._own(Event)),
            section=last.section if last else "setup",
            message=message,
            image_files=last.image_files if last and last.section == "step" else (),
            began=began,
        )

    def _emit(self, kind: type[E], **fields: object) -> E:
        event = kind(trial=self.plan.name, attempt=self.number, rank=-1, time=time.time(), **fields)
        self.pump.emit(event)
        return event

    def _emit_restart(self, failure: str, message: str, iteration: int) -> None:
        self._emit(TrialRestarted, failure=failure, message=message, iteration=iteration)

    def _own(self, kind: type[E]) -> list[E]:
        """Events of this attempt."""
        name, number = self.plan.name, self.number
        return [e for e in self.pump.events if isinstance(e, kind) and e.trial == name and e.attempt == number]

    def _last(self, kind: type[E]) -> E | None:
        return next(reversed(self._own(kind)), None)


def _iterations(events: Sequence[Event]) -> int:
    """Iterations that the last attempt among some events had done by its last sign."""
    last = max((event.attempt for event in events), default=0)
    own = [event for event in events if event.attempt == last]
    done = [event.iteration for event in own if isinstance(event, StepsDone | LoopStarted | WorkerFailed)]
    return max(done, default=0)
