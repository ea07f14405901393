"""Decides whether starting a failed trial again can help: events in, a decision out; no clock, no cluster."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from orchestrator.experiment.spec import Faults
from orchestrator.figures.causes import described
from trainers.contract.events import (
    CheckpointSaved,
    Event,
    GroupStarted,
    LoopStarted,
    StepsDone,
    WorkerFailed,
)
from trainers.contract.plan import TrialPlan

STANDBY_STARTS = 2
"""How many times the seconds of a start must be left of a trial for a standby group, which takes one, to be of use."""


class Policy:
    """Decides after each failed attempt of one trial.

    Args:
        faults: The experiment's policy.
    """

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._in_a_row = 0
        self._last: WorkerFailed | None = None

    def give_up(self, cause: WorkerFailed, events: Sequence[Event]) -> str:
        """Why the trial is not started again; "" where it is.

        Args:
            cause: What ended the attempt.
            events: Events of the attempt.
        """
        last, self._last = self._last, cause
        self._in_a_row = 1 if _made_progress(events) else self._in_a_row + 1
        if cause.failure not in self._faults.restart_on:
            return described(cause)
        if last is not None and _same_place(last, cause):
            return f"twice at the same place: {described(cause)}"
        if self._in_a_row > self._faults.max_failures:
            return f"{self._in_a_row} failures in a row without a new checkpoint; the last: {described(cause)}"
        return ""


def _made_progress(events: Sequence[Event]) -> bool:
    start = next((event.iteration for event in events if isinstance(event, LoopStarted)), 0)
    return any(isinstance(event, CheckpointSaved) and event.iteration > start for event in events)


def _same_place(last: WorkerFailed, cause: WorkerFailed) -> bool:
    """Whether the same exception came twice; how far a process that just died had come is known to a second only."""
    places = [(failure.failure, failure.iteration, failure.section) for failure in (last, cause)]
    return cause.failure in ("out_of_memory", "unknown") and places[0] == places[1]


def standby_is_due(
    faults: Faults, plan: TrialPlan, attempt: int, iteration: int, events: Callable[[], Sequence[Event]]
) -> bool:
    """Whether it is time to start workers that wait for a failure.

    `true`: once all workers train. `auto`: once there is a checkpoint, if another failure is as likely as not in what
    is left, by the stated MTBF or the trial's own; never next to a measurement. Where all CPUs train, a standby costs
    as much as the start that it saves, and Ray looks after processes that wait: a trial that does not fail would be
    slower for nothing. Never where a failure ends the trial anyway, nor on GPUs, whose memory a process would take.

    Args:
        faults: The experiment's policy.
        plan: The trial, with the workers that train and the MTBF as far as it is known.
        attempt: The number of the attempt that trains.
        iteration: Iterations that all of its workers have done.
        events: Returns the events of the trial; called where they decide.
    """
    if plan.device != "cpu" or not (faults.standby and faults.restart_on and faults.max_failures):
        return False
    if faults.standby == "auto" and (plan.protocol != "time_to_train" or plan.mtbf_hours is None):
        return False
    everything = events()
    own = [event for event in everything if event.attempt == attempt]
    loops = [event for event in own if isinstance(event, LoopStarted)]
    if len(loops) < plan.world_size or not loops[0].iteration < iteration < plan.solver.max_iter:
        return False
    if faults.standby != "auto":
        return True
    windows = [event for event in own if isinstance(event, StepsDone) and event.rank == 0]
    if not windows or not any(isinstance(event, CheckpointSaved) for event in everything):
        return False
    step_seconds = sum(window.seconds for window in windows) / (windows[-1].iteration - windows[0].first_iteration)
    left = (plan.solver.max_iter - iteration) * step_seconds
    mtbf = (plan.mtbf_hours or 0.0) * 3600
    return left > max(math.log(2) * mtbf, STANDBY_STARTS * _start_seconds(everything))


def _start_seconds(events: Sequence[Event]) -> float:
    """How long the slowest start of a trial's workers took, from the first process to the first batch."""
    seconds: defaultdict[int, float] = defaultdict(float)
    for event in events:
        if isinstance(event, GroupStarted):
            seconds[event.attempt] += sum(event.part_seconds.values())
        elif isinstance(event, LoopStarted) and event.rank == 0:
            seconds[event.attempt] += event.setup_seconds or 0.0
    return max(seconds.values(), default=0.0)
