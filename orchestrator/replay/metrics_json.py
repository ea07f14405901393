"""Reads AP over iterations from detectron2's metrics.json, where that is all that is left of a run.

Its `time` is smoothed over 20 steps and it has no dates, so it gives neither a throughput nor a time to train.

What detectron2's writer does, by its source: every 20 iterations it writes the newest value of each figure in a line of
the iteration that it belongs to, counted from 0. Figures of an evaluation between two writes so follow the losses with
a line of an earlier iteration, and those after the last step have a line of their own with the number of iterations.
Until release 0.2, each line repeated the figures of the last evaluation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.replay.console import BEGIN
from orchestrator.replay.evaluations import KINDS, LoggedEvaluation, ap
from orchestrator.replay.launches import Launch, Progress, counts_from_one
from orchestrator.replay.runs import LoggedRun
from orchestrator.replay.unpacking import ReplayError
from trainers.contract.events import measured

_FIGURE = re.compile(rf"(?:(?P<dataset>.+)/)?(?P<task>{'|'.join(KINDS)})/(?P<name>AP\w*)")

_NOTE = "metrics.json has no dates and no batch size: only its AP can be read"


MAIN = {"total_loss", "lr", "time", "data_time"}
"""What detectron2 writes of each iteration; a line without any of it is of an evaluation or of a hook."""


@dataclass(slots=True)
class _Line:
    """One line."""

    iteration: int
    """As it is written."""
    values: dict[str, float | None]
    """All but the figures of evaluations."""
    figures: dict[str, dict[str, float | None]]
    """Figures of an evaluation by data set, with an empty name where the line names none."""
    is_training: bool = False
    """Whether it is of training steps."""


def is_metrics_json(text: str) -> bool:
    """Whether a text is a metrics.json, whatever the name of its file."""
    return '"iteration"' in text and not BEGIN.search(text)


def read_metrics(path: Path, text: str, notes: list[str]) -> list[LoggedRun]:
    """Reads the runs of a metrics.json: one, or several that were written one after the other.

    A run that was resumed writes the iterations after its checkpoint once more.

    Args:
        path: The file, which names the run.
        text: Its text.
        notes: Notes on what of it could not be read.

    Raises:
        ReplayError: No line of it is a JSON object with an iteration and a loss or learning rate.
    """
    lines = list(_lines(text, notes := list(notes)))
    has_main = any(MAIN & line.values.keys() for line in lines)
    for line in lines:
        line.is_training = bool(MAIN & line.values.keys()) if has_main else any("loss" in name for name in line.values)
    if not any(line.is_training for line in lines):
        raise ReplayError(f"{path}: not detectron2's metrics.json: no line with an iteration and a loss")
    offset = 0 if counts_from_one([line.iteration for line in lines if line.is_training]) else 1
    datasets = list(dict.fromkeys(name for line in lines for name in line.figures))
    dataset = datasets[0] if datasets else ""
    if len(datasets) > 1:
        left_out = ", ".join(datasets[1:])
        notes.append(f"evaluations on {left_out} were left out: those on {dataset or 'the first data set'} are shown")
    runs: list[LoggedRun] = []
    for part in _parts(lines):
        begins_anew = not runs or part[0].iteration <= runs[0].launches[0].progress[0].iteration - offset
        if begins_anew:
            runs.append(LoggedRun(path, [], [*notes, _NOTE], dated=False))
        runs[-1].launches.append(_launch(part, offset, dataset, runs[-1].notes))
    for run in runs:
        if len(runs) > 1:
            run.notes.append(f"the file holds {len(runs)} runs, which are separate trials here")
        if len(run.launches) > 1:
            run.notes.append("the iterations that each restart lost are known to one period of lines only")
    return runs


def _parts(lines: list[_Line]) -> Iterator[list[_Line]]:
    """The lines of one process after the other: the losses' iterations rise in each."""
    part: list[_Line] = []
    last = -1
    for line in lines:
        if line.is_training:
            if line.iteration <= last:
                yield part
                part = []
            last = line.iteration
        part.append(line)
    yield part


def _launch(lines: list[_Line], offset: int, dataset: str, notes: list[str]) -> Launch:
    launch = Launch(0.0, 0.0, first_iteration=None, loop_started=None)
    before: dict[str, float | None] | None = None
    for line in lines:
        if line.is_training:
            losses = {name: value for name, value in line.values.items() if "loss" in name and value is not None}
            done, rate, data = line.iteration + offset, line.values.get("lr"), line.values.get("data_time")
            launch.progress.append(Progress(done, None, losses, rate, None, data, None))
        figures = line.figures.get(dataset)
        if figures and line.is_training and figures == before:
            # An evaluation with the same figures to the last digit looks no different.
            notes.append(
                "lines that repeat the figures of the line before were left out; "
                "an evaluation between two lines is listed at the later one"
            )
        elif figures:
            # After training, the writer's iteration is the number of iterations already.
            done = line.iteration + (0 if _is_after_training(line, launch, offset) else offset)
            launch.evaluations.append(_evaluation(figures, done))
        if line.is_training:
            before = figures
    if lines:
        launch.finished = _is_after_training(lines[-1], launch, offset)
    return launch


def _is_after_training(line: _Line, launch: Launch, offset: int) -> bool:
    return not line.is_training and bool(launch.progress) and line.iteration > launch.progress[-1].iteration - offset


def _evaluation(figures: dict[str, float | None], done: int) -> LoggedEvaluation:
    box, mask, keypoint = (0.0 if f"{kind}_ap" in figures else None for kind in KINDS.values())
    return LoggedEvaluation(0.0, done, 0.0, box, mask, keypoint, figures, complete=True, iteration=done)


def _lines(text: str, notes: list[str]) -> Iterator[_Line]:
    """The objects of a text that have an iteration; a cut one, and what else there is, is skipped and counted."""
    decoder = json.JSONDecoder()
    position = skipped = 0
    while (position := text.find("{", position)) >= 0:
        try:
            values, position = decoder.raw_decode(text, position)
        except ValueError:
            position, values = position + 1, None
        line = _line(values) if isinstance(values, dict) else None
        if line:
            yield line
        else:
            skipped += 1
    if skipped:
        notes.append(f"{skipped} lines that are cut off or have no iteration were left out")


def _line(values: dict[str, Any]) -> _Line | None:
    iteration = values.pop("iteration", None)
    if not isinstance(iteration, int | float) or isinstance(iteration, bool) or iteration != int(iteration):
        return None
    others: dict[str, float | None] = {}
    figures: dict[str, dict[str, float | None]] = {}
    for name, value in values.items():
        number = measured(value) if isinstance(value, int | float) else None
        if figure := _FIGURE.fullmatch(name):
            key = f"{KINDS[figure['task']]}_{figure['name'].lower()}"
            figures.setdefault(figure["dataset"] or "", {})[key] = ap(number)
        elif not re.search(rf"(?:^|/)(?:{'|'.join(KINDS)})/", name):
            others[name] = number
    return _Line(int(iteration), others, figures)
