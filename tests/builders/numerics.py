"""The switches of this process that decide how torch computes.

`python -m tests.builders.numerics PLAN.json` prints those of a process with detectron2's `DefaultTrainer` in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from operator import attrgetter
from pathlib import Path

import torch
from detectron2.engine import default_setup

from benchmarks.peer import build_trainer
from trainers import mask_rcnn
from trainers.contract.plan import TrialPlan

SWITCHES = (
    "cuda.matmul.allow_tf32", "cuda.matmul.fp32_precision", "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction", "cuda.matmul.allow_fp16_accumulation",
    "cudnn.allow_tf32", "cudnn.benchmark", "cudnn.benchmark_limit", "cudnn.deterministic", "cudnn.enabled",
    "cudnn.fp32_precision", "cudnn.conv.fp32_precision", "fp32_precision",
    "mkldnn.allow_tf32", "mkldnn.deterministic", "mkldnn.enabled", "mkldnn.fp32_precision",
)  # fmt: skip
"""Under `torch.backends`."""


def process_switches() -> dict[str, str]:
    """Every switch and its value, as text."""
    values = {name: attrgetter(name)(torch.backends) for name in SWITCHES}
    values |= {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_debug_mode": torch.get_deterministic_debug_mode(),
        "fill_uninitialized_memory": torch.utils.deterministic.fill_uninitialized_memory,
        "default_dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cuda"),
        "flash_sdp": torch.backends.cuda.flash_sdp_enabled(),
        "blas": torch.backends.cuda.preferred_blas_library(),
    }
    return {name: str(value) for name, value in values.items()}


def default_trainer_switches(plan: TrialPlan) -> dict[str, str]:
    """Those of this process once detectron2's `default_setup` has run and its trainer is built, as by its tools."""
    cfg = mask_rcnn.build_config(plan).clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = plan.trial_dir
    default_setup(cfg, argparse.Namespace(eval_only=False))
    build_trainer(plan, lambda: None)
    return process_switches()


if __name__ == "__main__":
    made = TrialPlan.from_dict(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print(json.dumps(default_trainer_switches(made)))
