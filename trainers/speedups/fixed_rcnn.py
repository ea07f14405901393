"""Mask R-CNN whose training step has no shape that depends on data, and which models can be trained so."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling import FPN, GeneralizedRCNN, StandardROIHeads
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers, MaskRCNNConvUpsampleHead
from torch import Tensor, nn

from trainers.speedups.level_pooling import is_roi_align
from trainers.speedups.padded_batch import PaddedBatch


class FixedRCNN(GeneralizedRCNN):
    """detectron2's `GeneralizedRCNN`, which also trains on padded batches.

    Its parts must be `FixedRPN` and `FixedROIHeads`. Features near the edge of an image, and statistics of norms that
    are not frozen, see the padding up to the canvas as they see detectron2's own, which depends on the other images.
    """

    def forward(self, batched_inputs: PaddedBatch | list[dict[str, Any]]) -> Any:
        """The losses of a padded batch, in training; lists of records go the way of detectron2."""
        if not isinstance(batched_inputs, PaddedBatch):
            return super().forward(batched_inputs)
        batch = batched_inputs
        features = self.backbone(self.normalized(batch))
        padded = padded_size(batch.sizes, self.backbone.size_divisibility)
        proposals, valid_mask, losses = self.proposal_generator.fixed_losses(batch, features, padded)
        return self.roi_heads.fixed_losses(batch, features, proposals, valid_mask) | losses

    def normalized(self, batch: PaddedBatch) -> Tensor:
        """The images (N, 3, H, W) as the backbone takes them; padded with zeros after they are normalized."""
        height, width = batch.images.shape[2:]
        limits = batch.sizes[:, :, None]
        rows = torch.arange(height, device=limits.device) < limits[:, 0]
        columns = torch.arange(width, device=limits.device) < limits[:, 1]
        padding = ~(rows[:, None, :, None] & columns[:, None, None])
        normalized: Tensor = (batch.images - self.pixel_mean) / self.pixel_std
        return normalized.masked_fill_(padding, 0.0)


def padded_size(sizes: Tensor, divisibility: int) -> Tensor:
    """Height and width to which detectron2 pads images of (N, 2) sizes: (2,), the largest, rounded up to a multiple."""
    return (sizes.amax(dim=0) + divisibility - 1).div(divisibility, rounding_mode="floor") * divisibility


def unsupported(model: nn.Module) -> str | None:
    """Why a model cannot be trained on padded batches, in words; none if it can.

    It may have been exchanged already: a replacement counts as the class of detectron2 that it replaces.
    """
    if _original(model) is not GeneralizedRCNN:
        return f"{_original(model).__name__} is not GeneralizedRCNN"
    parts: Any = model
    return (
        _unsupported_images(parts) or _unsupported_rpn(parts.proposal_generator) or _unsupported_heads(parts.roi_heads)
    )


def _original(part: object) -> type:
    """The class of a part, or the one that its class replaces."""
    return next(kind for kind in type(part).__mro__ if not kind.__module__.startswith("trainers."))


def _other_class(expected: dict[type, object]) -> str | None:
    """What is wrong with the first part that is not exactly of its class."""
    for kind, part in expected.items():
        if _original(part) is not kind:
            return f"{_original(part).__name__} is not {kind.__name__}"
    return None


def _unsupported_images(model: Any) -> str | None:
    if model.vis_period > 0:
        return "VIS_PERIOD draws training images"
    if _original(model.backbone) is FPN and model.backbone.padding_constraints["square_size"] > 0:
        return "MODEL.FPN.SQUARE_PAD pads to squares"
    return _other_class({FPN: model.backbone})


def _unsupported_rpn(rpn: Any) -> str | None:
    other = _other_class({RPN: rpn})
    if other:
        return other
    if rpn.box_reg_loss_type != "smooth_l1":
        return f"MODEL.RPN.BBOX_REG_LOSS_TYPE is {rpn.box_reg_loss_type}"
    if rpn.anchor_boundary_thresh >= 0:
        return "MODEL.RPN.BOUNDARY_THRESH leaves out anchors"
    return _other_class(
        {
            StandardRPNHead: rpn.rpn_head,
            DefaultAnchorGenerator: rpn.anchor_generator,
            Matcher: rpn.anchor_matcher,
            Box2BoxTransform: rpn.box2box_transform,
        }
    )


def _unsupported_heads(heads: Any) -> str | None:
    other = _other_class({StandardROIHeads: heads})
    if other:
        return other
    if heads.keypoint_on:
        return "MODEL.KEYPOINT_ON trains keypoints"
    if heads.train_on_pred_boxes:
        return "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES trains masks on predicted boxes"
    predictor = heads.box_predictor
    other = _other_class({FastRCNNOutputLayers: predictor, Matcher: heads.proposal_matcher})
    if other:
        return other
    if predictor.box_reg_loss_type != "smooth_l1":
        return f"MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE is {predictor.box_reg_loss_type}"
    if predictor.use_sigmoid_ce:
        return "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE takes another loss"
    if any(isinstance(part, nn.BatchNorm2d | nn.SyncBatchNorm) for part in heads.modules()):
        return "batch norm in the ROI heads would count empty slots"
    return (
        _other_class({Box2BoxTransform: predictor.box2box_transform, FastRCNNConvFCHead: heads.box_head})
        or _unsupported_pooler(heads.box_pooler)
        or (_unsupported_mask_head(heads) if heads.mask_on else None)
    )


def _unsupported_mask_head(heads: Any) -> str | None:
    if heads.mask_pooler is None:
        return "the mask head has no pooler"
    return _other_class({MaskRCNNConvUpsampleHead: heads.mask_head}) or _unsupported_pooler(heads.mask_pooler)


def _unsupported_pooler(pooler: Any) -> str | None:
    return _other_class({ROIPooler: pooler}) or (None if is_roi_align(pooler) else "its pooler is not ROIAlign")
