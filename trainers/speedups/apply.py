"""Puts a recipe's switches into effect on a model and this process.

The trap this module protects against: a switch that quietly does nothing. Each function here is called once at the
start, says in the log what it changed, and leaves checkpoints as they are, so that a trial can go on under another
recipe.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Literal

import torch
from detectron2.modeling.roi_heads import fast_rcnn, mask_head
from detectron2.structures import Instances
from torch import Tensor, nn

from trainers.recipes import Precision, Recipe
from trainers.speedups import convolution, proposals, roi_pooling

logger = logging.getLogger(__name__)


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "amp", "bf16"]:
    """What `auto` means on a device: the fastest precision that it computes in without emulating it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "amp"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def tune_process(recipe: Recipe, device: torch.device) -> None:
    """Sets what holds for the whole process: TF32, and detectron2's heads without their statistics."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = recipe.tf32
        torch.backends.cudnn.allow_tf32 = recipe.tf32
    if recipe.kept_memory and device.type == "cpu":
        keep_memory()
    if recipe.quiet_heads:
        mask_head.mask_rcnn_loss = quiet_mask_loss
        fast_rcnn._log_classification_stats = _log_nothing
        logger.info("The heads' training statistics are left out.")


def keep_memory() -> None:
    """Lets this process keep the memory that it frees, where its C library can (glibc).

    glibc gives large blocks back to the system at once, and the next step's activations are then cleared and mapped
    again, page by page. Values and numbers of the options: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        kept = mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1)
        logger.info("Freed memory is %s.", "kept" if kept else "given back: mallopt refused")


def tune_model(model: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """Applies a recipe to a model with its weights loaded, in place; returns it."""
    if recipe.sparse_pooling and device.type == "cpu":
        logger.info("%d poolers are sparse products.", roi_pooling.install(model))
    if recipe.batched_proposals:
        logger.info("Anchors and proposals: %d of 2 parts do all images at once.", proposals.install(model))
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if recipe.winograd and device.type == "cpu" and resolve_precision(recipe.precision, device) == "fp32":
        logger.info("%d convolutions are Winograd's or matrix products.", convolution.install(model))
    if recipe.compile:
        backbone = getattr(model, "backbone", None)
        if isinstance(backbone, nn.Module):
            backbone.compile(dynamic=False)  # in place: the names of its weights stay
            logger.info("The backbone is compiled at its first step.")
    return model


def quiet_mask_loss(pred_mask_logits: Tensor, instances: list[Instances], vis_period: int = 0) -> Tensor:
    """detectron2's `mask_rcnn_loss` without accuracies for its log, each of which waits for the device.

    Args:
        pred_mask_logits: (N, classes or 1, M, M), the logits of all proposals.
        instances: For each image its proposals with `gt_classes`, `gt_masks` and `proposal_boxes`.
        vis_period: Not used; nothing is drawn.

    Returns:
        The mean binary cross entropy over all proposals' masks of their own class.
    """
    chosen = [image for image in instances if len(image)]
    if not chosen:
        return pred_mask_logits.sum() * 0
    side, device = pred_mask_logits.shape[2], pred_mask_logits.device
    targets = [image.gt_masks.crop_and_resize(image.proposal_boxes.tensor, side).to(device) for image in chosen]
    if pred_mask_logits.shape[1] == 1:
        logits = pred_mask_logits[:, 0]
    else:
        classes = torch.cat([image.gt_classes for image in chosen]).to(torch.int64)
        logits = pred_mask_logits[torch.arange(len(pred_mask_logits), device=device), classes]
    wanted = torch.cat(targets).to(torch.float32)
    return nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="mean")


def _log_nothing(pred_logits: Tensor, gt_classes: Tensor, prefix: str = "fast_rcnn") -> None:
    """Takes the place of detectron2's `_log_classification_stats`."""
