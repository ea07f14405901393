"""What a failure was, and whether starting again can help. Events in, a decision out; no clock, no cluster.

The trap it protects against: one rank's failure makes all others fail in their next collective, so the first exception
that arrives is seldom the cause; and what can never succeed must not be tried again until the budget is gone.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.experiment.spec import Faults
from trainers.contract.events import CheckpointSaved, Event, FailureKind, LoopStarted, WorkerFailed

CAUSES: tuple[FailureKind, ...] = (
    "bad_input",
    "not_finite",
    "configuration",
    "storage",
    "out_of_memory",
    "stuck",
    "worker_lost",
    "unknown",
    "communication",
)
"""Failures by how likely they are the cause of the others seen with them, the likeliest first."""

NOT_COUNTED = "preempted"
"""A node was taken away with notice: not a failure of the trial."""


def root_cause(events: Sequence[Event]) -> WorkerFailed | None:
    """The failure of an attempt that the others follow from; None where none was told.

    Args:
        events: Events of one attempt.
    """
    failures = [event for event in events if isinstance(event, WorkerFailed)]
    return min(
        failures,
        key=lambda failure: (CAUSES.index(failure.failure), not failure.image_files, failure.time),
        default=None,
    )


def described(cause: WorkerFailed) -> str:
    """A failure in one line: what, on which rank, at which iteration, on which images."""
    place = f"rank {cause.rank}, iteration {cause.iteration}" if cause.rank >= 0 else "before the workers started"
    text = f"{cause.failure} ({place}, {cause.section}): {cause.message}"
    if cause.image_files and cause.failure not in ("bad_input", "communication"):
        text += f"; images of the batch: {', '.join(cause.image_files)}"
    return text


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
    """Whether the same exception came twice; where a process was that died without a word is known to a second only."""
    places = [(failure.failure, failure.iteration, failure.section) for failure in (last, cause)]
    return cause.failure in ("out_of_memory", "unknown") and places[0] == places[1]
