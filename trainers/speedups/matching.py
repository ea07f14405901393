"""Matches and samples the boxes of all images of a batch at once: the steps that RPN and ROI heads share.

Every figure comes from the same operation on the same numbers as in detectron2, and random choices are drawn in the
same order, so labels and samples are detectron2's, bit for bit.
"""

from __future__ import annotations

import torch
from detectron2.modeling.matcher import Matcher
from torch import Tensor

MAX_PAIRS = 2**24
"""Objects times anchors or proposals up to which all images are matched at once: 64 MiB for each array of them."""


def match(matcher: Matcher, overlaps: Tensor, valid_mask: Tensor) -> tuple[Tensor, Tensor]:
    """detectron2's `Matcher` on N images.

    Args:
        matcher: Thresholds, their labels, and whether a box's best anchors are its own however little they overlap.
        overlaps: (N, G, R), IoU of boxes and anchors; -1 where there is no box.
        valid_mask: (N, G), where there is one.

    Returns:
        (N, R) labels in 8 bits, and (N, R) indices of the boxes with the greatest overlap.
    """
    max_overlaps, owners = overlaps.max(dim=1)
    labels = label_by_thresholds(matcher, max_overlaps)
    if matcher.allow_low_quality_matches:
        best = overlaps.amax(dim=2).masked_fill_(~valid_mask, 2.0)  # no overlap is 2
        labels.masked_fill_((overlaps == best[:, :, None]).any(dim=1), 1)
    return labels, owners


def label_by_thresholds(matcher: Matcher, max_overlaps: Tensor) -> Tensor:
    """The label of each anchor or proposal by its greatest overlap with an object; same shape, 8 bits."""
    labels = torch.ones_like(max_overlaps, dtype=torch.int8)
    for label, low, high in zip(matcher.labels, matcher.thresholds[:-1], matcher.thresholds[1:], strict=True):
        if label != 1:
            labels.masked_fill_((max_overlaps >= low) & (max_overlaps < high), label)
    return labels


def sample(
    positive_mask: Tensor, negative_mask: Tensor, num_samples: int, positive_fraction: float
) -> list[tuple[Tensor, Tensor]]:
    """detectron2's `subsample_labels` of each image, with its random numbers.

    Args:
        positive_mask: (N, R), which boxes are objects.
        negative_mask: (N, R), which are background.
        num_samples: Boxes to choose of an image.
        positive_fraction: The share of objects among them, at most.

    Returns:
        For each image the chosen objects and the chosen background, each as (…, 2) indices of image and box.
    """
    indices = positive_mask.nonzero(), negative_mask.nonzero()
    counts = [torch.bincount(each[:, 0], minlength=len(positive_mask)).tolist() for each in indices]
    samples = []
    for positive, negative in zip(*map(torch.split, indices, counts), strict=True):
        num_positive = min(len(positive), int(num_samples * positive_fraction))
        chosen = torch.randperm(len(positive), device=positive.device)[:num_positive]
        others = torch.randperm(len(negative), device=negative.device)[: num_samples - num_positive]
        samples.append((positive[chosen], negative[others]))
    return samples
