"""Pooling by a sparse product is ROIAlign, but for the rounding of sums."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import nn

from tests.builders.rois import boxes, pyramid
from trainers.speedups.apply import REPLACEMENTS, exchange
from trainers.speedups.roi_pooling import SparsePooler


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize(
    ("size", "sampling_ratio", "kind"), [(7, 0, "ROIAlignV2"), (14, 0, "ROIAlignV2"), (7, 2, "ROIAlign")]
)
def test_values_and_gradients_are_roi_aligns(
    channels_last: bool, levels: int, size: int, sampling_ratio: int, kind: str
) -> None:
    generator = torch.Generator().manual_seed(levels + size)
    torch.manual_seed(size)
    settings = size, [1 / 2**level for level in range(2, 2 + levels)], sampling_ratio, kind
    features = pyramid(2, 5, 150, 210, levels)
    if channels_last:
        features = [level.contiguous(memory_format=torch.channels_last) for level in features]
    found = [boxes(60, 150, 210, generator), boxes(33, 150, 210, generator)]
    results = []
    for module in (ROIPooler(*settings), SparsePooler(*settings)):
        inputs = [level.clone().requires_grad_() for level in features]
        pooled = module(inputs, found)
        assert pooled.shape == (93, 5, size, size)
        direction = torch.linspace(-1, 1, pooled.numel()).view(pooled.shape).cos()
        results.append((pooled, *torch.autograd.grad((pooled * direction).sum(), inputs)))
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


def test_no_box_is_an_empty_result() -> None:
    pooler = SparsePooler(7, [1 / 4, 1 / 8], 0, "ROIAlignV2")
    features = [level.requires_grad_() for level in pyramid(1, 3, 64, 64, 2)]
    assert pooler(features, [Boxes(torch.zeros(0, 4))]).shape == (0, 3, 7, 7)
    outside = pooler(features, [Boxes(torch.tensor([[500.0, 500, 600, 600], [5.0, 5, 5, 5]]))])
    assert outside.shape == (2, 3, 7, 7) and not outside.any()
    outside.sum().backward()
    assert all(level.grad is not None and not level.grad.any() for level in features)


def test_the_same_batch_gives_the_same_gradients_whatever_the_threads() -> None:
    pooler = SparsePooler(7, [1 / 4], 0, "ROIAlignV2")
    features, found = torch.randn(1, 8, 40, 40), [boxes(200, 160, 160, torch.Generator().manual_seed(0))]
    gradients = []
    threads = torch.get_num_threads()
    for number in (1, 2, 1):
        torch.set_num_threads(number)
        inputs = features.clone().requires_grad_()
        pooler([inputs], found).square().sum().backward()
        assert inputs.grad is not None
        gradients.append(inputs.grad)
    torch.set_num_threads(threads)
    assert gradients[0].equal(gradients[1]) and gradients[0].equal(gradients[2])


def test_half_precision_features_come_back_in_half_precision() -> None:
    pooler = SparsePooler(7, [1 / 4], 0, "ROIAlignV2")
    features = torch.randn(1, 8, 40, 40).bfloat16().requires_grad_()
    pooled = pooler([features], [Boxes(torch.tensor([[3.0, 4, 90, 80]]))])
    pooled.sum().backward()
    assert pooled.dtype == torch.bfloat16
    assert features.grad is not None and features.grad.dtype == torch.bfloat16


def test_the_switch_exchanges_the_align_poolers_and_nothing_else() -> None:
    model = nn.ModuleDict(
        {
            "box": ROIPooler(7, [1 / 4], 0, "ROIAlignV2"),
            "rotated": ROIPooler(7, [1 / 4], 0, "ROIAlignRotated"),
            "other": nn.Linear(2, 2),
        }
    )
    keys = list(model.state_dict())
    exchange(model, {"sparse_pooling": REPLACEMENTS["sparse_pooling"]})
    assert type(model["box"]) is SparsePooler and type(model["rotated"]) is ROIPooler
    assert list(model.state_dict()) == keys
