"""ROIAlign of all levels of a feature pyramid in one operation, whose result has a shape that no data decides.

detectron2's `ROIPooler` asks the device which boxes belong to which level, and pools each level by itself. Here each
box brings its level along. On CPUs the operation is the sparse product of trainers/speedups/roi_pooling.py; on GPUs one
Triton kernel each way (trainers/speedups/kernels/roi_align.py). Both sum in a fixed order, so that a batch gives the
same bits each time.

Unlike torchvision's kernel under autocast, 16-bit features are not copied to 32 bits first, and unlike detectron2's
layer corners of boxes are not rounded to the 16 bits of the features. Sums are taken in 32 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor

from trainers.speedups.roi_pooling import sparse_weights

MAX_CORNER = 2.0**16
"""Boxes that reach farther, in pixels of the image, or are not finite pool zeros; a kernel would loop over their
samples for seconds."""


MAX_LEVELS = 5
"""Feature maps that the kernels take."""


class TritonPooler(ROIPooler):
    """A `ROIPooler` for which `is_roi_align` holds, pooling in Triton's kernels on GPUs."""

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Pools each box, in pixels of its image, from the feature map of its size, (N, C, H, W), finest first."""
        boxes = torch.cat([boxes.tensor for boxes in box_lists])
        # Filled on the device: a copy of the numbers from the host would wait for it.
        numbers = [boxes.new_full((len(each),), number, dtype=torch.int64) for number, each in enumerate(box_lists)]
        return pool_boxes(self, x, boxes, torch.cat(numbers))


def triton_pooler(_name: str, pooler: ROIPooler) -> type[ROIPooler] | None:
    """The class that pools in a pooler's place; None where the kernels cannot."""
    return TritonPooler if is_roi_align(pooler) else None


def pool_boxes(pooler: ROIPooler, features: list[Tensor], boxes: Tensor, image: Tensor) -> Tensor:
    """Pools boxes, (R, 4), of the images with these numbers, (R,), as a pooler for which `is_roi_align` holds does.

    Returns:
        (R, C, S, S) in channels-last memory order; see `pool`.
    """
    align = pooler.level_poolers[0]
    scales = [level.spatial_scale for level in pooler.level_poolers]
    levels = level_of(pooler, boxes)
    return pool(features, boxes, image, levels, scales, pooler.output_size[0], align.sampling_ratio, align.aligned)


def is_roi_align(pooler: ROIPooler) -> bool:
    """Whether a pooler pools by ROIAlign to squares, from so few levels, as `pool_boxes` does."""
    rows, columns = pooler.output_size
    levels = pooler.level_poolers
    return rows == columns and len(levels) <= MAX_LEVELS and all(type(level) is ROIAlign for level in levels)


def level_of(pooler: ROIPooler, boxes: Tensor) -> Tensor:
    """The number, (R,) int64, of the feature map from which a pooler pools each box, (R, 4).

    A box as large as 224 x 224 pixels is pooled from the map of stride 16, one half as large from the next finer map,
    and so on: equation 1 of https://arxiv.org/abs/1612.03144.
    """
    levels: Tensor = assign_boxes_to_levels(
        [Boxes(boxes)], pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level
    )
    return levels.clamp(0, pooler.max_level - pooler.min_level)  # a box that is not finite has no area


def pool(
    features: list[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    scales: list[float],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """ROIAlign as torchvision has it, each box from a level of its own; differentiable in the features, once.

    Args:
        features: (N, C, H, W) for each level, of one dtype and in any memory order; channels-last is the fastest on
            GPUs, any other is copied to it in the forward pass.
        boxes: (R, 4), corners x0, y0, x1, y1 in pixels of the images. Without area, inverted or outside the image is
            as in torchvision; see `MAX_CORNER` for what is not finite.
        image: (R,), integers in [0, N), in any order.
        level: (R,), integers in [0, len(features)).
        scales: Pixels of each feature map to a pixel of the image.
        output_size: S, the bins of a box along each axis.
        sampling_ratio: Samples in a bin along each axis; 0: as many as it has pixels, rounded up.
        aligned: Whether pixels have their centres at halves, as in detectron2's `ROIAlignV2`.

    Returns:
        (R, C, S, S) in channels-last memory order and the dtype of the features.
    """
    boxes = boxes.detach().float()
    boxes = torch.where((boxes.abs() < MAX_CORNER).all(1, keepdim=True), boxes, -MAX_CORNER)
    pooled: Tensor = _pool(features, boxes, image, level, scales, output_size, sampling_ratio, aligned)
    return pooled


@torch.library.custom_op("trainers::level_pooling", mutates_args=(), device_types="cpu")
def _pool(
    features: list[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    scales: list[float],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    pooled = _empty_pool(features, boxes, output_size)
    if len(boxes):
        shapes, size = [x.shape for x in features], (output_size, output_size)
        weights = sparse_weights(shapes, boxes, image.long(), level.long(), scales, size, sampling_ratio, aligned)
        pooled.permute(0, 2, 3, 1).view(-1, pooled.shape[1]).copy_(weights.pool(features))
    return pooled


@torch.library.custom_op("trainers::level_pooling_backward", mutates_args=(), device_types="cpu")
def _pool_backward(
    grad: Tensor,
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    num_images: int,
    heights: list[int],
    widths: list[int],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    gradients = _empty_gradients(grad, num_images, heights, widths)
    if not len(boxes):
        return [gradient.zero_() for gradient in gradients]
    shapes, size = [gradient.shape for gradient in gradients], (grad.shape[2], grad.shape[3])
    weights = sparse_weights(shapes, boxes, image.long(), level.long(), scales, size, sampling_ratio, aligned)
    rows = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
    for gradient, values in zip(gradients, weights.gradients(rows, shapes), strict=True):
        gradient.copy_(values)
    return gradients


def _empty_pool(features: list[Tensor], boxes: Tensor, output_size: int) -> Tensor:
    shape = boxes.shape[0], features[0].shape[1], output_size, output_size
    return torch.empty(shape, dtype=features[0].dtype, device=boxes.device, memory_format=torch.channels_last)


def _empty_gradients(grad: Tensor, num_images: int, heights: list[int], widths: list[int]) -> list[Tensor]:
    return [
        torch.empty(
            (num_images, grad.shape[1], height, width),
            dtype=grad.dtype,
            device=grad.device,
            memory_format=torch.channels_last,
        )
        for height, width in zip(heights, widths, strict=True)
    ]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - torch's names
    features, boxes, image, level, scales, _, sampling_ratio, aligned = inputs
    ctx.save_for_backward(boxes, image, level)
    ctx.maps = features[0].shape[0], [x.shape[2] for x in features], [x.shape[3] for x in features]
    ctx.settings = scales, sampling_ratio, aligned


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _pool_backward(grad, *ctx.saved_tensors, *ctx.maps, *ctx.settings), *(None,) * 7


_pool.register_fake(lambda features, boxes, _image, _level, _scales, size, *_: _empty_pool(features, boxes, size))
_pool_backward.register_fake(lambda grad, _boxes, _image, _level, *maps: _empty_gradients(grad, *maps[:3]))
_pool.register_autograd(_backward, setup_context=_save_for_backward)


@_pool.register_kernel("cuda")
def _(features: list[Tensor], boxes: Tensor, *settings: Any) -> Tensor:
    from trainers.speedups.kernels import roi_align

    with torch.cuda.device_of(boxes):
        return roi_align.pool(features, boxes, *settings)


@_pool_backward.register_kernel("cuda")
def _(grad: Tensor, *settings: Any) -> list[Tensor]:
    from trainers.speedups.kernels import roi_align

    with torch.cuda.device_of(grad):
        return roi_align.pool_backward(grad, *settings)
