"""The RPN's work on all images of a batch at once: which anchors are objects, and which proposals go on.

detectron2 goes through the images one by one, some sixty small operations each, and fetches three figures from the
device for every one of them. Here most are done once for the batch.

The trap this module protects against: a faster path with other results. Every figure is made by the same operation on
the same numbers, and random choices are drawn in the same order, so labels and proposals are detectron2's, bit for bit.
What is not known to come out alike goes through detectron2's own code.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

MOST_PAIRS = 2**24
"""Boxes times anchors up to which all images are matched at once: 64 MiB for each array of them."""


def install(model: nn.Module) -> bool:
    """Exchanges how a model's RPN labels anchors and chooses proposals, in place; returns whether it could."""
    rpn: Any = getattr(model, "proposal_generator", None)
    if type(rpn) is not RPN or type(rpn.anchor_matcher) is not Matcher or rpn.anchor_boundary_thresh >= 0:
        return False
    rpn.label_and_sample_anchors = MethodType(label_and_sample_anchors, rpn)
    rpn.predict_proposals = MethodType(_predict_proposals, rpn)
    return True


@torch.no_grad()
def label_and_sample_anchors(
    rpn: RPN, anchors: list[Boxes], gt_instances: list[Instances]
) -> tuple[list[Tensor], list[Tensor]]:
    """`RPN.label_and_sample_anchors` for all images at once.

    Args:
        rpn: Says how anchors are matched, and how many are sampled.
        anchors: The anchors of each of the feature maps, R altogether.
        gt_instances: The ground truth of each of N images.

    Returns:
        For each image (R,) labels: 1 object, 0 background, -1 not sampled; and (R, 4) boxes that the anchors belong to.
    """
    counts = [len(image) for image in gt_instances]
    cells, most, total = Boxes.cat(anchors), max(counts), sum(counts)
    if not 0 < len(counts) * most * len(cells) <= MOST_PAIRS:
        found: tuple[list[Tensor], list[Tensor]] = RPN.label_and_sample_anchors(rpn, anchors, gt_instances)
        return found
    device = cells.device
    boxes = Boxes.cat([image.gt_boxes for image in gt_instances])
    there = torch.arange(most)[None] < torch.tensor(counts)[:, None]
    there = there.to(device)
    # -1 stands where an image has fewer boxes than another: less than any overlap.
    overlaps = torch.full((len(counts), most, len(cells)), -1.0, device=device)
    overlaps[there] = pairwise_iou(boxes, cells)
    labels, owners = match(rpn.anchor_matcher, overlaps, there)
    _subsample(rpn, labels)
    first = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    owners += first.clamp(max=total - 1).to(device)[:, None]
    owned = boxes.tensor[owners].unbind()
    return list(labels.unbind()), [
        owned[n] if count else torch.zeros_like(cells.tensor) for n, count in enumerate(counts)
    ]


def match(matcher: Matcher, overlaps: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """detectron2's `Matcher` on N images.

    Args:
        matcher: Thresholds, their labels, and whether a box's best anchors are its own however little they overlap.
        overlaps: (N, G, R), IoU of boxes and anchors; -1 where there is no box.
        there: (N, G), where there is one.

    Returns:
        (N, R) labels in 8 bits, and (N, R) indices of the boxes with the greatest overlap.
    """
    greatest, owners = overlaps.max(dim=1)
    labels = torch.ones_like(owners, dtype=torch.int8)
    for label, low, high in zip(matcher.labels, matcher.thresholds[:-1], matcher.thresholds[1:], strict=True):
        if label != 1:
            labels.masked_fill_((greatest >= low) & (greatest < high), label)
    if matcher.allow_low_quality_matches:
        best = overlaps.amax(dim=2).masked_fill_(~there, 2.0)  # no overlap is 2
        labels.masked_fill_((overlaps == best[:, :, None]).any(dim=1), 1)
    return labels, owners


def _subsample(rpn: RPN, labels: Tensor) -> None:
    """Leaves as many labels as the loss is made from, chosen at random, and makes -1 of all others, in place."""
    objects, background = ((labels == label).nonzero() for label in (1, 0))
    shares = [torch.bincount(found[:, 0], minlength=len(labels)).tolist() for found in (objects, background)]
    wanted = int(rpn.batch_size_per_image * rpn.positive_fraction)
    chosen: list[list[Tensor]] = [[], []]
    for of_image in zip(*map(torch.split, (objects, background), shares), strict=True):
        taken = min(len(of_image[0]), wanted)
        for found, places, size in zip(chosen, of_image, (taken, rpn.batch_size_per_image - taken), strict=True):
            found.append(places[torch.randperm(len(places), device=labels.device)[:size]])
    labels.fill_(-1)
    for label, found in zip((1, 0), chosen, strict=True):
        labels[torch.cat(found).unbind(1)] = label


def _predict_proposals(
    self: RPN, anchors: list[Boxes], logits: list[Tensor], deltas: list[Tensor], image_sizes: list[tuple[int, int]]
) -> list[Instances]:
    """`RPN.predict_proposals` with `top_proposals`."""
    with torch.no_grad():
        return top_proposals(
            self._decode_proposals(anchors, deltas),
            logits,
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
    """detectron2's `find_top_rpn_proposals`; boxes of all images are clipped and looked through at once.

    Args:
        proposals: (N, anchors, 4) boxes of each feature map.
        logits: (N, anchors) of each feature map.
        image_sizes: Height and width of each image.
        nms_thresh: IoU from which a box gives way to one with a higher score on the same feature map.
        pre_nms_topk: Boxes of each feature map that are looked at.
        post_nms_topk: Boxes of each image that are returned.
        settings: `min_box_size` and `training`, as in detectron2.

    Returns:
        The proposals of each image, the highest score first.

    Raises:
        FloatingPointError: In training, a box or a score is not finite.
    """
    some_scores, some_boxes, maps = [], [], []
    for number, (boxes_here, logits_here) in enumerate(zip(proposals, logits, strict=True)):
        scores_here, places = logits_here.topk(min(logits_here.shape[1], pre_nms_topk), dim=1)
        some_scores.append(scores_here)
        some_boxes.append(boxes_here.gather(1, places[:, :, None].expand(-1, -1, boxes_here.shape[2])))
        maps.append(torch.full((places.shape[1],), number, device=places.device))
    scores, boxes, of_map = torch.cat(some_scores, dim=1), torch.cat(some_boxes, dim=1), torch.cat(maps)
    limits = torch.tensor([[[width, height] * 2] for height, width in image_sizes], dtype=boxes.dtype)
    clipped = torch.minimum(boxes.clamp(min=0), limits.to(boxes.device))
    large = ((clipped[..., 2:] - clipped[..., :2]) > settings["min_box_size"]).all(dim=2)
    finite = torch.isfinite(boxes).all() & torch.isfinite(scores).all()
    *all_large, all_finite = torch.cat([large.all(dim=1), finite[None]]).tolist()
    if not all_finite:
        found: list[Instances] = find_top_rpn_proposals(
            proposals, logits, image_sizes, nms_thresh, pre_nms_topk, post_nms_topk, **settings
        )
        return found
    results = []
    for n, image_size in enumerate(image_sizes):
        boxes_here, scores_here, of_map_here = clipped[n], scores[n], of_map
        if not all_large[n]:
            boxes_here, scores_here, of_map_here = boxes_here[large[n]], scores_here[large[n]], of_map[large[n]]
        kept = batched_nms(boxes_here, scores_here, of_map_here, nms_thresh)[:post_nms_topk]
        results.append(
            Instances(image_size, proposal_boxes=Boxes(boxes_here[kept]), objectness_logits=scores_here[kept])
        )
    return results
