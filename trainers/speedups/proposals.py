"""The RPN and ROI heads on all images of a batch at once, where detectron2 goes through them one by one.

detectron2 runs nearly 300 small operations for each image and fetches figures from the device for every one of them.
Here every figure comes from the same operation on the same numbers, and random choices are drawn in the same order, so
labels, samples, losses and proposals are detectron2's, bit for bit. The counts of samples that it logs are left out.
"""

from __future__ import annotations

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals, find_top_rpn_proposals
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from fvcore.nn import smooth_l1_loss
from torch import Tensor, nn

MAX_PAIRS = 2**24
"""Objects times anchors or proposals up to which all images are matched at once: 64 MiB for each array of them."""


class BatchedRPN(RPN):
    """detectron2's RPN, its images labelled and searched together."""

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Chooses among the R anchors of all feature maps those that the losses are made from.

        Returns:
            For each image (R,) labels: 1 object, 0 background, -1 not sampled; and (R, 4) boxes the anchors belong to.
        """
        all_anchors = Boxes.cat(anchors)
        counts = [len(image) for image in gt_instances]
        num_pairs = len(counts) * max(counts) * len(all_anchors)
        usual = self.anchor_boundary_thresh < 0 and type(self.anchor_matcher) is Matcher
        if not (usual and 0 < num_pairs <= MAX_PAIRS):
            labelled: tuple[list[Tensor], list[Tensor]] = super().label_and_sample_anchors(anchors, gt_instances)
            return labelled
        device, num_boxes = all_anchors.device, torch.tensor(counts)
        boxes = Boxes.cat([image.gt_boxes for image in gt_instances])
        valid_mask = (torch.arange(max(counts))[None] < num_boxes[:, None]).to(device)
        # -1 stands where an image has fewer boxes than another: less than any overlap.
        overlaps = torch.full((len(counts), max(counts), len(all_anchors)), -1.0, device=device)
        overlaps[valid_mask] = pairwise_iou(boxes, all_anchors)
        labels, owners = match(self.anchor_matcher, overlaps, valid_mask)
        samples = sample(labels == 1, labels == 0, self.batch_size_per_image, self.positive_fraction)
        labels.fill_(-1)
        for label, chosen in zip((1, 0), zip(*samples, strict=True), strict=True):
            labels[torch.cat(chosen).unbind(1)] = label
        first_box = num_boxes.cumsum(0) - num_boxes
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
        """`loss_rpn_cls` and `loss_rpn_loc`; regression targets are computed for the sampled objects alone.

        Predictions are (N, anchors, …) of each feature map; labels and boxes are `label_and_sample_anchors`'.
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
        topk = self.pre_nms_topk[self.training], self.post_nms_topk[self.training]
        return top_proposals(
            boxes, pred_objectness_logits, image_sizes, self.nms_thresh, *topk, self.min_box_size, self.training
        )


def top_proposals(
    proposals: list[Tensor],
    logits: list[Tensor],
    image_sizes: list[tuple[int, int]],
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
) -> list[Instances]:
    """detectron2's `find_top_rpn_proposals`; boxes of all images are clipped and checked at once.

    `proposals` are (N, anchors, 4) and `logits` (N, anchors) of each feature map.

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
    large_mask = ((clipped[..., 2:] - clipped[..., :2]) > min_box_size).all(dim=2)
    finite = torch.isfinite(boxes).all() & torch.isfinite(scores).all()
    *all_large, all_finite = torch.cat([large_mask.all(dim=1), finite[None]]).tolist()
    if not all_finite:
        found: list[Instances] = find_top_rpn_proposals(
            proposals, logits, image_sizes, nms_thresh, pre_nms_topk, post_nms_topk, min_box_size, training
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


class _Batched(ROIHeads):
    """What detectron2's ROI heads have in common, for all images at once."""

    @torch.no_grad()
    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """Chooses the proposals that the heads are trained on.

        Returns:
            For each image the sampled proposals with their `gt_classes` and, where the image has objects, all other
            fields of `targets`.
        """
        counts = [len(image) for image in targets]
        matcher, num_pairs = self.proposal_matcher, sum(counts) * sum(len(image) for image in proposals)
        usual = type(matcher) is Matcher and not matcher.allow_low_quality_matches
        usual &= all(set(image.get_fields()) == {"proposal_boxes", "objectness_logits"} for image in proposals)
        if not (usual and 0 < num_pairs <= MAX_PAIRS):
            sampled: list[Instances] = super().label_and_sample_proposals(proposals, targets)
            return sampled
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        boxes = Boxes.cat([image.proposal_boxes for image in proposals])
        logits = torch.cat([image.objectness_logits for image in proposals])
        objects = Boxes.cat([image.gt_boxes for image in targets])
        numbers = torch.arange(len(counts))
        image_of_box = torch.repeat_interleave(numbers, torch.tensor([len(p) for p in proposals])).to(logits.device)
        image_of_object = torch.repeat_interleave(numbers, torch.tensor(counts)).to(logits.device)
        overlaps = pairwise_iou(objects, boxes).masked_fill_(image_of_object[:, None] != image_of_box, -1.0)
        max_overlaps, owners = overlaps.max(dim=0)
        labels = label_by_thresholds(matcher, max_overlaps)
        classes = torch.cat([image.gt_classes for image in targets])[owners]
        classes[(labels == 0) | (max_overlaps < 0)] = self.num_classes  # less than 0: an image without objects
        classes[(labels == -1) & (max_overlaps >= 0)] = -1
        in_image = image_of_box == numbers.to(logits.device)[:, None]
        background = classes == self.num_classes
        objects_mask = in_image & (classes != -1) & ~background
        samples = sample(objects_mask, in_image & background, self.batch_size_per_image, self.positive_fraction)
        chosen = [torch.cat(each)[:, 1] for each in samples]
        return self._sampled(targets, chosen, owners, (boxes.tensor, logits, classes, objects.tensor[owners]))

    def _sampled(
        self, targets: list[Instances], chosen: list[Tensor], owners: Tensor, values: tuple[Tensor, ...]
    ) -> list[Instances]:
        """The chosen proposals of each image, with boxes, logits, classes and objects' boxes from `values`."""
        all_chosen, counts = torch.cat(chosen), [len(each) for each in chosen]
        by_image = zip(*(torch.split(value[all_chosen], counts) for value in values), strict=True)
        result, first_object = [], 0
        for target, indices, (boxes, logits, classes, gt_boxes) in zip(targets, chosen, by_image, strict=True):
            sampled = Instances(target.image_size, proposal_boxes=Boxes(boxes), objectness_logits=logits)
            sampled.gt_classes = classes
            if len(target):
                sampled.gt_boxes = Boxes(gt_boxes)
                for name, value in target.get_fields().items():
                    if name.startswith("gt_") and not sampled.has(name):
                        sampled.set(name, value[owners[indices] - first_object])
            first_object += len(target)
            result.append(sampled)
        return result


class BatchedStandardROIHeads(_Batched, StandardROIHeads):
    """`StandardROIHeads` (FPN) with its images' proposals sampled together."""


class BatchedRes5ROIHeads(_Batched, Res5ROIHeads):
    """`Res5ROIHeads` (C4) with its images' proposals sampled together."""


class BatchedCascadeROIHeads(_Batched, CascadeROIHeads):
    """`CascadeROIHeads` with its images' proposals sampled together."""


def match(matcher: Matcher, overlaps: Tensor, valid_mask: Tensor) -> tuple[Tensor, Tensor]:
    """detectron2's `Matcher` on N images.

    `overlaps` is the IoU of boxes and anchors, (N, G, R), and -1 where `valid_mask`, (N, G), says that there is no box.

    Returns:
        (N, R) labels in 8 bits, and (N, R) indices of the boxes with the greatest overlap.
    """
    max_overlaps, owners = overlaps.max(dim=1)
    labels = label_by_thresholds(matcher, max_overlaps)
    if matcher.allow_low_quality_matches:
        best = overlaps.amax(dim=2).masked_fill_(~valid_mask, 2.0)  # no overlap is 2
        labels.masked_fill_((overlaps == best[:, :, None]).any(dim=1), 1)
    return labels, owners


def label_by_thresholds(matcher: Matcher, max_overlaps: Tensor) -> Tensor:
    """The label of each anchor or proposal by its greatest overlap with an object; same shape, 8 bits."""
    labels = torch.ones_like(max_overlaps, dtype=torch.int8)
    for label, low, high in zip(matcher.labels, matcher.thresholds[:-1], matcher.thresholds[1:], strict=True):
        if label != 1:
            labels.masked_fill_((max_overlaps >= low) & (max_overlaps < high), label)
    return labels


def sample(
    positive_mask: Tensor, negative_mask: Tensor, num_samples: int, positive_fraction: float
) -> list[tuple[Tensor, Tensor]]:
    """detectron2's `subsample_labels` of each image, with its random numbers.

    The masks, (N, R), say which boxes are objects and which background; objects are at most `positive_fraction` of the
    sample.

    Returns:
        For each image the chosen objects and the chosen background, each as (…, 2) indices of image and box.
    """
    indices = positive_mask.nonzero(), negative_mask.nonzero()
    counts = [torch.bincount(each[:, 0], minlength=len(positive_mask)).tolist() for each in indices]
    samples = []
    for positive, negative in zip(*map(torch.split, indices, counts), strict=True):
        num_positive = min(len(positive), int(num_samples * positive_fraction))
        chosen = torch.randperm(len(positive), device=positive.device)[:num_positive]
        others = torch.randperm(len(negative), device=negative.device)[: num_samples - num_positive]
        samples.append((positive[chosen], negative[others]))
    return samples
