"""Keypoints for a data set that has none: the left, right and upper middle of every object's box."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment

NAMES = ["left_side", "right_side", "top"]

OVERRIDES: dict[str, Any] = {key: value for key, value in TINY_OVERRIDES.items() if "MASK_HEAD" not in key} | {
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": len(NAMES),
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [8],
    "TEST.KEYPOINT_OKS_SIGMAS": [0.1] * len(NAMES),
}
"""A Keypoint R-CNN of them that trains a step in a few hundredths of a second."""


def add_keypoints(root: Path) -> None:
    """Writes them into the annotation files of a data set in COCO's layout."""
    for path in sorted((root / "annotations").glob("*.json")):
        document = json.loads(path.read_text())
        for category in document["categories"]:
            category |= {"keypoints": NAMES, "skeleton": [[1, 3], [2, 3]]}
        for entry in document["annotations"]:
            x, y, width, height = entry["bbox"]
            points = [[x, y + height / 2, 2], [x + width, y + height / 2, 2], [x + width / 2, y, 1]]
            entry |= {"keypoints": [number for point in points for number in point], "num_keypoints": len(points)}
        path.write_text(json.dumps(document))


def keypoint_experiment(root: Path, **changes: Any) -> dict[str, Any]:
    """An experiment on a data set in COCO's layout that has them."""
    pair = {
        f"{part}_{what}": str(root / place)
        for part in ("train", "val")
        for what, place in (("annotations", f"annotations/instances_{part}2017.json"), ("images", f"{part}2017"))
    }
    model = {"config": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", "weights": "", "overrides": OVERRIDES}
    return tiny_experiment(data={"coco": pair}, model=model, **changes)
