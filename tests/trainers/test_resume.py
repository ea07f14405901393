"""A rank that was stopped or that died goes on bit for bit as if it had not, whatever the model keeps to itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.generate import generate
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.spec import Experiment
from tests.conftest import TINY_OVERRIDES, tiny_experiment
from trainers.contract.channel import Channel, Command, Placement
from trainers.contract.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    LoopFinished,
    LoopStarted,
    StepsDone,
    WorkerFailed,
)
from trainers.contract.plan import Attempt, TrialPlan
from trainers.faults import VARIABLE, Fault, fired
from trainers.rank import Rank

pytestmark = pytest.mark.train

RETINANET = {key: value for key, value in TINY_OVERRIDES.items() if not key.startswith(("MODEL.ROI", "MODEL.RPN"))} | {
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 50,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
}
MODELS: dict[str, dict[str, Any]] = {
    "mask_rcnn": {"weights": "", "overrides": TINY_OVERRIDES},
    "retinanet": {
        "weights": "",
        "config": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "overrides": RETINANET,
    },
}


class Died(BaseException):
    """Ends a rank as a signal would: nothing of it may be caught."""


def plan_of(folder: Path, model: str) -> TrialPlan:
    values = tiny_experiment(
        model=MODELS[model],
        protocol={"iterations": 12, "eval_period_iterations": 6, "warmup_iterations": 2},
        storage={"checkpoint_period_iterations": 4},
    )
    experiment = Experiment.model_validate(values)
    assert experiment.data.generated is not None
    generate(folder / "data", **experiment.data.generated.model_dump())
    (plan,) = expand(experiment, Hardware(num_cpus=1), str(folder / "run"), folder / "data")
    return plan


def train(plan: TrialPlan, attempt: int = 0, stop_at: int | None = None, die_at: int | None = None) -> list[Event]:
    """Trains in this process; asked to stop a window before `stop_at`, dead at the end of the window of `die_at`."""
    events: list[Event] = []
    command: list[Command] = ["run"]

    def push(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepsDone) and stop_at is not None and event.iteration == stop_at - 2:
            command[0] = rank.command = "stop"
        if isinstance(event, StepsDone) and event.iteration == die_at:
            raise Died

    channel = Channel(push=push, beat=lambda heartbeat: command[0])
    rank = Rank(plan, Attempt(attempt), Placement(0, 1, 0, 1, "here"), channel)
    try:
        rank.train(0.0)
    except Died:
        assert die_at is not None
    return events


def last(events: list[Event], kind: type[Any]) -> Any:
    return [event for event in events if isinstance(event, kind)][-1]


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


def test_an_evaluation_that_a_stop_left_out_is_made_at_the_next_start(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "mask_rcnn")
    first = train(plan, stop_at=6)
    assert last(first, LoopFinished).reason == "interrupted" and last(first, CheckpointSaved).iteration == 6
    assert not [event for event in first if isinstance(event, Evaluated)]
    second = train(plan, attempt=1)
    assert [event.iteration for event in second if isinstance(event, Evaluated)] == [6, 12]


def test_what_detectron2_refuses_as_nan_is_told_as_such_with_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults_file = tmp_path / "faults.json"
    faults_file.write_text(json.dumps([dataclasses.asdict(Fault("nan", rank=0, iteration=5))]))
    monkeypatch.setenv(VARIABLE, str(faults_file))
    events: list[Event] = []
    rank = Rank(
        plan_of(tmp_path, "mask_rcnn"),
        Attempt(),
        Placement(0, 1, 0, 1, "here"),
        Channel(push=events.append, beat=lambda heartbeat: "run"),
    )
    with pytest.raises(FloatingPointError):
        rank.train(0.0)
    assert fired(faults_file)
    failure = last(events, WorkerFailed)
    assert (failure.failure, failure.iteration, len(failure.image_files)) == ("not_finite", 5, 4)
    assert last(events, CheckpointSaved).iteration == 4


def test_a_trial_that_was_done_does_nothing_more(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "mask_rcnn")
    first, second = train(plan), train(plan, attempt=1)
    assert last(second, LoopFinished).state_sha256 == last(first, LoopFinished).state_sha256
    assert not [event for event in second if isinstance(event, StepsDone)]
