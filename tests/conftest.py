"""What several tests share: where the real excerpt is, an experiment that trains in seconds, and the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not SHARED.is_dir():
        skip = pytest.mark.skip(reason=f"{SHARED} (the real COCO excerpt and the seed's logs) is not on this machine")
        for item in items:
            if "shared" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real COCO excerpt (`coco/`) and the seed's logs (`seed_logs/`); use with the `shared` marker."""
    return SHARED


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


def run_command(
    *arguments: object, cwd: Path, module: str = "orchestrator.run", **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs one of the program's commands as a user would, in a folder of its own."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
