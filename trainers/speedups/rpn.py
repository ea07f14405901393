"""The RPN on all images of a batch at once, where detectron2 goes through them one by one.

detectron2 runs nearly 300 small operations for each image and fetches figures from the device for every one of them.
Labels, losses and proposals are the same, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Boxes, Instances, pairwise_iou
from fvcore.nn import smooth_l1_loss
from torch import Tensor, nn

from trainers.speedups.matching import MAX_PAIRS, match, sample


class BatchedRPN(RPN):  # type: ignore[misc]
    """detectron2's RPN, its images labelled and searched together. It logs no counts of samples."""

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Chooses the anchors that the losses are made from.

        Args:
            anchors: The anchors of each of the feature maps, R altogether.
            gt_instances: The ground truth of each of N images.

        Returns:
            For each image (R,) labels: 1 object, 0 background, -1 not sampled; and (R, 4) boxes the anchors belong to.
        """
        all_anchors = Boxes.cat(anchors)
        counts = [len(image) for image in gt_instances]
        num_pairs = len(counts) * max(counts) * len(all_anchors)
        if (
            not 0 < num_pairs <= MAX_PAIRS
            or self.anchor_boundary_thresh >= 0
            or type(self.anchor_matcher) is not Matcher
        ):
            labelled: tuple[list[Tensor], list[Tensor]] = super().label_and_sample_anchors(anchors, gt_instances)
            return labelled
        device = all_anchors.device
        boxes = Boxes.cat([image.gt_boxes for image in gt_instances])
        valid_mask = (torch.arange(max(counts))[None] < torch.tensor(counts)[:, None]).to(device)
        # -1 stands where an image has fewer boxes than another: less than any overlap.
        overlaps = torch.full((len(counts), max(counts), len(all_anchors)), -1.0, device=device)
        overlaps[valid_mask] = pairwise_iou(boxes, all_anchors)
        labels, owners = match(self.anchor_matcher, overlaps, valid_mask)
        samples = sample(labels == 1, labels == 0, self.batch_size_per_image, self.positive_fraction)
        labels.fill_(-1)
        for label, chosen in zip((1, 0), zip(*samples, strict=True), strict=True):
            labels[torch.cat(chosen).unbind(1)] = label
        first_box = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
        owners += first_box.clamp(max=sum(counts) - 1).to(device)[:, None]
        matched = boxes.tensor[owners].unbind()
        return list(labels.unbind()), [
            matched[n] if count else torch.zeros_like(all_anchors.tensor) for n, count in enumerate(counts)
        ]

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """The losses; regression targets are computed for the sampled objects alone.

        Args:
            anchors: The anchors of each of the feature maps, R altogether.
            pred_objectness_logits: (N, anchors) of each feature map.
            gt_labels: (R,) of each image, as from `label_and_sample_anchors`.
            pred_anchor_deltas: (N, anchors, 4) of each feature map.
            gt_boxes: (R, 4) of each image, as from `label_and_sample_anchors`.

        Returns:
            `loss_rpn_cls` and `loss_rpn_loc`.
        """
        if self.box_reg_loss_type != "smooth_l1":
            found: dict[str, Tensor] = super().losses(
                anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
            )
            return found
        labels = torch.stack(gt_labels)
        positive_mask, sampled_mask = labels == 1, labels >= 0
        all_anchors = Boxes.cat(anchors).tensor.expand(len(labels), -1, -1)
        targets = self.box2box_transform.get_deltas(all_anchors[positive_mask], torch.stack(gt_boxes)[positive_mask])
        deltas = torch.cat(pred_anchor_deltas, dim=1)[positive_mask]
        location = smooth_l1_loss(deltas, targets, beta=self.smooth_l1_beta, reduction="sum")
        objectness = nn.functional.binary_cross_entropy_with_logits(
            torch.cat(pred_objectness_logits, dim=1)[sampled_mask], labels[sampled_mask].float(), reduction="sum"
        )
        normalizer = self.batch_size_per_image * len(labels)
        losses = {"loss_rpn_cls": objectness / normalizer, "loss_rpn_loc": location / normalizer}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """The best boxes of each image, decoded; without gradients."""
        boxes = []
        for of_map, deltas in zip(anchors, pred_anchor_deltas, strict=True):
            expanded = of_map.tensor.expand(len(deltas), -1, -1).reshape(-1, 4)
            boxes.append(self.box2box_transform.apply_deltas(deltas.reshape(-1, 4), expanded).view(len(deltas), -1, 4))
        return top_proposals(
            boxes,
            pred_objectness_logits,
            image_sizes,
            nms_thresh=self.nms_thresh,
            pre_nms_topk=self.pre_nms_topk[self.training],
            post_nms_topk=self.post_nms_topk[self.training],
            min_box_size=self.min_box_size,
            training=self.training,
        )


def top_proposals(
    proposals: list[Tensor],
    logits: list[Tensor],
    image_sizes: list[tuple[int, int]],
    *,
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    **settings: Any,
) -> list[Instances]:
    """detectron2's `find_top_rpn_proposals`; boxes of all images are clipped and checked at once.

    Args:
        proposals: (N, anchors, 4) boxes of each feature map.
        logits: (N, anchors) of each feature map.
        image_sizes: Height and width of each image.
        nms_thresh: IoU from which a box gives way to one with a higher score on the same feature map.
        pre_nms_topk: Boxes of each feature map that are considered.
        post_nms_topk: Boxes of each image that are returned.
        settings: `min_box_size` and `training`, as in detectron2.

    Returns:
        The proposals of each image, the highest score first.

    Raises:
        FloatingPointError: In training, a box or a score is not finite.
    """
    top_scores, top_boxes, maps = [], [], []
    for number, (map_boxes, map_logits) in enumerate(zip(proposals, logits, strict=True)):
        map_scores, indices = map_logits.topk(min(map_logits.shape[1], pre_nms_topk), dim=1)
        top_scores.append(map_scores)
        top_boxes.append(map_boxes.gather(1, indices[:, :, None].expand(-1, -1, map_boxes.shape[2])))
        maps.append(torch.full((indices.shape[1],), number, device=indices.device))
    scores, boxes, map_of_box = torch.cat(top_scores, dim=1), torch.cat(top_boxes, dim=1), torch.cat(maps)
    limits = torch.tensor([[[width, height] * 2] for height, width in image_sizes], dtype=boxes.dtype)
    clipped = torch.minimum(boxes.clamp(min=0), limits.to(boxes.device))
    large_mask = ((clipped[..., 2:] - clipped[..., :2]) > settings["min_box_size"]).all(dim=2)
    finite = torch.isfinite(boxes).all() & torch.isfinite(scores).all()
    *all_large, all_finite = torch.cat([large_mask.all(dim=1), finite[None]]).tolist()
    if not all_finite:
        found: list[Instances] = find_top_rpn_proposals(
            proposals, logits, image_sizes, nms_thresh, pre_nms_topk, post_nms_topk, **settings
        )
        return found
    results = []
    for n, image_size in enumerate(image_sizes):
        image_boxes, image_scores, image_maps = clipped[n], scores[n], map_of_box
        if not all_large[n]:
            mask = large_mask[n]
            image_boxes, image_scores, image_maps = image_boxes[mask], image_scores[mask], map_of_box[mask]
        best = batched_nms(image_boxes, image_scores, image_maps, nms_thresh)[:post_nms_topk]
        results.append(
            Instances(image_size, proposal_boxes=Boxes(image_boxes[best]), objectness_logits=image_scores[best])
        )
    return results
