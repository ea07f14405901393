"""An experiment that trains in seconds, as values and as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

TINY_OVERRIDES: dict[str, Any] = {
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.PIXEL_STD": [57.0, 57.0, 57.0],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
    "INPUT.MIN_SIZE_TRAIN": [64],
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.BASE_LR": 0.005,
    "SOLVER.MAX_ITER": 8,
    "SOLVER.STEPS": [6],
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 5.0,
    "TEST.DETECTIONS_PER_IMAGE": 10,
}
"""A Mask R-CNN that trains a step in a few hundredths of a second."""


def tiny_experiment(**changes: Any) -> dict[str, Any]:
    """The values of an experiment that trains in seconds on CPU; `changes` replace whole sections or single values."""
    values: dict[str, Any] = {
        "name": "tiny",
        "data": {"generated": {"num_train": 16, "num_val": 4, "size": 64}},
        "model": {"weights": "", "overrides": TINY_OVERRIDES},
        "trials": {"world_sizes": [1], "scaling": "strong"},
        "protocol": {"kind": "time_to_train", "eval_period_iterations": 4, "warmup_iterations": 2},
        "resources": {"device": "cpu", "cpus_per_worker": 1},
        "storage": {"checkpoint_period_iterations": 4},
        "log_period_iterations": 2,
    }
    return {**values, **changes}


def write_experiment(folder: Path, values: dict[str, Any]) -> Path:
    """Writes an experiment file and returns its path."""
    path = folder / f"{values['name']}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
