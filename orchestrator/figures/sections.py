"""Where a trial's wall time went: its events cut into sections that add up to it.

Sums of durations that overlap or leave gaps look plausible, so every section is taken from rank 0's timeline, and what
is left over is shown as `other`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from orchestrator.figures.records import Sections
from orchestrator.figures.steps import PARTS
from trainers.contract.events import (
    CheckpointSaved,
    Evaluated,
    EvaluationLost,
    Event,
    LogReplayed,
    LoopFinished,
    LoopStarted,
    StepsDone,
    TrialEnded,
    TrialStarted,
    WorkerStarted,
)


@dataclass(frozen=True, slots=True)
class LoopRun:
    """One attempt's time in the training loop, on rank 0."""

    attempt: int
    first_iteration: int
    started: float
    """When the first batch was requested (Unix seconds)."""
    last_progress: float
    """When the last window of steps, evaluation or checkpoint was done, or training ended (Unix seconds)."""
    steps: tuple[StepsDone, ...]


def loop_runs(events: Sequence[Event]) -> list[LoopRun]:
    """The attempts that reached the training loop, in order."""
    loops: dict[int, LoopStarted] = {}
    for event in events:
        if isinstance(event, LoopStarted) and event.rank == 0:
            loops.setdefault(event.attempt, event)
    found = []
    for attempt, loop in sorted(loops.items()):
        own = [e for e in events if e.attempt == attempt and e.rank == 0]
        last = max([loop.time, *(end for e in own if (end := _progress(e)) is not None)])
        steps = tuple(e for e in own if isinstance(e, StepsDone))
        found.append(LoopRun(attempt, loop.iteration, loop.time, last, steps))
    return found


def trial_start(events: Sequence[Event]) -> float | None:
    """When the driver first began with the trial (Unix seconds); None where it is not known.

    Where that event was lost, the next resumption reports the start again, with an attempt above 0.
    """
    return next((e.time for e in events if isinstance(e, TrialStarted) and e.attempt == 0), None)


def loop_end(events: Sequence[Event]) -> LoopFinished | None:
    """The end of training; None where the last attempt had none, whatever one before it had."""
    last = max((event.attempt for event in events), default=0)
    ends = (event for event in reversed(events) if isinstance(event, LoopFinished) and event.attempt == last)
    return next(ends, None)


def iterations_done(events: Sequence[Event]) -> int | None:
    """Iterations of the final state: of the last attempt that reached the training loop; None where none did."""
    own = [e for e in events if isinstance(e, LoopStarted | StepsDone | LoopFinished) and e.rank == 0]
    last = max((event.attempt for event in own), default=0)
    return max((event.iteration for event in own if event.attempt == last), default=None)


def began(events: Sequence[Event]) -> float | None:
    """When the training function began: the start of the seed clock (Unix seconds); None where a log lacks it."""
    if lacks(events, "start"):
        return None
    starts = [e.time for e in events if isinstance(e, WorkerStarted)]
    # A worker reports its start after it has loaded its libraries; the loop's event knows when it really began.
    starts += [e.time - e.setup_seconds for e in events if isinstance(e, LoopStarted) and e.setup_seconds is not None]
    return min(starts, default=None)


def last_workers(events: Sequence[Event]) -> list[WorkerStarted]:
    """The workers of the last attempt that had any."""
    workers = [event for event in events if isinstance(event, WorkerStarted)]
    return [event for event in workers if event.attempt == workers[-1].attempt]


def num_nodes(events: Sequence[Event]) -> int | None:
    """Nodes that the last workers were on; None where there were none."""
    return len({(event.host, event.node_id) for event in last_workers(events)}) or None


def lacks(events: Sequence[Event], what: Literal["start", "times"]) -> bool:
    """Whether events are of a log without the start of training, or without any time (see `LogReplayed.unknown`)."""
    names = {what, {"start": "startup_seconds", "times": "evaluations_clock"}[what]}  # older versions name the figure
    return any(isinstance(event, LogReplayed) and names & set(event.unknown) for event in events)


def evaluation_stall(events: Sequence[Event]) -> float:
    """Seconds for which training was paused for evaluations.

    A concurrent evaluation of an older iteration than its attempt started from was in a checkpoint, together with its
    stall until then, which the evaluation for which it is left out takes over. Where an earlier attempt reported that
    stall, only what came on top is added.
    """
    firsts = {run.attempt: run.first_iteration for run in loop_runs(events)}
    seconds, reported = 0.0, dict[int, float]()
    for event in events:
        if isinstance(event, Evaluated | EvaluationLost):
            stall = event.stall_seconds or 0.0
            told = (event.iteration, *event.left_out)
            carried = [each for each in told if each < firsts.get(event.attempt, 0)]
            seconds += max(stall - max((reported.get(each, 0.0) for each in carried), default=0.0), 0.0)
            for iteration in told:
                reported[iteration] = max(stall, reported.get(iteration, 0.0))
    return seconds


def sections(events: Sequence[Event]) -> Sections | None:
    """Cuts a trial's wall time into sections.

    Args:
        events: All events of an ended trial, of every attempt.

    Returns:
        None where the trial never reached the training loop, or its beginning or end is not known.
    """
    attempts = loop_runs(events)
    started = trial_start(events)
    ended = next((e.time for e in reversed(events) if isinstance(e, TrialEnded)), None)
    if not attempts or started is None or ended is None:
        return None
    parts: dict[str, float | None] = dict.fromkeys(PARTS)
    steps = lost = 0.0
    for position, run in enumerate(attempts, start=1):
        lost_from = min((later.first_iteration for later in attempts[position:]), default=None)
        for window in run.steps:
            final = _final_share(window, lost_from)
            steps += window.seconds * final
            lost += window.seconds * (1 - final)
            for part in parts:
                if part in window.part_seconds:
                    parts[part] = (parts[part] or 0.0) + window.part_seconds[part] * final
    replayed = any(isinstance(e, LogReplayed) for e in events)
    measured: dict[str, float | None] = {
        "startup": attempts[0].started - started,
        **parts,
        "step_other": steps - sum(seconds or 0.0 for seconds in parts.values()),
        "evaluation": evaluation_stall(events),
        # A log says when a checkpoint was begun, not how long training was stalled for it.
        "checkpoint": None if replayed else sum(e.stall_seconds for e in events if isinstance(e, CheckpointSaved)),
        "lost_work": lost,
        "downtime": sum(later.started - run.last_progress for run, later in pairwise(attempts)),
        "shutdown": ended - attempts[-1].last_progress,
    }
    wall = ended - started
    return Sections(wall=wall, **measured, other=wall - sum(seconds or 0.0 for seconds in measured.values()))


def _final_share(window: StepsDone, lost_from: int | None) -> float:
    """Share of a window's seconds before the iteration from which its steps were trained again (0–1)."""
    if lost_from is None or window.iteration <= lost_from:
        return 1.0
    final = max(lost_from - window.first_iteration, 0)
    if window.step_seconds:
        return sum(window.step_seconds[:final]) / sum(window.step_seconds)
    return final / (window.iteration - window.first_iteration)


def _progress(event: Event) -> float | None:
    """When the progress that an event reports was made (Unix seconds); None for events that report none."""
    if isinstance(event, StepsDone | Evaluated | LoopFinished):
        return event.time
    if isinstance(event, CheckpointSaved):
        # Written in the background while training goes on: the stall is over before the event comes.
        return min(event.time, event.time - event.write_seconds + event.stall_seconds)
    return None
