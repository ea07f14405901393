"""Winograd's tiles, products over neighbourhoods and sparse gradients are convolutions, but for rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.layers import Conv2d
from torch import nn
from torch.nn.functional import conv2d

from benchmarks.training import demo
from trainers import mask_rcnn
from trainers.speedups import convolution
from trainers.speedups.apply import REPLACEMENTS, exchange
from trainers.speedups.convolution import SparseGradientConv2d, WinogradConv2d, three_by_three

WINOGRAD = {"winograd": REPLACEMENTS["winograd"]}

ROUNDING = 3e-5
"""Greatest difference to a convolution in 64 bits, as a share of the largest value."""


def differences(found: list[torch.Tensor], true: list[torch.Tensor]) -> list[float]:
    return [float((f - t).detach().abs().max() / t.detach().abs().max()) for f, t in zip(found, true, strict=True)]


def inputs(images: int, channels: int, outputs: int, height: int, width: int) -> list[torch.Tensor]:
    torch.manual_seed(height * width)
    x = torch.randn(images, channels, height, width).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(outputs, channels, 3, 3) / 30).contiguous(memory_format=torch.channels_last)
    return [tensor.requires_grad_() for tensor in (x, weight, torch.randn(outputs))]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("sparse_gradient", [True, False])
@pytest.mark.parametrize(
    ("method", "shape", "stride"),
    [
        ("tiles", (2, 128, 136, 23, 30), 1),
        ("tiles", (48, 64, 72, 3, 1), 1),
        ("rows", (3, 24, 40, 5, 3), 1),
        ("rows", (3, 24, 40, 7, 6), 2),
        ("torch", (2, 24, 40, 23, 30), 1),
    ],
)
def test_results_and_gradients_are_a_convolutions(
    method: str, shape: Any, stride: int, sparse_gradient: bool, with_bias: bool
) -> None:
    x, weight, bias = inputs(*shape)
    found = three_by_three(x, weight, bias if with_bias else None, stride, sparse_gradient)
    plain = method == "torch" and not sparse_gradient
    assert getattr(found.grad_fn, "method", None) == (None if plain else method)
    true = conv2d(x.double(), weight.double(), bias.double() if with_bias else None, stride, padding=1)
    assert found.shape == true.shape
    gradient = torch.randn(true.shape)
    wanted = [x, weight, bias] if with_bias else [x, weight]
    ours = torch.autograd.grad(found, wanted, gradient)
    theirs = torch.autograd.grad(true, wanted, gradient.double())
    assert max(differences([found, *ours], [true, *theirs])) < ROUNDING


@pytest.mark.parametrize("channels", [24, 128])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5])
def test_results_without_a_gradient_are_left_out_where_they_are_many(
    channels: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    by_rows = convolution._rows_backward

    def spy(pixels: Any, weight: Any, gradient: Any, stride: int, nonzero: torch.Tensor, needs_x: bool) -> Any:
        taken.append(len(nonzero))
        return by_rows(pixels, weight, gradient, stride, nonzero, needs_x)

    monkeypatch.setattr(convolution, "_rows_backward", spy)
    x, weight, bias = inputs(2, channels, channels, 20, 24)
    found = three_by_three(x, weight, bias, 1, sparse_gradient=True)
    sampled = torch.rand(2, 1, 20, 24) < share
    gradient = torch.randn(found.shape) * sampled
    ours = torch.autograd.grad(found, [x, weight, bias], gradient)
    assert taken == ([int(sampled.sum())] if share < convolution.MAX_SPARSE_SHARE else [])
    true = conv2d(x.double(), weight.double(), bias.double(), 1, padding=1)
    theirs = torch.autograd.grad(true, [x, weight, bias], gradient.double())
    if share:
        assert max(differences(list(ours), list(theirs))) < ROUNDING
    else:
        assert not any(tensor.any() for tensor in ours)


def test_an_empty_batch_is_an_empty_result() -> None:
    weight = torch.randn(5, 4, 3, 3, requires_grad=True)
    found = three_by_three(torch.zeros(0, 4, 14, 14), weight, None, 1, sparse_gradient=False)
    assert found.shape == (0, 5, 14, 14)
    found.sum().backward()  # type: ignore[no-untyped-call]


def test_a_model_keeps_its_weights_names_and_results() -> None:
    plan = demo(2, recipe="plain")
    model = mask_rcnn.build_detector(mask_rcnn.build_config(plan), plan).to(memory_format=torch.channels_last)
    names = list(model.state_dict())
    image = torch.randn(8, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    before = model.backbone(image)
    head_before = model.proposal_generator.rpn_head(list(before.values()))
    num_convolutions = sum(type(module) is Conv2d for module in model.modules())
    exchange(model, WINOGRAD)
    exchanged = {name: type(module) for name, module in model.named_modules() if isinstance(module, WinogradConv2d)}
    assert len(exchanged) == num_convolutions - 1  # all but the 7 x 7 of the stem
    assert list(model.state_dict()) == names
    after = model.backbone(image)
    head_after = model.proposal_generator.rpn_head(list(after.values()))
    sparse = {name for name, kind in exchanged.items() if kind is SparseGradientConv2d}
    assert sparse == {"proposal_generator.rpn_head.conv"}
    for name, features in before.items():
        assert max(differences([after[name]], [features])) < 1e-3, name  # of some twenty layers
    for ours, theirs in zip(head_after[0] + head_after[1], head_before[0] + head_before[1], strict=True):
        assert max(differences([ours], [theirs])) < 1e-3


def test_other_convolutions_stay_torchs() -> None:
    kept = [
        Conv2d(4, 4, 7, padding=3),
        Conv2d(4, 4, 3, padding=2, dilation=2),
        Conv2d(4, 4, 3, padding=1, groups=2),
        Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1),
    ]
    assert exchange(nn.Sequential(*kept), WINOGRAD) == []
