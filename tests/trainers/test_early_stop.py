"""A rank ends when nothing improves any more: at the same evaluation if it was killed before, with the best weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.builders.training import last, plan_of, train
from trainers.contract.events import CheckpointSaved, Evaluated, Event, LoopFinished, StepsDone
from trainers.contract.plan import TrialPlan
from trainers.evaluation import Evaluator, Scores
from trainers.evaluation_hook import EvaluationHook

pytestmark = pytest.mark.train

AP = {2: 30.0, 4: 31.0, 6: 36.0, 8: 34.0, 10: 35.2, 12: 35.4, 14: 50.0}
"""Box AP by iteration: the last improvement by 1 before 14 is at 6."""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrialPlan:
    """Evaluates every 2 of 16 iterations, finds `AP`, and gives up after three evaluations; checkpoints after 10."""

    def find(_: Evaluator, __: Any, iteration: int) -> Scores:
        return Scores({"box_ap": AP[iteration]}, 0.0, None, {})

    monkeypatch.setattr(Evaluator, "run", find)
    made = plan_of(tmp_path, "retinanet")
    solver = dataclasses.replace(made.solver, max_iter=16, eval_period=2, checkpoint_period=10)
    return dataclasses.replace(made, solver=solver, patience=3, min_improvement=1.0, keep_best=True, keep_checkpoints=1)


def evaluated(events: list[Event]) -> list[int]:
    return [event.iteration for event in events if isinstance(event, Evaluated)]


def test_training_ends_after_as_many_evaluations_in_vain_and_keeps_the_best_checkpoint(plan: TrialPlan) -> None:
    events = train(plan)
    finished = last(events, LoopFinished)
    assert (finished.reason, finished.iteration, evaluated(events)) == ("patience", 12, [2, 4, 6, 8, 10, 12])
    assert [event.iteration for event in events if isinstance(event, CheckpointSaved)] == [2, 4, 6, 8, 10, 12]
    kept = [json.loads(path.read_text()) for path in Path(plan.checkpoint_dir).glob("*/manifest.json")]
    assert {manifest["iteration"]: manifest["score"] for manifest in kept} == {6: 36.0, 12: 35.4}
    assert not [event for event in train(plan, attempt=1) if isinstance(event, StepsDone | Evaluated)], "it was done"


@pytest.mark.parametrize("die_at", [6, 9, 11])
def test_a_rank_that_died_counts_on(plan: TrialPlan, die_at: int) -> None:
    plan = dataclasses.replace(plan, log_period=1)
    first = train(plan, die_at=die_at)
    assert not [event for event in first if isinstance(event, LoopFinished)]
    finished = last(train(plan, attempt=1), LoopFinished)
    assert (finished.reason, finished.iteration) == ("patience", 12)


def test_a_stop_just_before_the_last_evaluation_ends_at_the_same_one(plan: TrialPlan) -> None:
    first = train(plan, stop_at=12)
    assert last(first, LoopFinished).reason == "interrupted" and evaluated(first)[-1] == 10
    second = train(plan, attempt=1)
    assert (last(second, LoopFinished).reason, evaluated(second)) == ("patience", [12])
    manifest = json.loads(Path(plan.checkpoint_dir, "iter_0000012", "manifest.json").read_text())
    assert manifest["score"] == 35.4, "the checkpoint was taken before it was evaluated"


def test_the_end_of_the_schedule_is_no_early_stop(plan: TrialPlan) -> None:
    solver = dataclasses.replace(plan.solver, max_iter=12, evaluate_at_end=True)
    assert last(train(dataclasses.replace(plan, solver=solver)), LoopFinished).reason == "max_iter"


def test_a_target_that_is_met_in_vain_counts_first(plan: TrialPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AP, 12, 36.9)
    plan = dataclasses.replace(plan, target_box_ap=36.9, stop_at_target=True)
    assert last(train(plan), LoopFinished).reason == "target"


def test_a_concurrent_evaluation_in_vain_ends_training_when_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is known at the end of the next window here, however long it takes."""
    known = EvaluationHook.wanted_end

    def wait(hook: EvaluationHook) -> Any:
        assert hook.overlap is not None
        hook.overlap.wait()
        return known(hook)

    monkeypatch.setattr(EvaluationHook, "wanted_end", wait)
    plan = plan_of(tmp_path, "retinanet")
    solver = dataclasses.replace(plan.solver, max_iter=16, eval_period=2)
    recipe = dataclasses.replace(plan.recipe, overlapped_evaluation=True)
    plan = dataclasses.replace(plan, solver=solver, recipe=recipe, patience=1, min_improvement=100.0, keep_best=True)
    events = train(plan)
    finished = last(events, LoopFinished)
    assert (finished.reason, finished.iteration, evaluated(events)) == ("patience", 6, [2, 4])
    assert last(events, CheckpointSaved).iteration == 6
    assert not [event for event in train(plan, attempt=1) if isinstance(event, StepsDone | Evaluated)]
