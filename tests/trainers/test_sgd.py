"""The tuned optimizers update weights as detectron2's does, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from torch import nn

from benchmarks.training import demo
from trainers import mask_rcnn
from trainers.recipes import FAST, PLAIN, REFERENCE, Recipe
from trainers.speedups.sgd import FusedSGD, build_tuned_optimizer, clip_each


@pytest.fixture(scope="module")
def cfg() -> CfgNode:
    found = mask_rcnn.build_config(demo(2))
    assert found.SOLVER.CLIP_GRADIENTS.ENABLED
    return found


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_gradients_clipped_at_once_are_those_clipped_one_by_one(norm_type: float) -> None:
    torch.manual_seed(0)
    shapes = [(3, 4, 5), (7,), (64, 128), (1,), (2, 2)]
    gradients = [torch.randn(shape) * 10**i for i, shape in enumerate(shapes)] + [torch.zeros(3)]
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
        nn.utils.clip_grad_norm_(parameter, 5.0, norm_type)
    clip_each(gradients, 5.0, norm_type)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None and parameter.grad.equal(gradient)
    clip_each([], 5.0, norm_type)


def updated(
    recipe: Recipe, cfg: CfgNode, earlier: dict[str, Any] | None = None
) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """Weights after three steps with given gradients, with the momenta of an earlier optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_tuned_optimizer(cfg, model, recipe)
    if earlier:
        optimizer.load_state_dict(copy.deepcopy(earlier))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape) * 20
        optimizer.step()
    return optimizer, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("recipe", [Recipe(batched_clipping=True), Recipe(fused_optimizer=True), REFERENCE, FAST])
def test_tuned_optimizers_update_weights_to_the_bit_and_go_on_from_each_others_momenta(
    cfg: CfgNode, recipe: Recipe
) -> None:
    plain, expected = updated(PLAIN, cfg)
    optimizer, weights = updated(recipe, cfg)
    assert all(ours.equal(theirs) for ours, theirs in zip(weights, expected, strict=True))
    # The momenta lie in another order where one of the two is channels-last; that must not mix them up.
    for first, second in ((plain, recipe), (optimizer, PLAIN)):
        _, expected = updated(PLAIN, cfg, plain.state_dict())
        _, weights = updated(second, cfg, first.state_dict())
        assert all(ours.equal(theirs) for ours, theirs in zip(weights, expected, strict=True))


def test_gradients_are_clipped_after_the_scaling_of_float16_is_undone(cfg: CfgNode) -> None:
    found = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = nn.Linear(16, 16)
        optimizer = build_tuned_optimizer(cfg, model, FAST)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(model(torch.ones(4, 16)).pow(2).sum()).backward()
        scaler.step(optimizer)
        found.append(model.weight.detach())
    assert found[0].equal(found[1])


@pytest.mark.parametrize("clipping", [{}, {"ENABLED": False}, {"CLIP_TYPE": "value", "CLIP_VALUE": 0.5}], ids=str)
def test_every_kind_of_clipping_is_honoured(cfg: CfgNode, clipping: dict[str, Any]) -> None:
    other = cfg.clone()
    other.defrost()
    other.SOLVER.CLIP_GRADIENTS.update(clipping)
    _, expected = updated(PLAIN, other)
    optimizer, weights = updated(REFERENCE, other)
    assert isinstance(optimizer, FusedSGD)
    assert all(ours.equal(theirs) for ours, theirs in zip(weights, expected, strict=True))
