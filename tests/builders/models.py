"""Configs of small models of detectron2, without a plan around them."""

from __future__ import annotations

from typing import Any

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
KEYPOINT_RCNN = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"


def tiny_config(overrides: dict[str, Any], config: str = MASK_RCNN) -> CfgNode:
    """A model zoo config with changes, on CPU."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(config))
    cfg.merge_from_list([part for item in overrides.items() for part in item])
    cfg.MODEL.DEVICE = "cpu"
    return cfg
