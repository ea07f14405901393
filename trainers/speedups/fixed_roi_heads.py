"""The ROI heads in operations of fixed shapes: samples, losses and mask targets of all images without a wait.

Each image has as many slots as detectron2 samples proposals at most, objects first. The box head runs on all slots, the
mask head on those that can hold an object; slots without use add nothing to a loss or a gradient, and a loss is divided
by what detectron2 divides by.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from trainers.speedups.device_masks import draw_masks
from trainers.speedups.fixed_sampling import box_deltas, sample
from trainers.speedups.level_pooling import pool_boxes
from trainers.speedups.matching import best_overlaps
from trainers.speedups.padded_batch import PaddedBatch
from trainers.speedups.proposals import BatchedStandardROIHeads, label_by_thresholds


class Slots(NamedTuple):
    """S proposals of each of N images that the heads are trained on: objects, then background, then empty slots."""

    boxes: Tensor
    """(N, S, 4): corners of the proposals in pixels; in an empty slot those of any proposal."""
    classes: Tensor
    """(N, S), int64: the class of the object, `num_classes` where there is none."""
    owners: Tensor
    """(N, S), int64: the number of the object in its image; means nothing where there is none."""
    valid_mask: Tensor
    """(N, S), bool: whether the slot is used."""
    positive_mask: Tensor
    """(N, S), bool: whether it holds an object."""

    def first(self, count: int) -> Slots:
        """The first slots of each image."""
        return Slots(*(each[:, :count] for each in self))


class FixedROIHeads(BatchedStandardROIHeads):
    """`StandardROIHeads` for padded batches; lists of instances go the way of `BatchedStandardROIHeads`."""

    def fixed_losses(
        self, batch: PaddedBatch, features: dict[str, Tensor], proposals: Tensor, valid_mask: Tensor
    ) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            batch: N images and their objects.
            features: The backbone's feature maps of the canvas.
            proposals: (N, P, 4), float32: corners in pixels.
            valid_mask: (N, P), bool: which of them hold.

        Returns:
            `loss_cls`, `loss_box_reg` and, of a model with masks, `loss_mask`.
        """
        slots = self.sample_slots(batch, proposals, valid_mask)
        positive = slots.first(int(self.batch_size_per_image * self.positive_fraction))
        losses = self.box_losses(batch, features, slots, positive)
        if self.mask_on:
            losses["loss_mask"] = self.mask_loss(batch, features, positive)
        return losses

    @torch.no_grad()
    def sample_slots(self, batch: PaddedBatch, proposals: Tensor, valid_mask: Tensor) -> Slots:
        """Chooses the proposals that the heads are trained on, as `label_and_sample_proposals` of detectron2."""
        if self.proposal_append_gt:
            numbers = torch.arange(batch.boxes.shape[1], device=proposals.device)
            proposals = torch.cat([proposals, batch.boxes], dim=1)
            valid_mask = torch.cat([valid_mask, numbers < batch.num_objects[:, None]], dim=1)
        overlaps, owners = best_overlaps(batch.boxes, batch.num_objects, proposals)
        labels = label_by_thresholds(self.proposal_matcher, overlaps)
        labels.masked_fill_(batch.num_objects[:, None] == 0, 0)  # without objects all is background
        samples = sample(
            valid_mask & (labels == 1), valid_mask & (labels == 0), self.batch_size_per_image, self.positive_fraction
        )
        indices = samples.indices
        owners = owners.gather(1, indices)
        classes = batch.classes.gather(1, owners).masked_fill(~samples.positive_mask, self.num_classes)
        boxes = proposals.gather(1, indices[..., None].expand(-1, -1, 4))
        return Slots(boxes, classes, owners, samples.valid_mask, samples.positive_mask)

    def box_losses(
        self, batch: PaddedBatch, features: dict[str, Tensor], slots: Slots, positive: Slots
    ) -> dict[str, Tensor]:
        """`loss_cls` of all slots, and `loss_box_reg` of those that can hold an object (`positive`)."""
        pooled = _pool(self.box_pooler, [features[name] for name in self.box_in_features], slots.boxes)
        scores, deltas = self.box_predictor(self.box_head(pooled))
        num_sampled = slots.valid_mask.sum().clamp(min=1)
        classification = cross_entropy(scores.float(), slots.classes.flatten(), reduction="none")

        num_images, num_positive = positive.classes.shape
        deltas = deltas.view(num_images, -1, deltas.shape[1] // 4, 4)[:, :num_positive].flatten(0, 1)
        objects = batch.boxes.gather(1, positive.owners[..., None].expand(-1, -1, 4))
        wanted = box_deltas(positive.boxes, objects, self.box_predictor.box2box_transform.weights).flatten(0, 1)
        unused = ~positive.positive_mask.reshape(-1, 1)
        location = smooth_l1_loss(
            _of_class(deltas, positive.classes).masked_fill(unused, 0.0),
            wanted.masked_fill(unused, 0.0),
            beta=self.box_predictor.smooth_l1_beta,
            reduction="sum",
        )
        losses = {
            "loss_cls": classification.masked_fill(~slots.valid_mask.flatten(), 0.0).sum() / num_sampled,
            "loss_box_reg": location / num_sampled,
        }
        return {name: loss * self.box_predictor.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def mask_loss(self, batch: PaddedBatch, features: dict[str, Tensor], positive: Slots) -> Tensor:
        """`loss_mask` of the slots that can hold an object; 0 where none does."""
        pooled = _pool(self.mask_pooler, [features[name] for name in self.mask_in_features], positive.boxes)
        logits = self.mask_head.layers(pooled)
        side = logits.shape[-1]
        targets = draw_masks(
            batch.edges,
            batch.edge_polygon,
            batch.first_edge,
            positive.boxes.flatten(0, 1),
            _image_numbers(positive.boxes),
            positive.owners.masked_fill(~positive.positive_mask, -1).flatten(),
            side,
        )
        used = positive.positive_mask.reshape(-1, 1, 1)
        loss = binary_cross_entropy_with_logits(
            _of_class(logits, positive.classes).float().masked_fill(~used, 0.0),
            targets.float(),
            weight=used.float(),
            reduction="sum",
        )
        weighted: Tensor = loss / (used.sum().clamp(min=1) * side * side) * self.mask_head.loss_weight
        return weighted


def _pool(pooler: Any, features: list[Tensor], boxes: Tensor) -> Tensor:
    """Pools (N, S, 4) boxes of N images, image after image."""
    return pool_boxes(pooler, features, boxes.flatten(0, 1), _image_numbers(boxes))


def _image_numbers(boxes: Tensor) -> Tensor:
    """(N * S,), the number of the image of each of (N, S, 4) boxes."""
    return torch.arange(len(boxes), device=boxes.device)[:, None].expand(boxes.shape[:2]).flatten()


def _of_class(predictions: Tensor, classes: Tensor) -> Tensor:
    """The predictions for one class each, (N * S, …), of (N * S, classes or 1, …); for background any."""
    rows = torch.arange(len(predictions), device=predictions.device)
    return predictions[rows, classes.flatten().clamp(max=predictions.shape[1] - 1)]
