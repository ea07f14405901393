"""ROI heads that label and sample the proposals of all images of a batch at once, as detectron2 does one by one."""

from __future__ import annotations

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from trainers.speedups.matching import MAX_PAIRS, label_by_thresholds, sample

_PROPOSAL_FIELDS = {"proposal_boxes", "objectness_logits"}


class _Batched(ROIHeads):  # type: ignore[misc]
    """What detectron2's ROI heads have in common, for all images at once. It logs no counts of samples."""

    @torch.no_grad()
    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """Chooses the proposals that the heads are trained on.

        Args:
            proposals: For each of N images `proposal_boxes` and `objectness_logits`.
            targets: The ground truth of each image.

        Returns:
            For each image the sampled proposals with their `gt_classes` and, where the image has objects, all other
            fields of `targets`: detectron2's, bit for bit.
        """
        counts = [len(image) for image in targets]
        num_pairs = sum(counts) * sum(len(image) for image in proposals)
        if (
            not 0 < num_pairs <= MAX_PAIRS
            or type(self.proposal_matcher) is not Matcher
            or self.proposal_matcher.allow_low_quality_matches
            or any(set(image.get_fields()) != _PROPOSAL_FIELDS for image in proposals)
        ):
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
        labels = label_by_thresholds(self.proposal_matcher, max_overlaps)
        classes = torch.cat([image.gt_classes for image in targets])[owners]
        classes[(labels == 0) | (max_overlaps < 0)] = self.num_classes  # less than 0: an image without objects
        classes[(labels == -1) & (max_overlaps >= 0)] = -1
        in_image = image_of_box == numbers.to(logits.device)[:, None]
        background = classes == self.num_classes
        samples = sample(
            in_image & (classes != -1) & ~background,
            in_image & background,
            self.batch_size_per_image,
            self.positive_fraction,
        )
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


class BatchedStandardROIHeads(_Batched, StandardROIHeads):  # type: ignore[misc]
    """`StandardROIHeads` (FPN) with its images' proposals sampled together."""


class BatchedRes5ROIHeads(_Batched, Res5ROIHeads):  # type: ignore[misc]
    """`Res5ROIHeads` (C4) with its images' proposals sampled together."""


class BatchedCascadeROIHeads(_Batched, CascadeROIHeads):  # type: ignore[misc]
    """`CascadeROIHeads` with its images' proposals sampled together."""
