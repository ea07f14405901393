"""What may change in a run that is gone on with: `--resume RUN --set KEY=VALUE`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from orchestrator.experiment.reading import assign, flatten, parse_experiment
from orchestrator.experiment.spec import Experiment, SpecError
from orchestrator.files import without_credentials
from trainers.contract.plan import TrialPlan

SECTIONS = ("storage", "tracking", "faults", "resources")
"""Sections of an experiment that decide nothing of what is trained."""

SIDE_BY_SIDE = ("trials.concurrent", "trials.allow_shared_nodes")
"""Keys of another section that decide nothing of it either."""

TEXTS = ("description", "reference_rows", "reference_files")
"""What is shown with a run; it stays what it was when the run was begun."""

FIXED = {
    "storage.path": "the run stays in its folder",
    "storage.checkpoints": "checkpoints are looked for where they were written; a link can lead elsewhere",
    "resources.device": "trials are named after it",
}
"""Keys of these sections that may not change, and why."""

PLANNED = {
    "storage.keep_checkpoints": ("keep_checkpoints",),
    "tracking.log_model": ("keep_best",),
    "faults.timeouts": ("timeouts",),
    "faults.on_storage_failure": ("survive_storage",),
    "faults.mtbf_hours": ("mtbf_hours",),
    "resources.cpus_per_worker": ("cpus_per_worker", "most_loader_workers"),
    "resources.loader_workers": ("loader_workers", "most_loader_workers"),
    "resources.evaluation": ("evaluation_gpus", "evaluation_cpus"),
    "resources.num_nodes": ("num_nodes",),
    "trials.concurrent": ("own_nodes",),
    "trials.allow_shared_nodes": ("own_nodes",),
    "resources.min_workers": ("min_workers",),
    "resources.resize_after_seconds": ("resize_after_seconds",),
    "resources.price_per_accelerator_hour": ("price_per_accelerator_hour",),
    "resources.price_per_kwh": ("price_per_kwh",),
    "resources.carbon_grams_per_kwh": ("carbon_grams_per_kwh",),
}
"""Fields of a trial's plan that are made of a key, or of what is below it."""

PERIODS = ("checkpoint_period", "auto_checkpoints")
"""Fields of a plan's solver that are made of `storage.checkpoint_period` and `storage.checkpoint_period_iterations`."""


def change(experiment: Experiment, assignments: Sequence[str]) -> tuple[Experiment, dict[str, Any]]:
    """The experiment with `--set KEY=VALUE` applied to it, and what became different, by dotted key.

    Raises:
        SpecError: A key may not change in a run that is gone on with, is not known, or its value is not allowed.
    """
    values = experiment.model_dump(mode="json")
    before = dict(flatten(values))
    for assignment in assignments:
        key = assignment.partition("=")[0]
        if not _may_change(key):
            what = f"{', '.join((*SECTIONS, SIDE_BY_SIDE[0]))} and {SIDE_BY_SIDE[1]}"
            raise SpecError(f"--set {key}: it may not change in a run that is gone on with; what may: {what}")
        assign(values, assignment)
    changed = parse_experiment(values, where="--resume")
    after = dict(flatten(changed.model_dump(mode="json")))
    # Another password of the same address is used, and no change to tell of.
    changes = {key: after.get(key) for key in {**before, **after} if _shown(before.get(key)) != _shown(after.get(key))}
    for key in changes:
        if key in FIXED:
            raise SpecError(f"--set {key}: it may not change in a run that is gone on with: {FIXED[key]}")
    return changed, {key: _shown(value) for key, value in changes.items()}


def assignments_between(begun: Experiment, given: Experiment) -> list[str]:
    """What an experiment file changes of a run that was begun with it earlier, as `change` takes it.

    Raises:
        SpecError: It changes something that decides what is trained.
    """
    before, after = (dict(flatten(each.model_dump(mode="json"))) for each in (begun, given))
    changed = [key for key in {**before, **after} if before.get(key, ...) != after.get(key, ...)]
    if deciding := [key for key in changed if not _may_change(key) and key.split(".")[0] not in TEXTS]:
        was = f"{deciding[0]} is {before.get(deciding[0])!r} there and {after.get(deciding[0])!r} here"
        others = f", and {len(deciding) - 1} more differ" if len(deciding) > 1 else ""
        raise SpecError(f"it holds a run of another experiment: {was}{others}; name another --output")
    # A key that is gone is below one that has become null.
    return [f"{key}={json.dumps(after[key])}" for key in changed if key in after and _may_change(key)]


def with_changes(begun: TrialPlan, now: TrialPlan, changes: dict[str, Any]) -> TrialPlan:
    """The plan of a trial as it was begun, with what changed since.

    Args:
        begun: The plan that it was begun with.
        now: The plan that the changed experiment has for it.
        changes: What changed in all starts since, by dotted key.
    """
    fields: dict[str, Any] = {}
    for key in changes:
        if key.startswith("storage.checkpoint_period"):
            periods = {name: getattr(now.solver, name) for name in PERIODS}
            fields["solver"] = dataclasses.replace(begun.solver, **periods)
        for name, made in PLANNED.items():
            if f"{key}.".startswith(f"{name}."):
                fields |= {field: getattr(now, field) for field in made}
    return dataclasses.replace(begun, **fields)


def _may_change(key: str) -> bool:
    return key.split(".")[0] in SECTIONS or key in SIDE_BY_SIDE


def _shown(value: Any) -> Any:
    return without_credentials(value) if isinstance(value, str) else value
