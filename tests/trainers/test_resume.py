"""A rank that was stopped or that died goes on bit for bit as if it had not, whatever the model keeps to itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.builders.training import MODELS, last, plan_of, train
from tests.builders.waiting import wait_for
from trainers.contract.channel import Channel, Placement
from trainers.contract.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    LoopFinished,
    LoopStarted,
    StepsDone,
    WorkerFailed,
)
from trainers.faults import VARIABLE, Fault, fired
from trainers.rank import Rank
from trainers.recipes import Precision

pytestmark = pytest.mark.train


@pytest.mark.parametrize("model", MODELS)
def test_a_rank_that_died_twice_ends_with_the_weights_of_one_that_did_not(tmp_path: Path, model: str) -> None:
    plan = plan_of(tmp_path, model)
    healthy = train(plan)
    broken = dataclasses.replace(plan, checkpoint_dir=str(tmp_path / "broken"))
    assert not [event for event in train(broken, die_at=6) if isinstance(event, LoopFinished)]
    second = train(broken, attempt=1, die_at=10)
    third = train(broken, attempt=2)
    assert [last(events, LoopStarted).iteration for events in (second, third)] == [4, 8]
    assert last(third, LoopFinished) and last(healthy, LoopFinished)
    assert last(third, LoopFinished).state_sha256 == last(healthy, LoopFinished).state_sha256
    assert last(third, Evaluated).figures == last(healthy, Evaluated).figures
    losses = {event.iteration: event.losses for event in [*second, *third] if isinstance(event, StepsDone)}
    expected = {event.iteration: event.losses for event in healthy if isinstance(event, StepsDone)}
    assert losses == {iteration: expected[iteration] for iteration in losses}


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")  # the scaler skips a first step
@pytest.mark.parametrize(("before", "after"), [("fp32", "amp"), ("amp", "fp32")])
def test_a_trial_continues_in_another_precision(tmp_path: Path, before: Precision, after: Precision) -> None:
    plan = plan_of(tmp_path, "mask_rcnn")
    first, second = (
        dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, precision=each)) for each in (before, after)
    )
    train(first, die_at=6)
    events = train(second, attempt=1)
    assert (last(events, LoopStarted).iteration, last(events, LoopStarted).numerics["precision"]) == (4, after)
    assert last(events, LoopFinished).iteration == 12


def test_an_evaluation_that_a_stop_left_out_is_made_at_the_next_start(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "mask_rcnn")
    first = train(plan, stop_at=6)
    assert last(first, LoopFinished).reason == "interrupted" and last(first, CheckpointSaved).iteration == 6
    assert not [event for event in first if isinstance(event, Evaluated)]
    second = train(plan, attempt=1)
    assert [event.iteration for event in second if isinstance(event, Evaluated)] == [6, 12]


def test_what_detectron2_refuses_as_nan_is_reported_as_nan_with_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults_file = tmp_path / "faults.json"
    faults_file.write_text(json.dumps([dataclasses.asdict(Fault("nan", rank=0, iteration=5))]))
    monkeypatch.setenv(VARIABLE, str(faults_file))
    events: list[Event] = []
    rank = Rank(
        plan_of(tmp_path, "mask_rcnn"),
        0,
        Placement(0, 1, 0, 1, "here"),
        Channel(push=events.append, beat=lambda heartbeat: "run"),
    )
    with pytest.raises(FloatingPointError):
        rank.train(0.0)
    assert fired(faults_file)
    failure = last(events, WorkerFailed)
    assert (failure.failure, failure.iteration, len(failure.image_files)) == ("not_finite", 5, 4)
    wait_for(lambda: any(isinstance(event, CheckpointSaved) for event in events))  # it was being written meanwhile
    assert last(events, CheckpointSaved).iteration == 4


def test_a_trial_that_was_done_does_nothing_more(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "mask_rcnn")
    first, second = train(plan), train(plan, attempt=1)
    assert last(second, LoopFinished).state_sha256 == last(first, LoopFinished).state_sha256
    assert not [event for event in second if isinstance(event, StepsDone)]


def test_an_error_in_a_processs_settings_is_sent_as_the_failure_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError("no settings")

    monkeypatch.setattr("trainers.rank.process_settings", refuse)
    events: list[Event] = []
    rank = Rank(
        plan_of(tmp_path, "mask_rcnn"), 0, Placement(0, 1, 0, 1, "here"), Channel(events.append, lambda _: "run")
    )
    with pytest.raises(MemoryError):
        rank.train(0.0)
    assert last(events, WorkerFailed).failure == "out_of_memory"
