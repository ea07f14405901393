"""How much of a trial's wall time was useful, what the rest went to, and which checkpoint interval would waste least.

Everything is taken from the sections of the wall clock, which add up: no second counts twice.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from orchestrator.figures.records import Sections
from orchestrator.figures.sections import loop_runs, num_nodes, trial_start
from orchestrator.figures.steps import PARTS
from trainers.contract.checkpoint_interval import advised_checkpoint_seconds, default_mtbf_seconds
from trainers.contract.events import (
    CheckpointSaved,
    Event,
    LogReplayed,
    TrialEnded,
    TrialRestarted,
)

RESUMED, PREEMPTED, RESIZED = "resumed", "preempted", "resized"
"""Restarts (`TrialRestarted.failure`) that are no failure: after a stop, a node taken away with notice, room for more
workers."""


def goodput_figures(where: Sections | None, events: Sequence[Event], mtbf_hours: float | None) -> dict[str, Any]:
    """Goodput, ETTR and the advice on checkpoints, by their names in a trial's record; None for what is not known.

    Args:
        where: The trial's wall clock by section; None where it is not known.
        events: All events of the trial.
        mtbf_hours: Mean time between failures that was stated for it, if any.
    """
    values: dict[str, Any] = {}
    if where is not None and where.wall > 0:
        useful = where.step_other + sum(getattr(where, part) or 0.0 for part in PARTS)
        paused = paused_seconds(events)
        values = {
            "goodput": useful / where.wall,
            "ettr": (useful + where.evaluation) / (where.wall - paused),
            "paused_seconds": paused,
        }
    saved = [event for event in events if isinstance(event, CheckpointSaved)]
    if any(isinstance(event, LogReplayed) for event in events) or not saved:
        return values
    mtbf, source = _mtbf(events, mtbf_hours)
    stall = statistics.fmean(event.stall_seconds for event in saved)
    return values | {
        "mtbf_seconds": mtbf,
        "mtbf_source": source,
        "checkpoint_interval_seconds": statistics.median(_intervals(events, saved)),
        "advised_checkpoint_seconds": advised_checkpoint_seconds(stall, mtbf),
    }


def paused_seconds(events: Sequence[Event]) -> float:
    """From each end of the trial, by a stop or for good, to the moment when a person resumed it.

    A lost driver leaves no end: the trial was still wanted, and the time until it goes on is downtime.
    """
    paused, ended = 0.0, None
    for event in events:
        if isinstance(event, TrialEnded):
            ended = event.time
        elif isinstance(event, TrialRestarted) and ended is not None:
            paused, ended = paused + event.time - ended, None
    return paused


def measured_mtbf_hours(events: Sequence[Event]) -> float | None:
    """Hours of a trial, ended or not, for each failure it has had.

    None before the first, and where the beginning is not known.

    A preemption with notice and a restart with more workers are none, since a checkpoint is taken then; a lost driver
    is one, a stop by the user not.
    """
    start = trial_start(events)
    failures, killed = 0, False
    for event in events:
        if isinstance(event, TrialEnded):
            killed = event.status == "KILLED"
        elif isinstance(event, TrialRestarted):
            planned = event.failure in (PREEMPTED, RESIZED) or (event.failure == RESUMED and killed)
            failures += not planned
            killed = False
    if start is None or not failures:
        return None
    wanted = max(event.time for event in events) - start - paused_seconds(events)
    return wanted / failures / 3600 if wanted > 0 else None


def _mtbf(events: Sequence[Event], stated_hours: float | None) -> tuple[float, str]:
    """Mean time between failures in seconds, and where it is from."""
    if stated_hours is not None:
        return stated_hours * 3600, "stated"
    measured = measured_mtbf_hours(events)
    if measured is not None:
        return measured * 3600, "measured"
    return default_mtbf_seconds(num_nodes(events) or 1), "default"


def _intervals(events: Sequence[Event], saved: Sequence[CheckpointSaved]) -> list[float]:
    """Seconds from the first batch of each attempt to its first checkpoint, and from each of them to the next."""
    intervals = []
    for run in loop_runs(events):
        before = run.started
        for event in (event for event in saved if event.attempt == run.attempt):
            taken = event.time - event.write_seconds
            intervals.append(taken - before)
            before = taken
    return intervals
