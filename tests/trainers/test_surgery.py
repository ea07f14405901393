"""Classes of modules are exchanged and put back; weights, hooks and lists of modules stay."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
from detectron2.layers import Conv2d
from torch import nn

from benchmarks.training import demo
from trainers import mask_rcnn
from trainers.recipes import FAST
from trainers.speedups.apply import REPLACEMENTS, exchange, restore, tune_model
from trainers.speedups.convolution import WinogradConv2d


class Doubled(nn.Linear):
    """Computes twice what its base class does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "left_out",
    [{"triton_pooling", "fixed_shapes", "folded_norms"}, {"sparse_pooling", "batched_proposals", "winograd"}],
    ids=["CPU", "GPU"],
)
def test_a_restored_model_is_the_original_one(left_out: set[str]) -> None:
    plan = demo(2, recipe="plain")
    model = mask_rcnn.build_detector(mask_rcnn.build_config(plan), plan)
    modules, kinds = list(model.modules()), [type(module) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    tables = {switch: table for switch, table in REPLACEMENTS.items() if switch not in left_out}
    exchanged = exchange(model, tables)
    assert len(exchanged) == sum(type(m) is not k for m, k in zip(modules, kinds, strict=True)) > 4
    assert list(model.state_dict()) == list(state)
    restore(exchanged)
    assert all(module is before for module, before in zip(model.modules(), modules, strict=True))
    assert [type(module) for module in model.modules()] == kinds
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())


def test_an_exchanged_module_keeps_its_weights_hooks_and_places() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "again": nn.Identity()})
    layer = model["layer"]
    model["again"].extra = [layer]  # type: ignore[assignment]
    called: list[int] = []
    layer.register_forward_hook(lambda *_: called.append(1))
    expected = 2 * layer(torch.ones(1, 2))
    exchange(model, {"doubling": {nn.Linear: Doubled}})
    assert model["again"].extra[0] is model["layer"] is layer  # type: ignore[index]
    assert layer(torch.ones(1, 2)).equal(expected)
    assert called == [1, 1]


def test_a_subclass_that_the_table_does_not_name_is_left_alone_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert exchange(nn.Sequential(Doubled(2, 2)), {"doubling": {nn.Linear: Doubled}}) == []
    assert "doubling: has no effect" in caplog.text
    exchange(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {"doubling": {nn.Linear: Doubled}})
    assert "doubling: the model now has 2 Doubled." in caplog.text


def test_two_switches_may_not_exchange_the_same_class() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="both doubling and tripling exchange Linear"):
        exchange(model, {"doubling": {nn.Linear: Doubled}, "tripling": {nn.Linear: Doubled}})
    assert type(model[0]) is nn.Linear


def test_a_replacement_must_be_a_subclass() -> None:
    with pytest.raises(TypeError, match="Doubled is not a subclass of ReLU"):
        exchange(nn.Sequential(nn.ReLU()), {"doubling": {nn.ReLU: Doubled}})


def test_switches_for_cpus_have_no_effect_on_gpus() -> None:
    for device, exchanged in (("cpu", 1), ("cuda", 0)):
        model = nn.Sequential(Conv2d(4, 4, 3, padding=1))
        recipe = dataclasses.replace(FAST, precision="fp32")
        assert len(tune_model(model, recipe, torch.device(device))) == exchanged
        assert (type(model[0]) is WinogradConv2d) == (device == "cpu")
