"""Reads AP over iterations from detectron2's metrics.json, where that is all that is left of a run.

Its `time` is smoothed over 20 steps and it has no dates, so it gives neither a throughput nor a time to train.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.replay.evaluations import KINDS, LoggedEvaluation
from orchestrator.replay.messages import ReplayError
from orchestrator.replay.runs import Launch, LoggedRun, Progress
from trainers.contract.events import measured


def read_metrics(path: Path) -> LoggedRun:
    """Reads the run of a metrics.json.

    Raises:
        ReplayError: The file cannot be read, or no line of it is a JSON object with an iteration.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ReplayError(f"{path}: cannot be read: {error}") from error
    launch = Launch(0.0, 0.0, first_iteration=0, loop_started=0.0)
    for line in lines:
        values = _values(line)
        if values is None:
            continue
        done = int(values["iteration"]) + 1
        if launch.progress and done < launch.progress[-1].iteration:
            raise ReplayError(f"{path}: it mixes runs: iteration {done} comes after {launch.progress[-1].iteration}")
        losses = {name: value for name, value in values.items() if "loss" in name and value is not None}
        if losses and not (launch.progress and done == launch.progress[-1].iteration):
            launch.progress.append(Progress(done, None, losses, values.get("lr"), None, values.get("data_time"), None))
        figures = {
            f"{KINDS[name[:4]]}_{name[5:].lower()}": value
            for name, value in values.items()
            if name.startswith(("bbox/", "segm/")) and "-" not in name
        }
        if figures:
            mask_scored = 0.0 if "mask_ap" in figures else None
            launch.evaluations.append(LoggedEvaluation(0.0, done, 0.0, 0.0, mask_scored, figures))
    if not launch.progress:
        raise ReplayError(f"{path}: not detectron2's metrics.json: no line with an iteration and a loss")
    note = "metrics.json has no dates and no batch size: only its AP can be read"
    return LoggedRun(path, [launch], [note], dated=False)


def _values(line: str) -> dict[str, Any] | None:
    """The numbers of a line; None where it does not have this format (the last one may be cut off)."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("iteration"), int):
        return None
    return {name: measured(value) for name, value in values.items() if isinstance(value, int | float)} | {
        "iteration": values["iteration"]
    }
