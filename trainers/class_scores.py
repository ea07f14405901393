"""What each class scores, from what a COCO scorer has accumulated of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainers.contract.evaluation_details import ClassCurve

_DECIMALS = 4
"""Of the points of curves: files of 80 classes stay small."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Figures of detections, all classes together and each alone."""

    figures: dict[str, float | None]
    """AP and AR by the names in FIGURES, or KEYPOINT_FIGURES, 0–100; None where the data has nothing of that kind."""
    class_ap: dict[str, float | None]
    """AP of each class by its name, in the order of the category ids; None for a class without an object."""
    curves: tuple[ClassCurve, ...]
    """Of each class, in the same order."""


def by_class(
    accumulated: Mapping[str, Any], num_objects: Mapping[str, int]
) -> tuple[dict[str, float | None], tuple[ClassCurve, ...]]:
    """AP and curve of each class, as pycocotools gives them where it scores that class alone.

    Args:
        accumulated: COCOeval's `eval`: arrays over (IoU, recall, class, size, number of detections), -1 for nothing.
        num_objects: Of each class by its name, in the order of the arrays.
    """
    # All sizes, and the largest number of detections.
    precision, scores = (np.asarray(accumulated[name])[:, :, :, 0, -1] for name in ("precision", "scores"))
    class_ap: dict[str, float | None] = {}
    curves = []
    for position, (name, number) in enumerate(num_objects.items()):
        each = precision[:, :, position]  # -1 for a class without an object
        class_ap[name] = 100.0 * float(each.mean()) if each.min() >= 0 else None
        reached = each[0] > 0
        curves.append(
            ClassCurve(
                name,
                number,
                tuple(each[0, reached].round(_DECIMALS).tolist()),
                tuple(scores[0, reached, position].round(_DECIMALS).tolist()),
            )
        )
    return class_ap, tuple(curves)
