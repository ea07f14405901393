"""An image's detections in COCO's result format, its masks encoded together: detectron2's, byte for byte.

The trap this module protects against: pycocotools encodes columns, and a mask handed over in row order is copied
element by element. All masks of an image are turned once, by torch, and encoded in one call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pycocotools.mask
import torch
from detectron2.structures import Instances

MAX_POINTS_PER_CALL = 255
"""Masks per call: pycocotools 2.0.11 counts some arrays in 8 bits."""


def coco_detections(instances: Instances, image_id: int, category_ids: Mapping[int, int]) -> list[dict[str, Any]]:
    """Detections as COCO's result format has them.

    Args:
        instances: The model's output for one image: `pred_boxes`, `scores`, `pred_classes`, and `pred_masks`
            ((N, height, width), bool) where it has masks; on any device.
        image_id: The image.
        category_ids: The data set's category id for each class index.

    Returns:
        For each detection `image_id`, `category_id`, `bbox` (x, y, width, height), `score`, and `segmentation` (RLE,
        counts as text).
    """
    if not len(instances):
        return []
    corners = instances.pred_boxes.tensor
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    found: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[category], "bbox": box, "score": score}
        for category, box, score in zip(instances.pred_classes.tolist(), boxes, instances.scores.tolist(), strict=True)
    ]
    if instances.has("pred_masks"):
        for detection, rle in zip(found, encode(instances.pred_masks), strict=True):
            detection["segmentation"] = rle
    return found


def encode(masks: torch.Tensor) -> list[dict[str, Any]]:
    """The RLE of each mask, its counts as text.

    Args:
        masks: (N, height, width), bool, on any device.
    """
    columns = masks.transpose(1, 2).contiguous().cpu().view(torch.uint8).numpy()
    rles: list[dict[str, Any]] = []
    for first in range(0, len(columns), MAX_POINTS_PER_CALL):
        rles += pycocotools.mask.encode(columns[first : first + MAX_POINTS_PER_CALL].transpose(2, 1, 0))
    for rle in rles:
        rle["counts"] = rle["counts"].decode("ascii")
    return rles
