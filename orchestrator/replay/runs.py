"""Finds the training runs among a log's launches.

A file may hold several runs, or one run that was started again; two runs that wrote into one file at once are an error,
for their figures cannot be separated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.replay.launches import Launch, LaunchReader
from orchestrator.replay.messages import Message
from orchestrator.replay.unpacking import ReplayError


@dataclass(slots=True)
class LoggedRun:
    """One run: its launches in order, each after the first resumed from a checkpoint."""

    source: Path
    launches: list[Launch]
    """At least one; the first may itself resume a run of another log."""
    notes: list[str]
    """What is missing or must be known to read its figures."""
    dated: bool = True
    """Whether its times are known."""


def find_runs(source: Path, messages: Sequence[Message], notes: Sequence[str]) -> list[LoggedRun]:
    """Finds the training runs in the messages of a file, in order; the notes apply to each of them.

    Where there is no training, each evaluation by itself (`--eval-only`) is a run, without steps.

    Raises:
        ReplayError: There is neither in it, or two runs are mixed.
    """
    launches = LaunchReader(source, messages).launches
    runs = _runs(source, [launch for launch in launches if launch.rank == 0], notes)
    if not runs:
        other = next((launch.rank for launch in launches if launch.rank), None)
        why = ": no start and no progress line" if other is None else f": rank {other} wrote it, use the log of rank 0"
        raise ReplayError(f"{source}: a detectron2 log without training{why}")
    used = {id(launch) for run in runs for launch in run.launches}
    left = [launch for launch in launches if id(launch) not in used]
    for number, text in (
        (sum(e.rank > 0 for e in left), "starts of ranks other than 0 were left out"),
        (sum(not e.rank and not e.evaluations for e in left), "starts that never reached training were left out"),
        (sum(not e.rank and bool(e.evaluations) for e in left), "runs of --eval-only were left out"),
    ):
        if number:
            runs[0].notes.append(f"{number} {text}")
    for run in runs:
        if any(_clock_is_wrong(launch) for launch in run.launches):
            run.dated = False
            run.notes.append("the log's clock jumps: its times cannot be trusted, and none is given")
        if len(runs) > 1:
            run.notes.append(f"the file holds {len(runs)} runs, which are separate trials here")
    return runs


def _runs(source: Path, launches: Sequence[Launch], notes: Sequence[str]) -> list[LoggedRun]:
    runs: list[LoggedRun] = []
    for launch in (launch for launch in launches if launch.has_training):
        if runs and _resumes(runs[-1].launches[-1], launch):
            runs[-1].launches.append(launch)
        else:
            runs.append(LoggedRun(source, [launch], list(notes)))
    if runs:
        return runs
    return [LoggedRun(source, [launch], list(notes)) for launch in launches if launch.evaluations]


def _clock_is_wrong(launch: Launch) -> bool:
    """Whether a launch's dates go back, or disagree with the training time that it closes with."""
    if launch.clock_jumped or launch.ended < launch.began:
        return True
    if launch.total_seconds is None or launch.total_printed is None or launch.loop_started is None:
        return False
    by_dates = launch.total_printed - launch.loop_started
    return abs(by_dates - launch.total_seconds) > max(60.0, 0.01 * launch.total_seconds)


def _resumes(before: Launch, after: Launch) -> bool:
    """Whether a launch continues the one before: same setup, and it starts at an iteration that was reached."""
    start, batch = after.first_iteration or 0, "SOLVER.IMS_PER_BATCH"
    setups = (before.world_size, after.world_size), (before.number(batch), after.number(batch))
    same = all(a is None or b is None or a == b for a, b in setups)
    # A checkpoint may be newer than the last progress line by less than one period of them.
    return start > 0 and same and before.overall is None and start <= (before.iterations or 0) + 20
