"""Training with one recipe or another in this process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.ours import train_in_process
from orchestrator.data.generate import generate
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from tests.builders.experiments import tiny_experiment
from trainers.contract.events import Evaluated, Event, LoopFinished
from trainers.contract.plan import TrialPlan
from trainers.recipes import Recipe


def plan_of(folder: Path, recipe: Recipe, name: str) -> TrialPlan:
    experiment = parse_experiment(tiny_experiment(), "test")
    generated = experiment.data.generated
    assert generated is not None
    generate(folder / "data", num_train=16, num_val=4, size=64, num_classes=generated.num_classes, num_processes=1)
    plan = expand(experiment, Hardware(), str(folder / name), folder / "data")[0]
    return dataclasses.replace(plan, recipe=recipe, trial_dir=str(folder / name))


def train(plan: TrialPlan) -> tuple[str, dict[str, float | None]]:
    """The hash of the trained state, and the last evaluation's figures."""
    events: list[Event] = []
    train_in_process(plan, events.append, before_step=lambda: None)
    hashes = [event.state_sha256 for event in events if isinstance(event, LoopFinished)]
    figures = [event.figures for event in events if isinstance(event, Evaluated)]
    return hashes[0], figures[-1]
