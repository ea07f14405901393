"""Which failure of an attempt caused the others, and how it is described."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainers.contract.events import (
    CheckpointFailed,
    CheckpointSkipped,
    ClockChanged,
    Evaluated,
    EvaluationLost,
    Event,
    EventsLost,
    FailureKind,
    LogReplayed,
    LoopFinished,
    LoopStarted,
    StepsDone,
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
    evaluated = {event.iteration for event in events if isinstance(event, Evaluated)}  # perhaps after a restart
    noted = set(evaluated)
    evaluations: list[str] = []
    for event in events:
        if isinstance(event, Evaluated) or (isinstance(event, EvaluationLost) and event.iteration not in evaluated):
            left_out = tuple(iteration for iteration in event.left_out if iteration not in noted)
            evaluations += evaluation_notes(replace(event, left_out=left_out))
            noted.update(left_out)
    return clocks + checkpoints + list(dict.fromkeys(evaluations))


def evaluation_notes(event: Evaluated | EvaluationLost) -> list[str]:
    """What was not as planned with an evaluation."""
    notes = []
    if event.left_out:
        iterations = ", ".join(f"{iteration:,}" for iteration in event.left_out)
        notes.append(f"the evaluation after {iterations} iterations was left out, since an older one was in progress")
    if isinstance(event, EvaluationLost):
        notes.append(event.message)
    elif event.num_lost:
        times = "once" if event.num_lost == 1 else f"{event.num_lost} times"
        what = f"the process that made the evaluation after {event.iteration:,} iterations was lost {times}"
        notes.append(f"{what} and was replaced")
    return notes


def lost_events(events: Sequence[Event], eval_period: int = 0) -> list[str]:
    """What of a trial its events do not hold any more, since somebody or something cut or damaged the file.

    No checkpoint counts before all earlier events are on disk, and the windows of a rank follow on each other: a start
    from a later iteration than was reported, or a window that begins later than the one before ended, is a gap.

    Args:
        events: All events of the trial.
        eval_period: Iterations between evaluations; 0 for not known.
    """
    if any(isinstance(event, LogReplayed) for event in events):
        return []
    known, done = 0, dict[int, int]()  # iterations done by any rank so far, and by each one in its last attempt
    gaps: set[tuple[int, int]] = set()
    for event in events:
        if isinstance(event, LoopStarted | LoopFinished):
            gaps.add((known, event.iteration))
            known = max(known, event.iteration)
            done[event.rank] = event.iteration
        elif isinstance(event, StepsDone):
            gaps.add((done.get(event.rank, known), event.first_iteration))
            known = max(known, event.iteration)
            done[event.rank] = event.iteration
    evaluated = {event.iteration for event in events if isinstance(event, Evaluated)}
    texts = [_lines_text(event) for event in events if isinstance(event, EventsLost)]
    for start, end in _joined(gaps):
        text = f"the events of iterations {start + 1} to {end} are not in events.jsonl, which was cut or damaged"
        due = [each for each in range(start + 1, end + 1) if eval_period and each % eval_period == 0]
        missing = [str(each) for each in due if each not in evaluated]
        text += f"; so are the evaluations after {', '.join(missing)}" if missing else ""
        texts.append(f"{text}: figures and curves are made from what is left")
    return list(dict.fromkeys(texts))


def _joined(gaps: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of iterations without those that lie in another one."""
    return sorted(
        (start, end)
        for start, end in gaps
        if start < end
        and not any(first <= start and end <= last and (first, last) != (start, end) for first, last in gaps)
    )


def _lines_text(event: EventsLost) -> str:
    shown = ", ".join(map(str, event.lines[:5])) + (" …" if len(event.lines) > 5 else "")
    lines = f"line {shown}" if len(event.lines) == 1 else f"{len(event.lines)} lines ({shown})"
    return f"{lines} of events.jsonl cannot be read: what it held is missing"


def changes_text(changes: dict[str, Any]) -> str:
    """What `--resume --set` changed, in a line."""
    return ", ".join(f"{key}={value}" for key, value in changes.items())


def clock_note(event: ClockChanged) -> str:
    """A change of the machine's clock in a line."""
    direction = "ahead of" if event.seconds > 0 else "behind"
    whose = "the driver's machine" if event.rank < 0 else f"rank {event.rank}'s machine"
    return f"the clock of {whose} is {abs(event.seconds):,.0f} s {direction} the run's times, which go on as they began"
