"""detectron2's box and mask heads without their training statistics, each of which waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import cat, cross_entropy
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, MaskRCNNConvUpsampleHead
from detectron2.structures import Instances
from torch import Tensor, nn


class QuietFastRCNNOutputLayers(FastRCNNOutputLayers):
    """detectron2's box predictor, which logs no accuracies."""

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> dict[str, Tensor]:
        """`loss_cls` and `loss_box_reg` from (R, classes + 1) scores and (R, 4 * classes or 4) box deltas."""
        scores, deltas = predictions
        classes = cat([image.gt_classes for image in proposals], dim=0)
        boxes = cat([image.proposal_boxes.tensor for image in proposals], dim=0)
        # An image without objects has background alone, which has no box loss.
        targets = cat([(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals], dim=0)
        if self.use_sigmoid_ce:
            classification = self.sigmoid_cross_entropy_loss(scores, classes)
        else:
            classification = cross_entropy(scores, classes, reduction="mean")
        losses = {"loss_cls": classification, "loss_box_reg": self.box_reg_loss(boxes, targets, deltas, classes)}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}


class QuietMaskRCNNHead(MaskRCNNConvUpsampleHead):
    """detectron2's mask head, which logs no accuracies and draws nothing."""

    def forward(self, x: Tensor, instances: list[Instances]) -> Any:
        """The loss in training; in inference the instances with their `pred_masks`."""
        if self.training:
            return {"loss_mask": mask_loss(self.layers(x), instances) * self.loss_weight}
        return super().forward(x, instances)


def mask_loss(pred_mask_logits: Tensor, instances: list[Instances]) -> Tensor:
    """detectron2's `mask_rcnn_loss`: the mean binary cross entropy over all proposals' masks of their own class.

    `pred_mask_logits` is (N, classes or 1, M, M), for the proposals of all images.
    """
    nonempty = [image for image in instances if len(image)]
    if not nonempty:
        return pred_mask_logits.sum() * 0
    side, device = pred_mask_logits.shape[2], pred_mask_logits.device
    masks = [image.gt_masks.crop_and_resize(image.proposal_boxes.tensor, side).to(device) for image in nonempty]
    if pred_mask_logits.shape[1] == 1:
        logits = pred_mask_logits[:, 0]
    else:
        classes = torch.cat([image.gt_classes for image in nonempty]).to(torch.int64)
        logits = pred_mask_logits[torch.arange(len(pred_mask_logits), device=device), classes]
    targets = torch.cat(masks).to(torch.float32)
    return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="mean")
