"""What RPN and ROI heads share in a step of fixed shapes: random samples and box targets that no host waits for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Samples(NamedTuple):
    """S chosen boxes of each of N images: first the objects, then the background, then empty slots."""

    indices: Tensor
    """(N, S), int64: which of an image's R boxes; in an empty slot any number below R."""
    valid_mask: Tensor
    """(N, S), bool: whether the slot is used."""
    positive_mask: Tensor
    """(N, S), bool: whether it holds an object; False from slot `int(S * positive_fraction)` on."""


def sample(positive_mask: Tensor, negative_mask: Tensor, num_samples: int, positive_fraction: float) -> Samples:
    """Draws what detectron2's `subsample_labels` draws, for all images at once and without a wait.

    Of an image's objects `int(num_samples * positive_fraction)` at most, and background in all other slots, each choice
    equally likely. A random key for each box takes the place of a permutation of the boxes in question, of which only
    the device knows how many there are.

    Args:
        positive_mask: (N, R), bool: which boxes are objects.
        negative_mask: (N, R), bool: which are background; none is both.
        num_samples: S, the slots of each image.
        positive_fraction: From 0 to 1.
    """
    num_boxes = positive_mask.shape[1]
    keys = torch.rand(positive_mask.shape, device=positive_mask.device)
    max_positive = int(num_samples * positive_fraction)
    positive, num_positive = _draw(keys, positive_mask, min(max_positive, num_boxes))
    negative, num_negative = _draw(keys, negative_mask, min(num_samples, num_boxes))
    slots = torch.arange(num_samples, device=keys.device).expand(len(keys), -1)
    sampled_positive = slots < num_positive
    indices = negative.gather(1, (slots - num_positive).clamp(0, negative.shape[1] - 1))
    if positive.shape[1]:
        indices = torch.where(sampled_positive, positive.gather(1, slots.clamp(max=positive.shape[1] - 1)), indices)
    return Samples(indices, slots < num_positive + num_negative, sampled_positive)


def _draw(keys: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Up to `count` boxes of each image where the mask is set: (N, count) indices, of which the first (N, 1) hold."""
    found, indices = keys.masked_fill(~mask, -1.0).topk(count, dim=1)
    return indices, (found >= 0).sum(dim=1, keepdim=True)


def box_deltas(boxes: Tensor, targets: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Regression targets (…, 4) from boxes to their objects' boxes, both (…, 4); as `Box2BoxTransform.get_deltas`.

    That function asks the device whether all boxes have a width. Here boxes without one, as they stand in empty slots,
    give values that are not finite; the caller leaves them out.
    """
    sizes, target_sizes = boxes[..., 2:] - boxes[..., :2], targets[..., 2:] - targets[..., :2]
    centers, target_centers = boxes[..., :2] + 0.5 * sizes, targets[..., :2] + 0.5 * target_sizes
    wx, wy, ww, wh = weights
    shifts, growths = (target_centers - centers), torch.log(target_sizes / sizes)
    return torch.stack(
        (
            wx * shifts[..., 0] / sizes[..., 0],
            wy * shifts[..., 1] / sizes[..., 1],
            ww * growths[..., 0],
            wh * growths[..., 1],
        ),
        dim=-1,
    )
