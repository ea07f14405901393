"""Non-maximum suppression of many lists of boxes at once, with results of a fixed shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms


@torch.library.custom_op("trainers::nms_keep", mutates_args=(), device_types="cpu")
def nms_keep(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Which boxes of each list survive `torchvision.ops.nms` among the valid ones of their list.

    Args:
        boxes: (B, K, 4), float32: B lists of boxes (x0, y0, x1, y1), each by falling score.
        valid: (B, K), bool: the others neither survive nor suppress, whatever their coordinates are.
        threshold: A box that overlaps more than this (IoU) with a survivor before it is suppressed. As in torchvision
            it has 64 bits on CPUs and 32 on GPUs, where moreover one sum of areas is rounded once instead of twice.

    Returns:
        (B, K), bool.
    """
    keep = torch.zeros_like(valid)
    for row, row_boxes, row_valid in zip(keep, boxes, valid, strict=True):
        indices = row_valid.nonzero()[:, 0]
        falling = -torch.arange(len(indices), dtype=boxes.dtype)
        row[indices[nms(row_boxes[indices], falling, threshold)]] = True
    return keep


@nms_keep.register_fake
def _(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(valid)


@nms_keep.register_kernel("cuda")
def _(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    from trainers.speedups.kernels import nms as kernels

    return kernels.nms_keep(boxes, valid, threshold)
