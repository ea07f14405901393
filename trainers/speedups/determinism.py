"""The switch `deterministic`: operations that give the same bits each time, or a refusal before the run.

torch knows which of its operations are not deterministic on GPUs: with its mode on, they take another algorithm or
raise (`torch.use_deterministic_algorithms`). It knows nothing of other libraries' kernels; `require_deterministic`
looks for those, and for what would raise in the first step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from torch import nn

from trainers.contract.problems import ConfigurationError
from trainers.recipes import Recipe
from trainers.speedups.level_pooling import is_roi_align

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_SETTINGS = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS gives the same bits each time (its documentation, "Results Reproducibility"); other
values make torch raise at the first product of matrices."""


@contextmanager
def deterministic_process() -> Iterator[None]:
    """Lets torch take deterministic algorithms only, in this process and until the end of the block.

    cuBLAS reads its variable when the process first multiplies matrices on a GPU; that must come after.
    """
    cudnn = torch.backends.cudnn
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before = cudnn.deterministic, os.environ.get(CUBLAS_VARIABLE)
    if before[1] not in CUBLAS_SETTINGS:
        os.environ[CUBLAS_VARIABLE] = CUBLAS_SETTINGS[0]
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        cudnn.deterministic = before[0]
        if before[1] is None:
            os.environ.pop(CUBLAS_VARIABLE, None)
        else:
            os.environ[CUBLAS_VARIABLE] = before[1]


def require_deterministic(model: nn.Module, cfg: CfgNode, recipe: Recipe) -> None:
    """Checks that a model can be trained deterministically on a GPU.

    Raises:
        ConfigurationError: It cannot.
    """
    without = "Leave out trials.switches.deterministic"
    if cfg.CUDNN_BENCHMARK:
        _refuse("cuDNN chooses its kernels by measuring them", "CUDNN_BENCHMARK", "Set CUDNN_BENCHMARK: false")
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        what = "gradients of deformable convolutions are added up in any order"
        _refuse(what, "MODEL.RESNETS.DEFORM_ON_PER_STAGE", without)
    for module in model.modules():
        if isinstance(module, ROIPooler) and not is_roi_align(module):
            _refuse("gradients of this pooler are added up in any order", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", without)
        if isinstance(module, ROIPooler) and not recipe.triton_pooling:
            what = "torchvision adds up the gradients of ROIAlign in any order"
            _refuse(what, "trials.switches.triton_pooling", "Set trials.switches.triton_pooling: true")
        if isinstance(module, BaseKeypointRCNNHead):
            _refuse("torch has no deterministic gradient of bilinear interpolation", "MODEL.KEYPOINT_ON", without)


def _refuse(what: str, key: str, hint: str) -> None:
    raise ConfigurationError(f"training is not deterministic on a GPU: {what}", "not_deterministic", key, hint)
