"""Which failure of an attempt caused the others, and how it is described."""

from __future__ import annotations

from collections.abc import Sequence

from trainers.contract.events import (
    CheckpointFailed,
    CheckpointSkipped,
    ClockChanged,
    Event,
    FailureKind,
    WorkerFailed,
)

CAUSES: tuple[FailureKind, ...] = (
    "bad_input", "not_finite", "configuration", "storage", "out_of_memory", "stuck", "worker_lost", "unknown",
    "communication",
)  # fmt: skip
"""Failures by how likely they are the cause of the others seen with them, the likeliest first."""


def root_cause(events: Sequence[Event]) -> WorkerFailed | None:
    """The failure among the events of one attempt that caused the others; None where none was reported."""
    failures = (event for event in events if isinstance(event, WorkerFailed))
    return min(failures, key=lambda e: (CAUSES.index(e.failure), not e.image_files, e.time), default=None)


def described(cause: WorkerFailed) -> str:
    """A failure in one line: what, on which rank, at which iteration, on which images."""
    place = f"rank {cause.rank}, iteration {cause.iteration}" if cause.rank >= 0 else "before the workers started"
    text = f"{cause.failure} ({place}, {cause.section}): {cause.message}"
    if cause.image_files and cause.failure not in ("bad_input", "communication"):
        text += f"; images of the batch: {', '.join(cause.image_files)}"
    return text


def oddities(events: Sequence[Event]) -> list[str]:
    """What happened in a trial that was not expected and did not end an attempt, in a line each."""
    clocks = [clock_note(event) for event in events if isinstance(event, ClockChanged)]
    checkpoints = [
        event.message
        if isinstance(event, CheckpointFailed)
        else f"the checkpoint {event.path} is damaged and was skipped: {event.message}"
        for event in events
        if isinstance(event, CheckpointFailed | CheckpointSkipped)
    ]
    return clocks + checkpoints


def clock_note(event: ClockChanged) -> str:
    """A change of the machine's clock in a line."""
    direction = "ahead of" if event.seconds > 0 else "behind"
    return (
        f"the clock of the driver's machine is {abs(event.seconds):,.0f} s {direction} the run's times, which go on as "
        "they began"
    )
