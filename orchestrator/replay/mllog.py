"""Finds MLPerf's log lines (`:::MLLOG`) in a result file or a container's output, and the runs that they describe."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.replay.unpacking import ReplayError

MARK = ":::MLLOG"

BENCHMARK = "maskrcnn"
"""MLPerf's name of Mask R-CNN, whose lines are read (MLPerf Training 0.6 to 3.1)."""

MAX_NUMBER = 1e15
"""No figure of a log is larger, in milliseconds neither."""

RANKS_SECONDS = 60.0
"""Within which all ranks print a line that each of them prints, so that the lines of a file are in order."""

MEASURED = ("block_start", "block_stop", "epoch_start", "eval_start", "eval_accuracy", "eval_stop", "tracked_stats")
"""Keys whose times make figures."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of MLPerf's."""

    key: str
    time: float
    """Unix seconds."""
    value: Any
    metadata: dict[str, Any]

    def number(self, *names: str) -> float | None:
        """The first of these numbers that its metadata have."""
        return next((n for name in names if (n := finite(self.metadata.get(name))) is not None), None)


@dataclass(slots=True)
class MllogRun:
    """One run: what its lines say before and after its start."""

    source: Path
    values: dict[str, Any]
    """What was logged first, by key."""
    num_processes: int
    """How many processes printed that they begin to initialize: each rank does, or rank 0 alone."""
    began: float
    """Time of `init_start`, else of the first line (Unix seconds)."""
    started: float
    """Time of `run_start`."""
    lines: list[Line] = field(default_factory=list)
    """From `run_start` on, in order."""
    stopped: float | None = None
    """Time of `run_stop`; None where there is none."""
    status: str = ""
    """`success`, or why not; empty where there is no `run_stop`."""
    timeless: tuple[str, ...] = ()
    """Keys of the file's lines that were left out, as their time cannot be read."""
    notes: list[str] = field(default_factory=list)

    @property
    def succeeded(self) -> bool:
        """Whether its log says that it met the target."""
        return self.status == "success"

    @property
    def ended(self) -> float:
        """When it ended, as far as the log shows (Unix seconds)."""
        return self.stopped if self.stopped is not None else self.lines[-1].time

    @property
    def flaw(self) -> str:
        """Why its times cannot be true; empty where they can."""
        if self.stopped is not None and self.stopped < self.started:
            return "run_stop is before run_start"
        latest = self.started
        for line in self.lines:
            if line.time < latest - RANKS_SECONDS or (line.key in MEASURED and line.time < self.started):
                return f"times go backwards at {line.key}, by {latest - line.time:,.1f} s"
            latest = max(latest, line.time)
        return ""


def description_file(source: Path) -> Path | None:
    """Where a submission describes the system of a log; None for a log that is in no submission."""
    parents = source.absolute().parents
    inside = len(parents) > 3 and parents[0].name == BENCHMARK
    return parents[3] / "systems" / f"{system_name(source)}.json" if inside else None


def system_name(source: Path) -> str:
    """Name of the system in a submission: its folder, above that of the benchmark."""
    folder = source.absolute().parent
    return folder.parent.name if folder.name == BENCHMARK else folder.name


def finite(value: Any) -> float | None:
    """A value of a line as a number, also one in a string; None for anything else, NaN and infinity too."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER
    return float(value) if known else None


def shown(value: Any) -> str:
    """A value as its line has it, not too long for a note."""
    return json.dumps(value)[:40]


def is_mllog(text: str) -> bool:
    """Whether a file holds lines of MLPerf's."""
    return MARK in text


def find_mllog_runs(source: Path, text: str, notes: list[str]) -> list[MllogRun]:
    """The runs in a file, in order; the notes apply to each of them.

    Raises:
        ReplayError: There is none, or they are of another benchmark.
    """
    lines, damaged, timeless = _lines(text)
    notes = [*notes, *_left_out(damaged, timeless)]
    others = {str(line.value) for line in lines if line.key == "submission_benchmark"} - {BENCHMARK}
    if others:
        raise ReplayError(f"{source}: a log of MLPerf's {', '.join(sorted(others))}; {BENCHMARK} is what is read here")
    runs: list[MllogRun] = []
    header: list[Line] = []
    for line in lines:
        current = runs[-1] if runs and runs[-1].stopped is None else None
        if line.key == "run_start" and not (current and line.time - current.started < RANKS_SECONDS):
            runs.append(_begin(source, header, line, notes))
            runs[-1].timeless = tuple(timeless)
            header = []
        elif current is None:
            header.append(line)
        else:
            current.values.setdefault(line.key, line.value)
            current.lines.append(line)
            if line.key == "run_stop":
                current.stopped, current.status = line.time, str(line.metadata.get("status", "unknown"))
    if not runs:
        why = f"whether it trained is not known ({notes[-1]})" if damaged or timeless else "it never trained"
        raise ReplayError(f"{source}: a log of MLPerf without run_start: {why}")
    for line in header:  # some write the submission's lines at the end
        runs[-1].values.setdefault(line.key, line.value)
    if len(runs) > 1:
        for run in runs:
            run.notes.append(f"the file holds {len(runs)} runs, which are separate trials here")
    return runs


def _left_out(damaged: int, timeless: list[str]) -> list[str]:
    notes = [f"{damaged} lines of MLPerf's cannot be read and were left out"] if damaged else []
    if timeless:
        keys = ", ".join(dict.fromkeys(timeless))[:200]
        notes.append(f"lines were left out, {len(timeless)} in all, as their time_ms cannot be read: {keys}")
    return notes


def _begin(source: Path, header: list[Line], start: Line, notes: list[str]) -> MllogRun:
    values: dict[str, Any] = {}
    for line in header:
        values.setdefault(line.key, line.value)
    initialized = [line.time for line in header if line.key == "init_start"]
    began = min(initialized or [line.time for line in header if line.time > 0], default=start.time)
    return MllogRun(source, values, len(initialized), min(began, start.time), start.time, [start], notes=list(notes))


def _lines(text: str) -> tuple[list[Line], int, list[str]]:
    """The lines in the order of their file, whatever stands before and after each.

    With them how many cannot be read, and the keys of those of which the time alone cannot be read.
    """
    lines, damaged, timeless = [], 0, []
    at = text.find(MARK)
    while at >= 0:
        following = text.find(MARK, at + len(MARK))
        line = _line(text, at + len(MARK), following if following >= 0 else len(text))
        if isinstance(line, Line):
            lines.append(line)
        elif line:
            timeless.append(line)
        damaged += not line
        at = following
    return lines, damaged, timeless


def _line(text: str, begin: int, end: int) -> Line | str:
    """The line after a mark, within two places of the text; "" where it cannot be read, its key without its time."""
    brace = text.find("{", begin, end)
    try:
        found = json.JSONDecoder().raw_decode(text, brace)[0] if brace >= 0 else None
    except (ValueError, RecursionError):
        return ""
    if not isinstance(found, dict) or not {"key", "time_ms"} <= found.keys():
        return ""
    time_ms, metadata = finite(found["time_ms"]), found.get("metadata")
    if time_ms is None:
        return str(found["key"])
    return Line(str(found["key"]), time_ms / 1000, found.get("value"), metadata if isinstance(metadata, dict) else {})
