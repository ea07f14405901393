"""Decides whether a target is met: the only place that compares an AP with a target. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping


def is_met(ap: float | None, target: float | None) -> bool | None:
    """Whether an AP meets its target.

    Args:
        ap: Measured AP, 0–100; None or NaN where it was not measured, which meets no target.
        target: The AP to reach, 0–100; None where none is set.

    Returns:
        None where no target is set.
    """
    if target is None:
        return None
    return ap is not None and not math.isnan(ap) and ap >= target


def all_met(
    figures: Mapping[str, float | None], target_box_ap: float | None, target_mask_ap: float | None
) -> bool | None:
    """Whether an evaluation meets every target that is set.

    Args:
        figures: COCO's figures by name, of which `box_ap` and `mask_ap` are read; a missing one was not measured.
        target_box_ap: Box AP to reach; None for no target.
        target_mask_ap: Mask AP to reach; None for no target.

    Returns:
        None where no target is set.
    """
    answers = [is_met(figures.get("box_ap"), target_box_ap), is_met(figures.get("mask_ap"), target_mask_ap)]
    decided = [answer for answer in answers if answer is not None]
    return all(decided) if decided else None
