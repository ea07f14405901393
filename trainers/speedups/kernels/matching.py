"""Triton kernels that match anchors or proposals to objects, without an array of all pairs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)
"""As torch's `max`, `min` and `clamp`."""
BLOCK = 256
"""Anchors or proposals of one program."""


def best_overlaps(boxes: Tensor, num_objects: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """`trainers.speedups.matching.best_overlaps` on a GPU."""
    most = boxes.new_empty((len(boxes), others.shape[-2]))
    owners = torch.empty_like(most, dtype=torch.int64)
    _launch(_best_overlaps, boxes, num_objects, others, most, owners)
    return most, owners


def is_best(boxes: Tensor, num_objects: Tensor, others: Tensor) -> Tensor:
    """`trainers.speedups.matching.is_best` on a GPU."""
    # The bits of floats from 0 up are integers in the same order, and the order of `atomic_max` does not matter.
    most_of_object = torch.zeros(boxes.shape[:2], dtype=torch.int32, device=boxes.device)
    best = torch.empty((len(boxes), others.shape[-2]), dtype=torch.bool, device=boxes.device)
    _launch(_most_of_objects, boxes, num_objects, others, most_of_object)
    _launch(_is_best, boxes, num_objects, others, most_of_object, best)
    return best


def _launch(kernel, boxes: Tensor, num_objects: Tensor, others: Tensor, *results: Tensor) -> None:
    num_others = others.shape[-2]
    kernel[(triton.cdiv(num_others, BLOCK), len(boxes))](
        boxes.contiguous(),
        num_objects,
        others.contiguous(),
        *results,
        boxes.shape[1],
        num_others,
        others.dim() == 2,
        BLOCK,
        enable_fp_fusion=False,  # a product is rounded before it is added to something
    )


@triton.jit
def _load(others, num_others, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """The boxes of one program, their number in the result, and whether they exist."""
    image = tl.program_id(1)
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = numbers < num_others
    results = image.to(tl.int64) * num_others + numbers
    corners = others + (numbers if SHARED else results) * 4
    x0, y0 = tl.load(corners, mask, 0.0), tl.load(corners + 1, mask, 0.0)
    x1, y1 = tl.load(corners + 2, mask, 0.0), tl.load(corners + 3, mask, 0.0)
    return x0, y0, x1, y1, results, mask


@triton.jit
def _overlap(corners, x0, y0, x1, y1):
    """detectron2's `pairwise_iou` of an object, given by where its corners are, with boxes."""
    object_x0, object_y0 = tl.load(corners), tl.load(corners + 1)
    object_x1, object_y1 = tl.load(corners + 2), tl.load(corners + 3)
    width = tl.minimum(object_x1, x1, ALL_NAN) - tl.maximum(object_x0, x0, ALL_NAN)
    height = tl.minimum(object_y1, y1, ALL_NAN) - tl.maximum(object_y0, y0, ALL_NAN)
    intersection = tl.maximum(width, 0.0, ALL_NAN) * tl.maximum(height, 0.0, ALL_NAN)
    areas = (object_x1 - object_x0) * (object_y1 - object_y0) + (x1 - x0) * (y1 - y0)
    return tl.where(intersection > 0, tl.div_rn(intersection, areas - intersection), 0.0)


@triton.jit
def _best_overlaps(
    boxes, num_objects, others, most, owners,
    max_objects, num_others, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x0, y0, x1, y1, results, mask = _load(others, num_others, SHARED, BLOCK)
    image = tl.program_id(1)
    first = boxes + image.to(tl.int64) * max_objects * 4
    greatest = tl.full((BLOCK,), -1.0, tl.float32)
    owner = tl.zeros((BLOCK,), tl.int32)
    for number in range(tl.load(num_objects + image).to(tl.int32)):
        overlap = _overlap(first + number * 4, x0, y0, x1, y1)
        owner = tl.where(overlap > greatest, number, owner)
        greatest = tl.where(overlap > greatest, overlap, greatest)
    tl.store(most + results, greatest, mask)
    tl.store(owners + results, owner.to(tl.int64), mask)


@triton.jit
def _most_of_objects(
    boxes, num_objects, others, most,
    max_objects, num_others, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x0, y0, x1, y1, _, _ = _load(others, num_others, SHARED, BLOCK)  # a box that does not exist overlaps with nothing
    image = tl.program_id(1)
    first = image.to(tl.int64) * max_objects
    for number in range(tl.load(num_objects + image).to(tl.int32)):
        overlap = _overlap(boxes + (first + number) * 4, x0, y0, x1, y1)
        greatest = tl.max(overlap.to(tl.int32, bitcast=True))
        tl.atomic_max(most + first + number, greatest, greatest > 0, sem="relaxed")


@triton.jit
def _is_best(
    boxes, num_objects, others, most, best,
    max_objects, num_others, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x0, y0, x1, y1, results, mask = _load(others, num_others, SHARED, BLOCK)
    image = tl.program_id(1)
    first = image.to(tl.int64) * max_objects
    found = tl.zeros((BLOCK,), tl.int1)
    for number in range(tl.load(num_objects + image).to(tl.int32)):
        overlap = _overlap(boxes + (first + number) * 4, x0, y0, x1, y1)
        found = found | (overlap.to(tl.int32, bitcast=True) == tl.load(most + first + number))
    tl.store(best + results, found, mask)
