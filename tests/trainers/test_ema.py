"""An average of the weights is torch's own, is evaluated in their place or as well, and survives a restart."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.builders.graphs import plan_of as plan_without_data
from tests.builders.graphs import train as train_loop
from tests.builders.training import last, plan_of, train
from trainers.contract.events import Evaluated, LoopStarted
from trainers.ema import HASTE, WeightAverage
from trainers.hooks import state_sha256


def changed(model: nn.Module) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn_like(weight) * weight.requires_grad
    model(torch.randn(8, 3))


def test_the_average_is_torchs_own_after_its_haste() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(requires_grad=False)
    average = WeightAverage(model, 0.5)
    changed(model)
    average.update()
    for name, value in model.state_dict().items():
        assert torch.equal(average.model.state_dict()[name], value), "begun with the weights after the first step"
    for _ in range(HASTE):
        changed(model)
        average.update()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    theirs.module.load_state_dict(average.model.state_dict())
    theirs.n_averaged += 1
    for _ in range(3):
        changed(model)
        average.update()
        theirs.update_parameters(model)
    for name, value in theirs.module.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(average.model.state_dict()[name], value), name
    counted = average.model.state_dict()["1.num_batches_tracked"]
    assert counted == model.state_dict()["1.num_batches_tracked"], "a number is copied"


def test_the_first_updates_forget_faster() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, 0.999)
    for value in (1.0, 11.0):
        nn.init.constant_(model.weight, value)
        average.update()
    assert average.model.weight.item() == pytest.approx(0.1 * 1.0 + 0.9 * 11.0)


def test_an_average_changes_nothing_of_the_training_and_is_the_same_under_graphs(tmp_path: Path) -> None:
    plan = plan_without_data(tmp_path)
    without = train_loop(plan, graphs=False)
    with_average = [train_loop(plan, graphs=on, ema_decay=0.9) for on in (False, True)]
    states = [each.state for each in with_average]
    averages = [state.pop("ema") for state in states]
    assert {state_sha256(state) for state in states} == {without.sha256}
    assert averages[0]["num_updates"] == 12 and state_sha256(averages[0]) == state_sha256(averages[1])
    assert state_sha256(averages[0]["model"]) != state_sha256(without.state["model"])


@pytest.mark.train
def test_a_rank_that_died_evaluates_the_average_that_it_would_have_had(tmp_path: Path) -> None:
    """Losses on the validation images tell weights and average apart where all AP are still 0."""
    tiny = plan_of(tmp_path, "retinanet")
    tiny = dataclasses.replace(
        tiny, validation_loss=True, overrides={**tiny.overrides, "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0}
    )

    def found(name: str, **fields: Any) -> list[Evaluated]:
        plan = dataclasses.replace(tiny, checkpoint_dir=str(tmp_path / name), **fields)
        return [event for event in train(plan) if isinstance(event, Evaluated)]

    weights, average = found("weights"), found("average", ema_decay=0.5)
    # The first of them in another process.
    concurrent = dataclasses.replace(tiny.recipe, overlapped_evaluation=True)
    both = found("both", recipe=concurrent, ema_decay=0.5, ema_both=True)
    assert [event.overlapped for event in both] == [True, False]
    for event, own, averaged in zip(both, weights, average, strict=True):
        assert event.validation_losses == own.validation_losses != averaged.validation_losses
        assert event.figures == own.figures | {f"ema_{name}": value for name, value in averaged.figures.items()}

    broken = dataclasses.replace(tiny, ema_decay=0.5, checkpoint_dir=str(tmp_path / "broken"))
    train(broken, die_at=8)
    again = train(broken, attempt=1)
    assert last(again, LoopStarted).iteration == 4
    repeated = [event for event in again if isinstance(event, Evaluated)]
    assert [event.figures for event in repeated] == [event.figures for event in average]
    assert [event.validation_losses for event in repeated] == [event.validation_losses for event in average]
