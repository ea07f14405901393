"""Detections encoded together are detectron2's, byte for byte."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances

from trainers.evaluation import coco_detections


def found(number: int, with_masks: bool = True) -> Instances:
    torch.manual_seed(number)
    instances = Instances((40, 57))
    corners = torch.rand(number, 2) * 20
    instances.pred_boxes = Boxes(torch.cat([corners, corners + torch.rand(number, 2) * 20], dim=1))
    instances.scores = torch.rand(number)
    instances.pred_classes = torch.randint(0, 3, (number,))
    if with_masks:
        coarse = torch.rand(number, 1, 5, 7)
        instances.pred_masks = nn_resize(coarse) > 0.5
        instances.pred_masks[: number // 4] = False
        instances.pred_masks[-1:] = True
    return instances


def nn_resize(coarse: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(coarse, (40, 57), mode="bilinear")[:, 0]


@pytest.mark.parametrize("number", [0, 1, 7, 300])
@pytest.mark.parametrize("with_masks", [True, False])
def test_detections_are_detectron2s_byte_for_byte(number: int, with_masks: bool) -> None:
    category_ids = {0: 1, 1: 17, 2: 90}
    expected = instances_to_coco_json(found(number, with_masks), 42)
    for detection in expected:
        detection["category_id"] = category_ids[detection["category_id"]]
    assert json.dumps(coco_detections(found(number, with_masks), 42, category_ids)) == json.dumps(expected)
