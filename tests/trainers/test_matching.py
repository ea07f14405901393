"""Anchors and proposals are matched to objects as detectron2's `Matcher` does it, on CPU and by kernels for GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from tests.builders.compiled import HOPPER, compiled, float_operations
from tests.builders.interpreted import Interpreter, interpreter
from trainers.speedups.kernels import matching as kernels
from trainers.speedups.matching import best_overlaps, is_best

COUNTS = torch.tensor([4, 0, 9, 1])


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreter]:
    with interpreter() as call:
        yield call


def boxes_of(*shape: int, whole: bool, seed: int) -> Tensor:
    """Boxes at random; at whole numbers many overlaps are equal, and some boxes have no area."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + torch.rand(*shape, 2, generator=generator) * 30], dim=-1)
    return (boxes / 6).round() * 6 if whole else boxes


@pytest.mark.parametrize("whole", [False, True])
def test_labels_and_owners_are_those_of_detectron2s_matcher(whole: bool) -> None:
    boxes, anchors = boxes_of(4, 9, whole=whole, seed=0), boxes_of(300, whole=whole, seed=1)
    most, owners = best_overlaps(boxes, COUNTS, anchors)
    best = is_best(boxes, COUNTS, anchors)
    matcher = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)
    for n, count in enumerate(COUNTS.tolist()):
        matched, labels = matcher(pairwise_iou(Boxes(boxes[n, :count]), Boxes(anchors)))
        mine = torch.where(most[n] >= 0.7, 1, torch.where(most[n] >= 0.3, -1, 0)).masked_fill(best[n], 1)
        assert torch.equal(mine.to(torch.int8), labels) and torch.equal(owners[n], matched)
        assert (most[n] == -1).all() == (count == 0)


@pytest.mark.parametrize("shape", [(300,), (4, 256), (4, 1)])
def test_the_kernels_find_the_same_bits(interpreted: Interpreter, shape: tuple[int, ...]) -> None:
    for whole in (False, True):
        boxes, others = boxes_of(4, 9, whole=whole, seed=0), boxes_of(*shape, whole=whole, seed=1)
        boxes[1], others[..., 5:7, :] = float("nan"), float("nan")  # no object is ever read there; no proposal
        if others.shape[-2] > 9:
            others[..., 7, :], others[..., 8, :] = 0.0, boxes[2, 3]
        for kernel, reference in ((kernels.best_overlaps, best_overlaps), (kernels.is_best, is_best)):
            found, expected = interpreted(kernel, boxes, COUNTS, others), reference(boxes, COUNTS, others)
            for mine, theirs in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True):
                assert torch.equal(mine, theirs)


def test_the_first_of_equal_objects_owns_a_box_and_all_best_boxes_are_found(interpreted: Interpreter) -> None:
    boxes = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 4, 4], [90, 90, 99, 99]]])
    others = torch.tensor([[0.0, 0, 4, 2], [0, 2, 4, 4], [0, 0, 1, 1], [50, 50, 60, 60]])
    for find in (best_overlaps, lambda *arguments: interpreted(kernels.best_overlaps, *arguments)):
        most, owners = find(boxes, torch.tensor([3]), others)
        assert most.tolist() == [[0.5, 0.5, 0.0625, 0.0]] and owners.tolist() == [[0, 0, 0, 0]]
    for find in (is_best, lambda *arguments: interpreted(kernels.is_best, *arguments)):
        assert find(boxes, torch.tensor([2]), others).tolist() == [[True, True, False, False]]
        # Nothing overlaps with the third object, so everything is best for it, as detectron2 has it.
        assert find(boxes, torch.tensor([3]), others).tolist() == [[True, True, True, True]]


def test_torch_knows_the_operations() -> None:
    for others in (boxes_of(7, whole=False, seed=1), boxes_of(4, 7, whole=False, seed=1)):
        arguments = boxes_of(4, 9, whole=False, seed=0), COUNTS, others
        torch.library.opcheck(best_overlaps, arguments)
        torch.library.opcheck(is_best, arguments)


def test_the_kernels_round_each_operation_on_gpus_as_torch_does() -> None:
    arguments = torch.zeros(4, 9, 4), COUNTS, torch.zeros(1000, 4)
    for kernel in (
        *compiled(HOPPER, kernels.best_overlaps, *arguments),
        *compiled(HOPPER, kernels.is_best, *arguments),
    ):
        expected = {"sub.rn.f32", "mul.rn.f32", "add.rn.f32", "div.rn.f32", "min.NaN.f32", "max.NaN.f32"}
        assert set(float_operations(kernel)) == expected
