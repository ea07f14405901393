"""RPN and ROI heads on all images of a batch at once: which anchors and proposals are objects, and which go on.

detectron2 goes through the images one by one, nearly 300 small operations each, and fetches figures from the device for
every one of them. Here most are done once for the batch.

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
from detectron2.modeling.proposal_generator.proposal_utils import (
    add_ground_truth_to_proposals,
    find_top_rpn_proposals,
)
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from fvcore.nn import smooth_l1_loss
from torch import Tensor, nn

MAX_PAIRS = 2**24
"""Objects times anchors or proposals up to which all images are matched at once: 64 MiB for each array of them."""


def install(model: nn.Module) -> int:
    """Exchanges how a model's RPN and ROI heads label and choose boxes, in place; returns for how many of the two."""
    rpn: Any = getattr(model, "proposal_generator", None)
    heads: Any = getattr(model, "roi_heads", None)
    exchanged = 0
    if type(rpn) is RPN and type(rpn.anchor_matcher) is Matcher and rpn.anchor_boundary_thresh < 0:
        rpn.label_and_sample_anchors = MethodType(label_and_sample_anchors, rpn)
        rpn.predict_proposals = MethodType(_predict_proposals, rpn)
        if rpn.box_reg_loss_type == "smooth_l1":
            rpn.losses = MethodType(losses, rpn)
        exchanged += 1
    own = getattr(type(heads), "label_and_sample_proposals", None)
    if own is ROIHeads.label_and_sample_proposals and type(heads.proposal_matcher) is Matcher:
        heads.label_and_sample_proposals = MethodType(label_and_sample_proposals, heads)
        exchanged += 1
    return exchanged


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
    if not 0 < len(counts) * most * len(cells) <= MAX_PAIRS:
        found: tuple[list[Tensor], list[Tensor]] = RPN.label_and_sample_anchors(rpn, anchors, gt_instances)
        return found
    device = cells.device
    boxes = Boxes.cat([image.gt_boxes for image in gt_instances])
    there = (torch.arange(most)[None] < torch.tensor(counts)[:, None]).to(device)
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
    labels = _by_thresholds(matcher, greatest)
    if matcher.allow_low_quality_matches:
        best = overlaps.amax(dim=2).masked_fill_(~there, 2.0)  # no overlap is 2
        labels.masked_fill_((overlaps == best[:, :, None]).any(dim=1), 1)
    return labels, owners


def _by_thresholds(matcher: Matcher, greatest: Tensor) -> Tensor:
    labels = torch.ones_like(greatest, dtype=torch.int8)
    for label, low, high in zip(matcher.labels, matcher.thresholds[:-1], matcher.thresholds[1:], strict=True):
        if label != 1:
            labels.masked_fill_((greatest >= low) & (greatest < high), label)
    return labels


def _subsample(rpn: RPN, labels: Tensor) -> None:
    """Leaves as many labels as the loss is made from, chosen at random, and makes -1 of all others, in place."""
    chosen = _choose(labels == 1, labels == 0, rpn.batch_size_per_image, rpn.positive_fraction)
    labels.fill_(-1)
    for label, found in zip((1, 0), zip(*chosen, strict=True), strict=True):
        labels[torch.cat(found).unbind(1)] = label


def _choose(objects: Tensor, background: Tensor, size: int, fraction: float) -> list[tuple[Tensor, Tensor]]:
    """detectron2's `subsample_labels` of each image, with its random numbers.

    Args:
        objects: (N, R), which boxes are objects.
        background: (N, R), which are not.
        size: How many are wanted of an image.
        fraction: Most objects among them, as a share.

    Returns:
        For each image the objects and the background that were chosen, each as (…, 2) indices of image and box.
    """
    places = objects.nonzero(), background.nonzero()
    counts = [torch.bincount(each[:, 0], minlength=len(objects)).tolist() for each in places]
    chosen = []
    for of_objects, of_background in zip(*map(torch.split, places, counts), strict=True):
        taken = min(len(of_objects), int(size * fraction))
        first = of_objects[torch.randperm(len(of_objects), device=objects.device)[:taken]]
        rest = of_background[torch.randperm(len(of_background), device=objects.device)[: size - taken]]
        chosen.append((first, rest))
    return chosen


@torch.no_grad()
def label_and_sample_proposals(
    heads: ROIHeads, proposals: list[Instances], targets: list[Instances]
) -> list[Instances]:
    """`ROIHeads.label_and_sample_proposals` for all images at once.

    Args:
        heads: Says how proposals are matched, and how many are sampled.
        proposals: For each of N images `proposal_boxes` and `objectness_logits`.
        targets: The ground truth of each image.

    Returns:
        For each image the sampled proposals with their `gt_classes` and, where the image has objects, all else that
        `targets` tell of them. detectron2 also counts the samples for its log; nobody reads that here.
    """
    matcher = heads.proposal_matcher
    counts = [len(image) for image in targets]
    pairs = sum(counts) * sum(len(image) for image in proposals)
    usual = all(set(image.get_fields()) == {"proposal_boxes", "objectness_logits"} for image in proposals)
    if not 0 < pairs <= MAX_PAIRS or matcher.allow_low_quality_matches or not usual:
        found: list[Instances] = ROIHeads.label_and_sample_proposals(heads, proposals, targets)
        return found
    if heads.proposal_append_gt:
        proposals = add_ground_truth_to_proposals(targets, proposals)
    sizes = [len(image) for image in proposals]
    numbers = torch.arange(len(sizes))
    image_of = torch.repeat_interleave(numbers, torch.tensor(sizes)).to(proposals[0].objectness_logits.device)
    image_of_object = torch.repeat_interleave(numbers, torch.tensor(counts)).to(image_of.device)
    boxes, logits = Boxes.cat([image.proposal_boxes for image in proposals]), [p.objectness_logits for p in proposals]
    objects = Boxes.cat([image.gt_boxes for image in targets])
    overlaps = pairwise_iou(objects, boxes).masked_fill_(image_of_object[:, None] != image_of, -1.0)
    greatest, owners = overlaps.max(dim=0)
    labels = _by_thresholds(matcher, greatest)
    classes = torch.cat([image.gt_classes for image in targets])[owners]
    classes[(labels == 0) | (greatest < 0)] = heads.num_classes  # less than 0: an image without objects
    classes[(labels == -1) & (greatest >= 0)] = -1
    one_hot = image_of == numbers.to(image_of.device)[:, None]
    is_background = classes == heads.num_classes
    chosen = _choose(
        one_hot & (classes != -1) & ~is_background, one_hot & is_background,
        heads.batch_size_per_image, heads.positive_fraction,
    )  # fmt: skip
    of_images = [torch.cat(each)[:, 1] for each in chosen]
    every, shares = torch.cat(of_images), [len(each) for each in of_images]
    fields = (boxes.tensor[every], torch.cat(logits)[every], classes[every], objects.tensor[owners[every]])
    result, first = [], 0
    for image, which, *values in zip(targets, of_images, *(value.split(shares) for value in fields), strict=True):
        sampled = Instances(image.image_size, proposal_boxes=Boxes(values[0]), objectness_logits=values[1])
        sampled.gt_classes = values[2]
        if len(image):
            sampled.gt_boxes = Boxes(values[3])
            for name, value in image.get_fields().items():
                if name.startswith("gt_") and not sampled.has(name):
                    sampled.set(name, value[owners[which] - first])
        first += len(image)
        result.append(sampled)
    return result


def losses(
    rpn: RPN,
    anchors: list[Boxes],
    logits: list[Tensor],
    labels: list[Tensor],
    deltas: list[Tensor],
    boxes: list[Tensor],
) -> dict[str, Tensor]:
    """`RPN.losses`; what the boxes should be is worked out for the sampled objects alone.

    Args:
        rpn: Its weights of the losses.
        anchors: The anchors of each of the feature maps, R altogether.
        logits: (N, anchors) of each feature map.
        labels: (R,) of each image, as from `label_and_sample_anchors`.
        deltas: (N, anchors, 4) of each feature map.
        boxes: (R, 4) of each image, as from `label_and_sample_anchors`.

    Returns:
        `loss_rpn_cls` and `loss_rpn_loc`. detectron2 also counts the samples for its log; nobody reads that here.
    """
    label = torch.stack(labels)
    objects, sampled = label == 1, label >= 0
    cells = Boxes.cat(anchors).tensor
    wanted = rpn.box2box_transform.get_deltas(cells.expand(len(label), -1, -1)[objects], torch.stack(boxes)[objects])
    location = smooth_l1_loss(torch.cat(deltas, dim=1)[objects], wanted, beta=rpn.smooth_l1_beta, reduction="sum")
    objectness = nn.functional.binary_cross_entropy_with_logits(
        torch.cat(logits, dim=1)[sampled], label[sampled].to(torch.float32), reduction="sum"
    )
    found = {"loss_rpn_cls": objectness, "loss_rpn_loc": location}
    share = rpn.batch_size_per_image * len(label)
    return {name: loss / share * rpn.loss_weight.get(name, 1.0) for name, loss in found.items()}


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
