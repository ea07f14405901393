"""Boxes of many lists are suppressed as torchvision does it, on CPU and by the kernel for GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.builders.compiled import HOPPER, compiled, float_operations, resources
from tests.builders.interpreted import Interpreter, interpreter
from trainers.speedups.batched_nms import nms_keep
from trainers.speedups.kernels import nms as kernels

NAN = float("nan")


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreter]:
    with interpreter() as call:
        yield call


def lists_of_boxes(num_boxes: int, kind: str) -> tuple[Tensor, Tensor]:
    """Five lists: all of it valid, none, two at random, and one whose first boxes are not valid and NaN."""
    generator = torch.Generator().manual_seed(num_boxes)
    corners = torch.rand(5, num_boxes, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + torch.rand(5, num_boxes, 2, generator=generator) * 40], dim=2)
    if kind == "whole":  # many overlaps are equal, many boxes the same, some without an area
        boxes = (boxes / 8).round() * 8
    valid = torch.rand(5, num_boxes, generator=generator) < 0.7
    valid[0], valid[1] = True, False
    boxes[4, : num_boxes // 2], valid[4] = NAN, torch.arange(num_boxes) >= num_boxes // 2
    return boxes, valid


def greedy(boxes: Tensor, valid: Tensor, threshold: float) -> list[int]:
    """The definition, box after box, in 32 bits."""
    survivors: list[int] = []
    for n in valid.nonzero()[:, 0].tolist():
        x0, y0, x1, y1 = boxes[n]
        mine = (x1 - x0) * (y1 - y0)
        for other in survivors:
            left, top, right, bottom = boxes[other]
            common = (torch.min(x1, right) - torch.max(x0, left)).clamp(min=0)
            common = common * (torch.min(y1, bottom) - torch.max(y0, top)).clamp(min=0)
            if common / ((right - left) * (bottom - top) + mine - common) > threshold:
                break
        else:
            survivors.append(n)
    return survivors


@pytest.mark.parametrize("kind", ["any", "whole"])
def test_survivors_are_those_of_the_definition(kind: str) -> None:
    boxes, valid = lists_of_boxes(40, kind)
    keep = nms_keep(boxes, valid, 0.5)
    for n in range(5):
        assert keep[n].nonzero()[:, 0].tolist() == greedy(boxes[n], valid[n], 0.5)
    assert 0 < keep[0].sum() < 40


@pytest.mark.parametrize("num_boxes", [1, 64, 130])
def test_the_kernel_keeps_what_torchvision_keeps(interpreted: Interpreter, num_boxes: int) -> None:
    for kind, threshold in (("any", 0.7), ("whole", 0.5)):
        boxes, valid = lists_of_boxes(num_boxes, kind)
        expected = nms_keep(boxes, valid, threshold)
        assert torch.equal(interpreted(kernels.nms_keep, boxes, valid, threshold), expected)


def test_a_box_suppresses_what_overlaps_with_it_by_more_than_the_threshold(interpreted: Interpreter) -> None:
    boxes = torch.tensor(
        [
            [[0, 0, 4, 2], [0, 0, 4, 2], [0, 0, 2, 2], [0, 0, 2.125, 2]],  # twins; half of it; a little more than half
            [[0, 0, 2, 2], [0, 0, 4, 2], [9, 9, 9, 9], [9, 9, 9, 9]],  # boxes without an area overlap with nothing
            [[NAN, 0, NAN, 0], [0, 0, 4, 2], [0, 0, 4, 1.9], [0, 0, 4, 1.8]],  # the second is not valid
        ]
    )
    valid = torch.tensor([[True, True, True, True], [True, True, True, True], [False, False, True, True]])
    expected = torch.tensor([[True, False, True, False], [True, True, True, True], [False, False, True, False]])
    assert torch.equal(nms_keep(boxes, valid, 0.5), expected)
    assert torch.equal(interpreted(kernels.nms_keep, boxes, valid, 0.5), expected)


def test_the_threshold_has_32_bits_on_gpus_and_64_on_cpus_as_torchvision_has_it(interpreted: Interpreter) -> None:
    boxes, valid = torch.tensor([[[0.0, 0, 10, 1], [0, 0, 3, 1]]]), torch.ones(1, 2, dtype=torch.bool)
    assert nms_keep(boxes, valid, 0.3).tolist() == [[True, False]]  # 0.3 in 32 bits is more than in 64
    assert interpreted(kernels.nms_keep, boxes, valid, 0.3).tolist() == [[True, True]]


def test_a_suppressed_box_suppresses_nothing_across_blocks(interpreted: Interpreter) -> None:
    # Each box overlaps with the next one alone, so that every second one survives, through all words of the mask.
    left = torch.arange(200.0)
    boxes = torch.stack([left, torch.zeros(200), left + 3, torch.ones(200)], dim=1)[None]
    valid = torch.ones(1, 200, dtype=torch.bool)
    keep = interpreted(kernels.nms_keep, boxes, valid, 0.3)
    assert keep[0].nonzero()[:, 0].tolist() == list(range(0, 200, 2))


def test_torch_knows_the_operation() -> None:
    torch.library.opcheck(nms_keep, (*lists_of_boxes(5, "any"), 0.5))


def test_the_kernels_round_as_torchvisions_does_on_gpus() -> None:
    overlaps, walk = compiled(HOPPER, kernels.nms_keep, torch.zeros(80, 2000, 4), torch.ones(80, 2000).bool(), 0.7)
    found = float_operations(overlaps)
    # One rounding where the areas are added, as in torchvision's machine code, and everywhere else one an operation.
    assert set(found) == {"sub.rn.f32", "mul.rn.f32", "fma.rn.f32", "div.rn.f32", "min.f32", "max.f32"}
    assert found["fma.rn.f32"] == found["div.rn.f32"]  # one for each pair
    assert not float_operations(walk)
    assert resources(overlaps)[1] == resources(walk)[1] == 0  # all in registers
