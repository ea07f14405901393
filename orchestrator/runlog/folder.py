"""Reads a run's folder back: its results, and the events of every trial where these are still there.

A folder that was copied elsewhere still has its old path in every plan, so a trial's files are searched in this folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from orchestrator.figures.logged_plan import Plan, plan_from_dict
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from trainers.contract.events import Event, RunStarted, TrialStarted


@dataclass(frozen=True, slots=True)
class TrialEvents:
    """A trial with its record and events."""

    label: str
    """Its name in figures; unique among those drawn together."""
    trial: TrialResult
    """Its record."""
    events: Sequence[Event]
    """Its events; empty where the outbox is gone."""
    plan: Plan | None
    """Its plan; None where the outbox is gone."""
    folder: Path
    """The folder of its files."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run of an experiment."""

    path: Path
    """Its folder."""
    result: ExperimentResult
    """Its results."""
    trials: list[TrialEvents]
    """Its trials."""
    experiment: dict[str, Any] = field(default_factory=dict)
    """The experiment's values as they were resolved; empty where the outbox is gone."""
    tracking: dict[str, Any] = field(default_factory=dict)
    """State of tracking: `experiment_id`, and MLflow's `runs` by trial (those of references by `reference/NAME`)."""


def read_run_folder(path: Path, result: ExperimentResult | None = None) -> RunFolder:
    """Reads a run's folder.

    Args:
        path: The folder.
        result: Its results, where they were read already.

    Raises:
        ValueError: It holds no results, or results that this version cannot read.
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
    trials = []
    for trial in result.trials:
        mine = events.get(trial.name, [])
        started = next((e for e in mine if isinstance(e, TrialStarted)), None)
        plan = plan_from_dict(started.plan) if started else None
        trials.append(TrialEvents(trial.name, trial, mine, plan, path / Path(trial.name).name))
    run_started = next((e for e in events.get("", []) if isinstance(e, RunStarted)), None)
    state = path / "tracking.json"
    return RunFolder(
        path=path,
        result=result,
        trials=trials,
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
