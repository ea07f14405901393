"""Which batch trains to the targets, at which learning rate and in how many epochs, as far as MLPerf's points know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from orchestrator.experiment.spec import Experiment

ROUND = "3.1.0"
"""The last round of MLPerf Training whose rules have Mask R-CNN."""

MODELS = (
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
)  # fmt: skip
"""Configs of the model that the points are for."""

BOX_AP, MASK_AP = 37.7, 33.9
"""What they were trained to."""


@dataclass(frozen=True, slots=True)
class Convergence:
    """What the points say of a batch; None where they say nothing."""

    text: str
    """For a person."""
    base_lr: float | None = None
    epochs: float | None = None
    """To both targets."""


@cache
def reference_points() -> Mapping[int, tuple[float, float]]:
    """MLPerf's reference convergence points of Mask R-CNN: batch to (learning rate, mean epochs to the targets).

    Read from the installed `mlperf-logging`, whose checker accepts results by them; as there, points that need more
    epochs than their neighbours say are not left out, since nothing is judged here.
    """
    place = files("mlperf_logging.rcp_checker") / f"training_{ROUND}" / "rcps_maskrcnn.json"
    points: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    found = {}
    for point in points.values():
        epochs = point["Epochs to converge"]
        found[int(point["BS"])] = float(point["Hyperparams"]["opt_base_learning_rate"]), sum(epochs) / len(epochs)
    return dict(sorted(found.items()))


def convergence(batch: int) -> Convergence:
    """What MLPerf's points say of a batch of the model, the data and the targets that they are for."""
    points = reference_points()
    smallest, largest = min(points), max(points)
    if batch > largest:
        return Convergence(f"not known to converge: MLPerf's largest batch is {largest}")
    if batch < smallest:
        return Convergence(f"below MLPerf's smallest batch, {smallest}: no epochs are known")
    above = min(size for size in points if size >= batch)
    below = max(size for size in points if size <= batch)
    share = (batch - below) / (above - below) if above > below else 0.0
    rate, epochs = ((1 - share) * low + share * high for low, high in zip(points[below], points[above], strict=True))
    where = "MLPerf's point" if above == below else f"between MLPerf's points {below} and {above}"
    return Convergence(f"{where}: LR {rate:.4g}, {epochs:.1f} epochs", rate, epochs)


def knows(experiment: Experiment) -> str:
    """Why the points do not apply to an experiment; "" where they do."""
    protocol = experiment.protocol
    same = ("MODEL.WEIGHTS", "MODEL.PIXEL_")  # where weights come from, and how pixels are normalised
    other = any(key.startswith("MODEL.") and not key.startswith(same) for key in experiment.model.overrides)
    if not experiment.data.coco2017 or experiment.model.config not in MODELS or other:
        return "MLPerf's points are for Mask R-CNN R50-FPN on COCO 2017 alone"
    if (protocol.target_box_ap or 0) > BOX_AP or (protocol.target_mask_ap or 0) > MASK_AP:
        return f"MLPerf's points are for box AP {BOX_AP} and mask AP {MASK_AP}, the targets are higher"
    return ""


def largest_known_batch(world_size: int) -> int | None:
    """The largest batch with equally many images for so many workers within the points; None beyond them."""
    return max(reference_points()) // world_size * world_size or None
