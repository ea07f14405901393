"""Anchors or proposals matched to the objects of their image by overlap, for all images at once and in fixed shapes.

Overlaps are those of detectron2's `pairwise_iou`, bit for bit.
"""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor


@torch.library.custom_op("trainers::best_overlaps", mutates_args=(), device_types="cpu")
def best_overlaps(boxes: Tensor, num_objects: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The object of its image with which each anchor or proposal overlaps most.

    Args:
        boxes: (N, G, 4), float32: the objects (x0, y0, x1, y1) of N images.
        num_objects: (N,), int64: an image's objects are the first ones of its row.
        others: (R, 4), float32: anchors of every image; or (N, R, 4): proposals of each.

    Returns:
        (N, R), float32: the overlap (IoU) with that object, -1.0 where an image has none; and (N, R), int64: its
        number, the first of equals, 0 where an image has none.
    """
    most = boxes.new_full((len(boxes), others.shape[-2]), -1.0)
    owners = torch.zeros_like(most, dtype=torch.int64)
    for n, (count, image_others) in enumerate(_images(boxes, num_objects, others)):
        if count:
            overlaps = pairwise_iou(Boxes(boxes[n, :count]), image_others)
            torch.max(overlaps, dim=0, out=(most[n], owners[n]))
    return most, owners


@torch.library.custom_op("trainers::is_best", mutates_args=(), device_types="cpu")
def is_best(boxes: Tensor, num_objects: Tensor, others: Tensor) -> Tensor:
    """Which anchors or proposals overlap with some object of their image as much as the best for that object.

    These are detectron2's matches of low quality (`Matcher.set_low_quality_matches_`): all of an image where nothing
    overlaps with one of its objects. One that must not count is passed as zeros, which overlap with nothing.

    The arguments are those of `best_overlaps`.

    Returns:
        (N, R), bool.
    """
    best = torch.zeros((len(boxes), others.shape[-2]), dtype=torch.bool, device=boxes.device)
    for n, (count, image_others) in enumerate(_images(boxes, num_objects, others)):
        if count:
            overlaps = pairwise_iou(Boxes(boxes[n, :count]), image_others)
            torch.any(overlaps == overlaps.amax(dim=1, keepdim=True), dim=0, out=best[n])
    return best


def _images(boxes: Tensor, num_objects: Tensor, others: Tensor) -> list[tuple[int, Boxes]]:
    each = others.expand(len(boxes), -1, -1).unbind() if others.dim() == 2 else others.unbind()
    return [(count, Boxes(image)) for count, image in zip(num_objects.tolist(), each, strict=True)]


@best_overlaps.register_fake
def _(boxes: Tensor, num_objects: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    most = boxes.new_empty((len(boxes), others.shape[-2]))
    return most, torch.empty_like(most, dtype=torch.int64)


@is_best.register_fake
def _(boxes: Tensor, num_objects: Tensor, others: Tensor) -> Tensor:  # noqa: ARG001
    return boxes.new_empty((len(boxes), others.shape[-2]), dtype=torch.bool)


@best_overlaps.register_kernel("cuda")
def _(boxes: Tensor, num_objects: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    from trainers.speedups.kernels import matching as kernels

    return kernels.best_overlaps(boxes, num_objects, others)


@is_best.register_kernel("cuda")
def _(boxes: Tensor, num_objects: Tensor, others: Tensor) -> Tensor:
    from trainers.speedups.kernels import matching as kernels

    return kernels.is_best(boxes, num_objects, others)
