"""Decides whether starting a failed trial again can help: events in, a decision out; no clock, no cluster."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.experiment.spec import Faults
from orchestrator.figures.causes import described
from trainers.contract.events import CheckpointSaved, Event, LoopStarted, WorkerFailed

NOT_COUNTED = "preempted"
"""A node was taken away with notice: not a failure of the trial."""


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
