"""Decides whether a target is met: the only place that compares an AP with a target. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping


def is_met(ap: float | None, target: float | None) -> bool | None:
    """Whether an AP meets its target, both 0–100; None where no target is set. An AP of None or NaN meets none."""
    if target is None:
        return None
    return ap is not None and not math.isnan(ap) and ap >= target


def all_met(
    figures: Mapping[str, float | None], target_box_ap: float | None, target_mask_ap: float | None
) -> bool | None:
    """Whether an evaluation's `box_ap` and `mask_ap` meet every target that is set; None where none is set."""
    answers = [is_met(figures.get("box_ap"), target_box_ap), is_met(figures.get("mask_ap"), target_mask_ap)]
    decided = [answer for answer in answers if answer is not None]
    return all(decided) if decided else None
