"""The metric a trial goes by, and whether its targets are met: the only place that compares a figure with a target.

A metric is one of COCO's figures (`box_ap`, `mask_ap50`, `keypoint_apl`, …), the AP of one class (`box_ap/person`), or
`validation_loss`. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol

FIGURES = ("ap", "ap50", "ap75", "aps", "apm", "apl", "ar1", "ar10", "ar100", "ars", "arm", "arl")
"""The order of COCOeval's `stats` for boxes and masks (pycocotools/cocoeval.py, `summarize`)."""

KEYPOINT_FIGURES = ("ap", "ap50", "ap75", "apm", "apl", "ar", "ar50", "ar75", "arm", "arl")
"""The same for keypoints, of at most 20 detections per image."""

PARTS = {"box": FIGURES, "mask": FIGURES, "keypoint": KEYPOINT_FIGURES}
"""What a model can be scored for, and the figures of each: `box_ap`, …"""

VALIDATION_LOSS = "validation_loss"
"""The one metric of which less is better: `total_loss` on the validation images."""


class Evaluation(Protocol):
    """What an evaluation found: an `Evaluated` event, or a record of one; the fields are documented there."""

    @property
    def figures(self) -> Mapping[str, float | None]:
        """COCO's figures by name."""

    @property
    def class_ap(self) -> Mapping[str, float | None]:
        """AP by figure and class."""

    @property
    def validation_losses(self) -> Mapping[str, float]:
        """Losses on the validation images."""


class Targets(Protocol):
    """The targets of a trial's plan; None for no such target."""

    @property
    def target_box_ap(self) -> float | None:
        """For `box_ap`."""

    @property
    def target_mask_ap(self) -> float | None:
        """For `mask_ap`."""

    @property
    def metric(self) -> str:
        """What `target` is for."""

    @property
    def target(self) -> float | None:
        """For `metric`."""


def known_metrics(parts: Collection[str], class_names: Collection[str] = ()) -> list[str]:
    """The metrics of a model scored for some of `PARTS` on data of some classes, without the validation loss."""
    figures = [f"{part}_{name}" for part, names in PARTS.items() if part in parts for name in names]
    return figures + [f"{part}_ap/{name}" for part in PARTS if part in parts for name in class_names]


def class_names(categories: Mapping[Any, str]) -> dict[Any, str]:
    """A different name for each category, by its id: its own, or `NAME (ID)` where another has it as well."""
    names = list(categories.values())
    return {key: f"{name} ({key})" if names.count(name) > 1 else name for key, name in categories.items()}


def metric_value(evaluation: Evaluation, metric: str) -> float | None:
    """A metric of an evaluation; None where the evaluation does not have it."""
    if metric == VALIDATION_LOSS:
        return evaluation.validation_losses.get("total_loss")
    return evaluation.class_ap.get(metric) if "/" in metric else evaluation.figures.get(metric)


def metric_rating(evaluation: Evaluation, metric: str) -> float | None:
    """The same as a number of which more is better: a loss has its sign changed."""
    value = metric_value(evaluation, metric)
    return -value if value is not None and metric == VALIDATION_LOSS else value


def is_met(value: float | None, target: float | None, metric: str = "") -> bool | None:
    """Whether a metric's value meets its target; None where no target is set. A value of None or NaN meets none."""
    if target is None:
        return None
    if value is None or math.isnan(value):
        return False
    return value <= target if metric == VALIDATION_LOSS else value >= target


def all_met(evaluation: Evaluation, targets: Targets) -> bool | None:
    """Whether an evaluation meets every target that is set; None where none is set."""
    answers = [
        is_met(evaluation.figures.get("box_ap"), targets.target_box_ap),
        is_met(evaluation.figures.get("mask_ap"), targets.target_mask_ap),
        is_met(metric_value(evaluation, targets.metric), targets.target, targets.metric),
    ]
    decided = [answer for answer in answers if answer is not None]
    return all(decided) if decided else None
