"""A run's folder, read back: its results, and the events of every trial where they are still there.

The trap it protects against: a folder that was copied elsewhere still names its old place in every plan, so what a
trial left is looked for in this folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from trainers.contract.events import Event, RunStarted, TrialStarted
from trainers.contract.plan import TrialPlan


@dataclass(frozen=True, slots=True)
class TrialEvents:
    """A trial with what is known of its course.

    Attributes:
        label: What it is called in figures; unique among those drawn together.
        trial: Its record.
        events: Its events; empty where the outbox is gone.
        plan: Its plan; None likewise.
        folder: What it left.
    """

    label: str
    trial: TrialResult
    events: Sequence[Event]
    plan: TrialPlan | None
    folder: Path


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run of an experiment.

    Attributes:
        path: Its folder.
        result: Its results.
        stories: Its trials.
        experiment: The experiment's values as they were resolved; empty where the outbox is gone.
        tracking: What tracking knows: `experiment_id`, and the MLflow runs by trial (the references' as
            `reference/NAME`).
    """

    path: Path
    result: ExperimentResult
    stories: list[TrialEvents]
    experiment: dict[str, Any] = field(default_factory=dict)
    tracking: dict[str, Any] = field(default_factory=dict)


def read_run_folder(path: Path, result: ExperimentResult | None = None) -> RunFolder:
    """Reads a run's folder.

    Args:
        path: The folder.
        result: Its results, where they are at hand already.

    Raises:
        ValueError: It holds no results, or such as this version cannot read.
    """
    if result is None:
        try:
            result = ExperimentResult.model_validate_json((path / "results.json").read_bytes())
        except OSError as error:
            raise ValueError(f"{path}: not a run's folder: {error}") from error
        except ValidationError as error:
            raise ValueError(f"{path}/results.json: not results that this version reads: {error}") from error
    events: dict[str, list[Event]] = {}
    for event, _ in Outbox(path / FILE_NAME).read():
        events.setdefault(event.trial, []).append(event)
    stories = []
    for trial in result.trials:
        mine = events.get(trial.name, [])
        started = next((e for e in mine if isinstance(e, TrialStarted)), None)
        plan = TrialPlan.from_dict(started.plan) if started else None
        stories.append(TrialEvents(trial.name, trial, mine, plan, path / Path(trial.name).name))
    run_started = next((e for e in events.get("", []) if isinstance(e, RunStarted)), None)
    state = path / "tracking.json"
    return RunFolder(
        path=path,
        result=result,
        stories=stories,
        experiment=run_started.experiment if run_started else {},
        tracking=orjson.loads(state.read_bytes()) if state.exists() else {},
    )


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by their dotted keys, each with the prefix in front."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
