"""A frozen batch norm folded into its convolution changes nothing but rounding."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from trainers.speedups.apply import REPLACEMENTS, exchange, restore
from trainers.speedups.folded_norms import FoldedConv2d

TABLE = {"folded_norms": REPLACEMENTS["folded_norms"]}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def frozen_norm(channels: int, seed: int) -> FrozenBatchNorm2d:
    norm, generator = FrozenBatchNorm2d(channels), torch.Generator().manual_seed(seed)
    for values in norm.buffers():
        values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
    return norm


def network(seed: int = 0) -> nn.Sequential:
    """A frozen and two trained convolutions, the last of them strided, in groups and dilated."""
    torch.manual_seed(seed)
    layers = nn.Sequential(
        Conv2d(3, 8, 3, padding=1, bias=False, norm=frozen_norm(8, seed), activation=nn.functional.relu),
        Conv2d(8, 8, 1, bias=False, norm=frozen_norm(8, seed + 1), activation=nn.functional.relu),
        Conv2d(8, 4, 3, stride=2, groups=2, dilation=2, bias=False, norm=frozen_norm(4, seed + 2)),
    )
    layers[0].requires_grad_(False)
    return layers


def folded(plain: nn.Module) -> nn.Module:
    changed = copy.deepcopy(plain)
    exchange(changed, TABLE)
    return changed


def step(layers: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Results and gradients of a step."""
    layers.zero_grad()
    result = layers(IMAGES)
    result.float().square().mean().backward()
    return result, [weight.grad for weight in layers.parameters() if weight.grad is not None]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_and_gradients_are_equal_to_rounding(
    precision: torch.dtype, memory_format: torch.memory_format
) -> None:
    plain = network().to(memory_format=memory_format)
    fold = folded(plain)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        (expected, gradients), (result, mine) = step(plain), step(fold)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[precision]
    assert result.dtype == expected.dtype == precision
    assert (result - expected).norm() <= tolerance * expected.norm()
    assert len(mine) == len(gradients) == 2
    for gradient, reference in zip(mine, gradients, strict=True):
        assert gradient.dtype == torch.float32 and gradient.stride() == reference.stride()
        assert (gradient - reference).norm() <= tolerance * reference.norm()


def test_evaluation_is_detectron2s_bit_for_bit() -> None:
    plain = network()
    fold = folded(plain)
    step(fold)
    assert torch.equal(fold.eval()(IMAGES), plain.eval()(IMAGES))


def test_trained_weights_are_folded_in_every_step() -> None:
    plain = network()
    fold = folded(plain)
    for layers in (plain, fold):
        step(layers)
        with torch.no_grad():
            layers[1].weight.mul_(3.0)
    assert torch.allclose(step(fold)[0], step(plain)[0], atol=1e-6)


def test_loaded_weights_are_folded_in_place_and_the_state_dict_is_detectron2s() -> None:
    other, fold = network(seed=5), folded(network())
    step(fold)
    with torch.autocast("cpu", torch.bfloat16):
        step(fold)
    assert fold.state_dict().keys() == other.state_dict().keys()
    addresses = {id(tensor): tensor.data_ptr() for layer in fold for tensor in constants(layer)}
    fold.load_state_dict(other.state_dict())
    assert {id(tensor): tensor.data_ptr() for layer in fold for tensor in constants(layer)} == addresses
    assert len(addresses) == 2 * (3 + 2 + 2)
    assert torch.allclose(step(fold)[0], step(other)[0], atol=1e-6)


def constants(layer: nn.Module) -> list[Tensor]:
    """What a captured graph would read."""
    assert isinstance(layer, FoldedConv2d) and layer.folded is not None
    found = ((folded.scale, folded.shift, folded.weight) for folded in layer.folded.values())
    return [tensor for each in found for tensor in each if tensor is not None]


def test_other_convolutions_are_left_alone() -> None:
    layers = nn.Sequential(
        OrderedDict(
            plain=Conv2d(3, 3, 1),
            trained=Conv2d(3, 3, 1, bias=False, norm=nn.BatchNorm2d(3)),
            biased=Conv2d(3, 3, 1, norm=frozen_norm(3, 0)),
            frozen=Conv2d(3, 3, 1, bias=False, norm=frozen_norm(3, 0)),
        )
    )
    exchanged = exchange(layers, TABLE)
    assert [name for name, layer in layers.named_children() if type(layer) is FoldedConv2d] == ["frozen"]
    restore(exchanged)
    assert all(type(layer) is Conv2d for layer in layers)
