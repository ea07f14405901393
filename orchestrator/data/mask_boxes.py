"""Checks that the masks of COCO annotations lie on their boxes, and finds out what moved them apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.entries import Annotation, sample, shorten
from orchestrator.data.masks import check_mask, mask_extent
from orchestrator.findings import FindingList

MIN_OVERLAP = 0.5
"""Intersection over union with the mask's extent from which a box is taken for that of the mask."""

EDGE_TOLERANCE = 2.0
"""Pixels by which each edge of a box may differ from the mask's, however small the object is."""

MIN_EXPLAINED = 0.8
"""Intersection over union that mask and box must have, once a supposed mistake is undone, for it to be the cause."""

UNKNOWN_CAUSE = "Write the box around the mask; does one of them belong to another object, or an image of another size?"

Corners = NDArray[np.float64]
"""x0, y0, x1, y1 in pixels."""


class _Apart(NamedTuple):
    place: str
    what: str
    cause: str
    """The hint."""


def check_mask_boxes(
    entries: list[Annotation],
    candidates: NDArray[np.bool_],
    sizes: list[tuple[int, int]],
    file: str,
    findings: FindingList,
    *,
    for_scoring: bool,
) -> set[int]:
    """Compares the extents of masks with the boxes.

    Args:
        entries: The annotations.
        candidates: Which of them to look at, if they come into the sample: their boxes and images are good.
        sizes: Width and height of their images in pixels.
        file: The annotation file.
        findings: Added to.
        for_scoring: Whether it is a validation set.

    Returns:
        Indices of the entries whose mask does not lie on their box.
    """
    effect = "no detection fits both" if for_scoring else "only what lies in the box is learned as its mask"
    looked_at = sample(len(entries))
    looked = f" (one annotation in {looked_at.step} is looked at)" if looked_at.step > 1 else ""
    apart: dict[int, _Apart] = {}
    for index in looked_at:
        entry = entries[index]
        if not candidates[index] or check_mask(entry.segmentation, sizes[index]).problem is not None:
            continue
        if (extent := mask_extent(entry.segmentation)) is None:
            continue
        mask, box = np.array(extent), np.array(entry.bbox, dtype=np.float64)
        overlap = _overlap_in_image(mask, _corners(box), sizes[index])
        if overlap < MIN_OVERLAP and np.abs(mask - _corners(box)).max() > EDGE_TOLERANCE:
            spans = [round(float(value), 2) for value in (*mask[:2], *mask[2:] - mask[:2])]
            what = f"its mask spans {spans}, its bbox is {shorten(entry.bbox)}: an overlap (IoU) of {overlap:.2f}"
            cause = _cause(mask, box, sizes[index])
            apart[index] = _Apart(f"annotation {entry.id}", f"{what}{looked}; {effect}", cause)
    hint = _common_cause(each.cause for each in apart.values())
    for each in sorted(apart.values(), key=lambda each: each.cause != hint):  # the example shown is one of the hint
        findings.warning("mask_off_box", file, each.place, each.what, hint)
    return set(apart)


def _common_cause(causes: Iterable[str]) -> str:
    """The cause that most have; that of a few objects among others is a coincidence."""
    counted = list(causes)
    common = max(counted, key=counted.count, default=UNKNOWN_CAUSE)
    return common if 2 * counted.count(common) > len(counted) else UNKNOWN_CAUSE


def _cause(mask: Corners, box: NDArray[np.float64], size: tuple[int, int]) -> str:
    """The first of the usual mistakes that, undone, brings mask and box together."""
    corners, image = _corners(box), np.array([*size, *size], dtype=np.float64)
    middles = mask[:2] + mask[2:], corners[:2] + corners[2:]
    factors = np.divide(*middles, out=np.ones(2), where=(middles[0] > 0) & (middles[1] > 0))
    undone = {
        "Write the mask in pixels: it looks like shares of the image's width and height": (mask * image, corners),
        "Write the mask in pixels: it looks like percentages of the image's width and height": (
            mask * image / 100,
            corners,
        ),
        "Write x before y: in the mask they look exchanged": (mask[[1, 0, 3, 2]], corners),
        "Write x and y of the upper left corner: the bbox looks as if it began with its centre": (
            mask,
            corners - np.tile(box[2:] / 2, 2),
        ),
        "Write [x, y, width, height]: the bbox looks like two corners (x0, y0, x1, y1)": (mask, box),
        "Scale masks and boxes alike: one of them looks as if for an image of another size": (
            mask / np.tile(factors, 2),
            corners,
        ),
    }
    return next((hint for hint, pair in undone.items() if _overlap(*pair) >= MIN_EXPLAINED), UNKNOWN_CAUSE)


def _corners(box: NDArray[np.float64]) -> Corners:
    return np.concatenate([box[:2], box[:2] + box[2:]])


def _overlap_in_image(mask: Corners, box: Corners, size: tuple[int, int]) -> float:
    """Intersection over union, with or without what reaches out of the image: tools cut the one and not the other."""
    limits = np.array([*size, *size], dtype=np.float64)
    return max(_overlap(mask, box), _overlap(np.clip(mask, 0, limits), np.clip(box, 0, limits)))


def _overlap(first: Corners, second: Corners) -> float:
    """Intersection over union of two boxes; 0 where one of them is none."""
    shared = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    sides = first[2:] - first[:2], second[2:] - second[:2]
    if min(map(np.min, (shared, *sides))) <= 0:
        return 0.0
    intersection = float(np.prod(shared))
    return intersection / (float(np.prod(sides[0])) + float(np.prod(sides[1])) - intersection)
