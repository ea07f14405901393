"""Pooling all levels in one operation is detectron2's ROIAlign, on CPU and by the kernels for GPUs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.roi_heads.keypoint_head import KRCNNConvDeconvUpsampleHead
from detectron2.structures import Boxes
from torch import Tensor, nn

from tests.builders.interpreted import Interpreter, interpreter
from tests.builders.rois import boxes, pyramid, torchvision_pool
from trainers.recipes import Recipe
from trainers.speedups import level_pooling
from trainers.speedups.apply import REPLACEMENTS, exchange, tune_model
from trainers.speedups.kernels import roi_align
from trainers.speedups.level_pooling import TritonPooler, level_of, pool, pool_boxes

NAN, INF = float("nan"), float("inf")
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64]
MAPS = [(6, 21), (3, 11), (2, 6), (1, 3), (1, 1)]
"""Feature maps of images of 24 x 84: of more than one tile, of a row of pixels, and of one pixel."""
EDGES = torch.tensor(
    [
        [0.0, 0, 84, 24],  # the whole image
        [0, 0, 0, 0],  # a slot without a box
        [10, 5, 10, 20],  # without a width
        [30, 20, 12, 4],  # inverted
        [30, 4, 12, 20],  # inverted along one axis
        [-30, -20, 20, 12],  # over a corner
        [70, 10, 130, 60],  # over the other
        [-90, -80, -60, -40],  # outside
        [200, 10, 230, 20],
        [-4, -4, 1, 1],  # the first sample on the border of what counts
        [80, 20, 84.5, 24.5],
        [40.1, 11.3, 40.2, 11.4],  # thinner than a pixel
        [3, 1, 77, 9],
    ]
)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreter]:
    with interpreter() as call:
        yield call


def maps(channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(channels)
    return [torch.randn(3, channels, *extents, generator=generator).to(dtype) for extents in MAPS]


def numbers_of(num: int) -> tuple[Tensor, Tensor]:
    """Images and levels in no order; the last image and, for a few boxes, a level have none."""
    generator = torch.Generator().manual_seed(num)
    return torch.randint(2, (num,), generator=generator), torch.randint(5, (num,), generator=generator)


def both_ways(features: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What torchvision pools, a direction, and the gradients of the features along it, in 32 bits."""
    inputs = [x.float().requires_grad_() for x in features]
    pooled = torchvision_pool(inputs, *arguments)
    direction = torch.linspace(-3, 3, pooled.numel()).view(pooled.shape).cos()
    gradients = torch.autograd.grad(pooled, inputs, direction, materialize_grads=True)
    return pooled.detach(), direction, list(gradients)


@pytest.mark.parametrize(("levels", "size", "ratio", "kind"), [(4, 7, 0, "ROIAlignV2"), (1, 14, 2, "ROIAlign")])
def test_values_and_gradients_are_those_of_detectron2s_pooler(levels: int, size: int, ratio: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(levels)
    settings = size, [1 / 2**level for level in range(2, 2 + levels)], ratio, kind
    features = pyramid(2, 3, 100, 140, levels)
    found = [boxes(30, 100, 140, generator), boxes(15, 100, 140, generator)]
    results = []
    for module in (ROIPooler(*settings), TritonPooler(*settings)):
        inputs = [level.clone().requires_grad_() for level in features]
        pooled = module(inputs, found)
        direction = torch.linspace(-1, 1, pooled.numel()).view(pooled.shape).cos()
        results.append((pooled, *torch.autograd.grad((pooled * direction).sum(), inputs)))
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("ratio", "aligned"), [(0, True), (2, True), (0, False)])
def test_edges_on_the_cpu_are_torchvisions(ratio: int, aligned: bool) -> None:
    image, level = numbers_of(len(EDGES))
    arguments = EDGES, image, level, SCALES, 3, ratio, aligned
    expected, direction, gradients = both_ways(maps(5), *arguments)
    inputs = [x.requires_grad_() for x in maps(5)]
    pooled = pool(inputs, EDGES, image.int(), level.int(), *arguments[3:])
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(list(torch.autograd.grad(pooled, inputs, direction)), gradients)


def test_boxes_that_are_not_finite_or_absurd_pool_zeros() -> None:
    pooler = ROIPooler(2, SCALES, 2, "ROIAlign")
    found = torch.tensor([[NAN, 0, 9, 9], [0, 0, INF, 9], [-INF, 0, 9, INF], [0, 0, 1e9, 9], [0, 0, 9, 9]])
    levels = level_of(pooler, found)
    assert levels.min() >= 0 and levels.max() < len(SCALES)
    inputs = [x.requires_grad_() for x in maps(2)]
    pooled = pool_boxes(pooler, inputs, found, torch.zeros(5, dtype=torch.int64))
    assert not pooled[:4].any() and pooled[4].all()
    pooled.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


def test_no_box_is_an_empty_result_and_no_gradient() -> None:
    inputs = [x.requires_grad_() for x in maps(2)]
    numbers = torch.zeros(0, dtype=torch.int64)
    pooled = pool(inputs, torch.zeros(0, 4), numbers, numbers, SCALES, 7, 0, True)
    assert pooled.shape == (0, 2, 7, 7)
    assert not any(gradient.any() for gradient in torch.autograd.grad(pooled.sum(), inputs))
    assert roi_align.pool(inputs, torch.zeros(0, 4), numbers, numbers, SCALES, 7, 0, True).shape == (0, 2, 7, 7)


def test_levels_are_detectron2s() -> None:
    pooler = ROIPooler(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, "ROIAlignV2")
    sides = torch.tensor([1.0, 60, 111.9, 112, 223, 224, 448, 2000, 0])
    found = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    assert level_of(pooler, found).tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 0]
    assert level_of(pooler, found).equal(assign_boxes_to_levels([Boxes(found)], 2, 5, 224, 4))


def test_the_operations_keep_torchs_rules() -> None:
    image, level = numbers_of(len(EDGES))
    arguments = EDGES, image, level, SCALES, 3, 0, True
    torch.library.opcheck(torch.ops.trainers.level_pooling.default, ([x.requires_grad_() for x in maps(2)], *arguments))
    heights, widths = zip(*MAPS, strict=True)
    backward = torch.ones(len(EDGES), 2, 3, 3), EDGES, image, level, 3, list(heights), list(widths), SCALES, 0, True
    torch.library.opcheck(torch.ops.trainers.level_pooling_backward.default, backward)


def test_autocast_rounds_values_to_16_bits_and_no_corner_of_a_box() -> None:
    inputs = [x.requires_grad_() for x in maps(4, torch.bfloat16)]
    found = torch.tensor([[10.3, 3.7, 79.9, 22.1]]).repeat(5, 1)
    numbers = torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pool(inputs, found, numbers % 3, numbers, SCALES, 3, 0, True)
        gradients = torch.autograd.grad(pooled.float().square().sum(), inputs)
    expected = torchvision_pool(inputs, found, numbers % 3, numbers, SCALES, 3, 0, True)
    assert pooled.dtype == torch.bfloat16 and pooled.equal(expected.bfloat16())
    assert all(gradient.dtype == torch.bfloat16 and gradient.any() for gradient in gradients)


def test_the_switch_exchanges_the_align_poolers_on_gpus_alone() -> None:
    def model() -> nn.ModuleDict:
        kinds = {"box": "ROIAlignV2", "rotated": "ROIAlignRotated"}
        poolers = {name: ROIPooler(7, [1 / 4], 0, kind) for name, kind in kinds.items()}
        return nn.ModuleDict(poolers | {"oblong": ROIPooler((7, 5), [1 / 4], 0, "ROIAlignV2")})

    on_gpu, on_cpu = model(), model()
    exchange(on_gpu, {"triton_pooling": REPLACEMENTS["triton_pooling"]})
    assert [type(module) for module in on_gpu.values()] == [TritonPooler, ROIPooler, ROIPooler]
    assert tune_model(on_cpu, Recipe(triton_pooling=True), torch.device("cpu")) == []
    assert level_pooling.MAX_LEVELS == roi_align.MAX_LEVELS
    assert [*inspect.signature(pool).parameters] == [*inspect.signature(roi_align.pool).parameters]
    numbers = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="knows 5 levels, got 10"):
        roi_align.pool(maps(2) * 2, torch.zeros(1, 4), numbers, numbers, SCALES * 2, 7, 0, True)


def test_keypoint_heads_view_what_is_pooled_in_nhwc_order() -> None:
    head = KRCNNConvDeconvUpsampleHead(ShapeSpec(channels=4, height=6, width=6), num_keypoints=3, conv_dims=[4])
    model = nn.ModuleDict({"pooler": ROIPooler(6, [1 / 4], 0, "ROIAlignV2"), "head": head})
    tune_model(model, Recipe(sparse_pooling=True), torch.device("cpu"))
    pooled = model["pooler"]([torch.randn(1, 4, 9, 9)], [Boxes(torch.tensor([[0.0, 0, 30, 30], [4, 4, 20, 20]]))])
    assert model["head"].layers(pooled).view(6, -1).shape == (6, 24 * 24)


@pytest.mark.parametrize(
    ("channels", "size", "ratio", "aligned", "dtype"),
    [
        (5, 2, 0, True, torch.float32),
        (5, 2, 2, True, torch.float32),
        (5, 3, 0, False, torch.float16),
        (1, 1, 2, False, torch.float32),
        (18, 7, 1, True, torch.float16),  # two rows of bins at once
        (3, 9, 1, True, torch.float32),  # one row of bins, padded to 16
    ],
)
def test_the_kernels_are_torchvisions_roi_align(
    interpreted: Interpreter, channels: int, size: int, ratio: int, aligned: bool, dtype: torch.dtype
) -> None:
    features = maps(channels, dtype)
    for x in features:
        x[2] = NAN  # no box is on the last image, and none may look beyond its own
    found = EDGES if ratio != 1 else EDGES[[0, 1, 3, 6]]
    numbers = numbers_of(len(found))
    settings = SCALES, size, ratio, aligned
    expected, direction, gradients = both_ways(features, found, *numbers, *settings)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-3}
    pooled = interpreted(roi_align.pool, features, found, *numbers, *settings)
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(pooled, expected.to(dtype), **tolerance)
    heights, widths = zip(*MAPS, strict=True)
    maps_and_settings = 3, list(heights), list(widths), SCALES, ratio, aligned
    ours = interpreted(roi_align.pool_backward, direction.to(dtype), found, *numbers, *maps_and_settings)
    torch.testing.assert_close(ours, [gradient.to(dtype) for gradient in gradients], **tolerance)


def test_the_forward_kernel_takes_bfloat16_any_memory_order_and_many_channels(interpreted: Interpreter) -> None:
    features = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in maps(300, torch.bfloat16)]
    arguments = EDGES[[0, 5]], torch.tensor([2, 0]), torch.tensor([2, 0]), SCALES, 2, 0, True
    pooled = interpreted(roi_align.pool, features, *arguments)
    expected = torchvision_pool(features, *arguments)
    torch.testing.assert_close(pooled.float(), expected, rtol=2**-7, atol=1e-6)  # the interpreter cuts, GPUs round


def test_the_backward_kernel_goes_through_more_boxes_than_it_looks_at_at_once(interpreted: Interpreter) -> None:
    corners = torch.rand(70, 2, generator=torch.Generator().manual_seed(0)) * 20
    found, numbers = torch.cat([corners, corners + 2], dim=1), torch.zeros(70, dtype=torch.int64)
    features = torch.zeros(1, 2, 6, 6, requires_grad=True)
    pooled = torchvision_pool([features], found, numbers, numbers, [1 / 4], 1, 1, True)
    grad = torch.tensor(0.1).expand(pooled.shape)  # as the gradient of a sum is: not contiguous
    ours = interpreted(roi_align.pool_backward, grad, found, numbers, numbers, 1, [6], [6], [1 / 4], 1, True)
    torch.testing.assert_close(ours, list(torch.autograd.grad(pooled, features, grad)))


def test_a_feature_map_that_no_box_touches_has_a_gradient_of_zeros(interpreted: Interpreter) -> None:
    numbers = torch.zeros(0, dtype=torch.int64)
    grad = torch.zeros(0, 2, 7, 7)
    ours = interpreted(roi_align.pool_backward, grad, torch.zeros(0, 4), numbers, numbers, 1, [5], [3], [1.0], 0, True)
    assert ours[0].shape == (1, 2, 5, 3) and not ours[0].any()
