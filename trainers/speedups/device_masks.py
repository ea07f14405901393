"""Mask targets of a padded batch, drawn where the batch is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainers.speedups.mask_targets import draw_in_boxes, ranges


@torch.library.custom_op("trainers::draw_masks", mutates_args=(), device_types="cpu")
def draw_masks(
    edges: Tensor, edge_polygon: Tensor, first_edge: Tensor, boxes: Tensor, image: Tensor, owner: Tensor, side: int
) -> Tensor:
    """The part of an object within each box, drawn on a square grid: detectron2's mask targets, bit for bit.

    Args:
        edges: (N, E, 4), float64, as in `PaddedBatch`.
        edge_polygon: (N, E), int32, as in `PaddedBatch`.
        first_edge: (N, G + 1), int32, as in `PaddedBatch`.
        boxes: (R, 4), float32, corners (x0, y0, x1, y1) in pixels of the image.
        image: (R,), int64, the image of each box.
        owner: (R,), int64, the number of its object in the image; negative: the mask is empty.
        side: Rows and columns of a mask.

    Returns:
        (R, side, side), bool.
    """
    drawn = torch.zeros((len(boxes), side, side), dtype=torch.bool)
    (chosen,) = (owner >= 0).numpy().nonzero()
    image_of_box, num_edges, num_starts = image.numpy()[chosen], edges.shape[1], first_edge.shape[1]
    starts = first_edge.numpy() + np.arange(len(edges))[:, None] * num_edges
    edge, box = ranges(starts.ravel(), image_of_box * num_starts + owner.numpy()[chosen])
    if len(edge):
        polygon = edge_polygon.numpy().ravel()[edge]
        is_first = np.append(True, (polygon[1:] != polygon[:-1]) | (box[1:] != box[:-1]))
        points = edges.numpy().reshape(-1, 4)[edge, :2].T
        masks = draw_in_boxes(points, is_first.cumsum() - 1, box[is_first], boxes.numpy()[chosen], side)
        drawn[chosen] = torch.from_numpy(masks)
    return drawn


@draw_masks.register_kernel("cuda")
def _(
    edges: Tensor, edge_polygon: Tensor, first_edge: Tensor, boxes: Tensor, image: Tensor, owner: Tensor, side: int
) -> Tensor:
    from trainers.speedups.kernels import masks

    return masks.draw_masks(edges, edge_polygon, first_edge, boxes, image, owner, side)


@draw_masks.register_fake
def _(
    edges: Tensor,  # noqa: ARG001
    edge_polygon: Tensor,  # noqa: ARG001
    first_edge: Tensor,  # noqa: ARG001
    boxes: Tensor,
    image: Tensor,  # noqa: ARG001
    owner: Tensor,  # noqa: ARG001
    side: int,
) -> Tensor:
    return boxes.new_empty((len(boxes), side, side), dtype=torch.bool)
