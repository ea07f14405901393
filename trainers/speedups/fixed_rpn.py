"""The RPN in operations of fixed shapes: labels, samples, losses and proposals of all images without a wait.

Where detectron2 selects anchors by boolean masks, of which the host must learn the counts, here each image has as many
slots as it can need, with a mask of those in use. R anchors are all those of a canvas; the ones beyond detectron2's own
padding are never sampled or proposed, so that distributions are detectron2's.

Memory: no array of objects by anchors is made on a GPU. At batch 16 on a canvas of 832 x 1344 (R = 279,279) the largest
are the deltas of all anchors and their gradient, 68 MiB each in fp32, as in detectron2; owners of anchors take 34 MiB;
overlaps, random keys, and each masked copy of them 17 MiB.
"""

from __future__ import annotations

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from fvcore.nn import smooth_l1_loss
from torch import Tensor, nn

from trainers.speedups.batched_nms import nms_keep
from trainers.speedups.fixed_sampling import Samples, box_deltas, sample
from trainers.speedups.matching import best_overlaps, is_best
from trainers.speedups.padded_batch import PaddedBatch
from trainers.speedups.proposals import BatchedRPN, label_by_thresholds


class FixedRPN(BatchedRPN):
    """detectron2's RPN for padded batches; lists of records go the way of `BatchedRPN`."""

    def fixed_losses(
        self, batch: PaddedBatch, features: dict[str, Tensor], padded_size: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The losses of a batch, and what it proposes.

        Args:
            batch: N images and their objects.
            features: The backbone's feature maps of the canvas.
            padded_size: (2,), int64: height and width to which detectron2 would have padded this batch.

        Returns:
            (N, P, 4) proposals of each image, the highest score first; (N, P) bool, which of them hold; and
            `loss_rpn_cls` and `loss_rpn_loc`. Both are NaN where detectron2 raises FloatingPointError: a predicted
            score, or a box among the best before NMS, is not finite.
        """
        maps = [features[name] for name in self.in_features]
        scores, deltas = self.rpn_head(maps)
        logits = torch.cat([each.permute(0, 2, 3, 1).flatten(1) for each in scores], dim=1)
        deltas = torch.cat(  # each (N, A * 4, H, W)
            [each.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for each in deltas], dim=1
        )
        anchors = grid_anchors(self.anchor_generator, maps)
        inside_mask = anchors_inside(self.anchor_generator, maps, padded_size)
        samples, targets = self.sample_anchors(batch, anchors, inside_mask)
        losses = self.sampled_losses(samples, targets, anchors, logits, deltas)
        map_sizes = [each[0].numel() for each in scores]
        proposals, valid_mask, finite = self.fixed_proposals(
            batch.sizes, anchors, inside_mask, map_sizes, logits, deltas
        )
        return proposals, valid_mask, {name: loss.masked_fill(~finite, torch.nan) for name, loss in losses.items()}

    @torch.no_grad()
    def sample_anchors(self, batch: PaddedBatch, anchors: Tensor, inside_mask: Tensor) -> tuple[Samples, Tensor]:
        """Chooses those of the (R, 4) anchors from which the losses are made, among the ones of `inside_mask`, (R,).

        Returns:
            The samples, and (N, S, 4) the boxes of the objects that the sampled anchors belong to.
        """
        visible = anchors.masked_fill(~inside_mask[:, None], 0.0)
        overlaps, owners = best_overlaps(batch.boxes, batch.num_objects, visible)
        labels = label_by_thresholds(self.anchor_matcher, overlaps)
        if self.anchor_matcher.allow_low_quality_matches:
            labels.masked_fill_(is_best(batch.boxes, batch.num_objects, visible), 1)
        labels.masked_fill_(~inside_mask, -1)
        samples = sample(labels == 1, labels == 0, self.batch_size_per_image, self.positive_fraction)
        return samples, _rows(batch.boxes, owners.gather(1, samples.indices))

    def sampled_losses(
        self, samples: Samples, targets: Tensor, anchors: Tensor, logits: Tensor, deltas: Tensor
    ) -> dict[str, Tensor]:
        """`loss_rpn_cls` and `loss_rpn_loc` of the sampled anchors.

        Args:
            samples: S anchors of each image.
            targets: (N, S, 4): the boxes of their objects.
            anchors: (R, 4).
            logits: (N, R): predicted scores.
            deltas: (N, R, 4): predicted deltas.
        """
        indices, valid_mask, positive_mask = samples
        objectness = nn.functional.binary_cross_entropy_with_logits(
            logits.gather(1, indices), positive_mask.float(), reduction="none"
        )
        wanted = box_deltas(anchors[indices], targets, self.box2box_transform.weights)
        location = smooth_l1_loss(
            _rows(deltas, indices).masked_fill(~positive_mask[..., None], 0.0),
            wanted.masked_fill(~positive_mask[..., None], 0.0),
            beta=self.smooth_l1_beta,
            reduction="sum",
        )
        normalizer = self.batch_size_per_image * len(logits)
        losses = {
            "loss_rpn_cls": objectness.masked_fill(~valid_mask, 0.0).sum() / normalizer,
            "loss_rpn_loc": location / normalizer,
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    @torch.no_grad()
    def fixed_proposals(
        self,
        sizes: Tensor,
        anchors: Tensor,
        inside_mask: Tensor,
        map_sizes: list[int],
        logits: Tensor,
        deltas: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """detectron2's `find_top_rpn_proposals` in fixed shapes, with each feature map's NMS for itself.

        Args:
            sizes: (N, 2): height and width of each image, to which boxes are clipped.
            anchors: (R, 4).
            inside_mask: (R,), bool: which anchors count.
            map_sizes: How many of the R anchors each feature map has, in order.
            logits: (N, R).
            deltas: (N, R, 4).

        Returns:
            (N, P, 4) proposals, the highest score first, zeros where there is none; (N, P) bool, which there are; and
            whether all predictions that count are finite, one bool.
        """
        ordered = logits.masked_fill(~inside_mask, -torch.inf)
        scores, indices, used_mask = _best_of_each_map(ordered, map_sizes, self.pre_nms_topk[self.training])
        chosen = indices.flatten(1)
        decoded = self.box2box_transform.apply_deltas(
            _rows(deltas, chosen).flatten(0, 1), anchors[chosen].flatten(0, 1)
        ).view(*indices.shape, 4)
        valid_mask, finite_mask = used_mask & inside_mask[indices], decoded.isfinite().all(dim=3)
        finite = (logits.isfinite() | ~inside_mask).all() & (finite_mask | ~valid_mask).all()
        boxes = torch.minimum(decoded.clamp(min=0), sizes.flip(1).repeat(1, 2)[:, None, None].to(decoded.dtype))
        valid_mask &= finite_mask & ((boxes[..., 2:] - boxes[..., :2]) > self.min_box_size).all(dim=3)
        kept = nms_keep(boxes.flatten(0, 1), valid_mask.flatten(0, 1), self.nms_thresh).view(len(sizes), -1)
        # A stable sort, as torchvision orders boxes of one score; top-k has no order among them.
        ranked = scores.flatten(1).masked_fill(~kept, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        best = ranked[:, : self.post_nms_topk[self.training]]
        kept = kept.gather(1, best)
        return _rows(boxes.flatten(1, 2), best).masked_fill(~kept[..., None], 0.0), kept, finite


def _best_of_each_map(logits: Tensor, map_sizes: list[int], max_boxes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The highest of (N, R) logits on each of L feature maps, at most K = `max_boxes`.

    Returns:
        (N, L, K) logits, falling; (N, L, K) indices of their anchors, below R; and (L, K) bool, which of them there
        are: a map may have fewer than K anchors.
    """
    shape = len(map_sizes), min(max_boxes, max(map_sizes))
    scores = logits.new_full((len(logits), *shape), -torch.inf)
    indices = torch.zeros(scores.shape, dtype=torch.int64, device=scores.device)
    used_mask = torch.zeros(shape, dtype=torch.bool, device=scores.device)
    first = 0
    for number, map_logits in enumerate(logits.split(map_sizes, dim=1)):
        count = min(max_boxes, map_sizes[number])
        top, chosen = map_logits.topk(count, dim=1)
        scores[:, number, :count] = top
        indices[:, number, :count] = chosen + first
        used_mask[number, :count].fill_(True)
        first += map_sizes[number]
    return scores, indices, used_mask


def grid_anchors(generator: DefaultAnchorGenerator, maps: list[Tensor]) -> Tensor:
    """The anchors of all feature maps, (R, 4), as the generator gives them.

    They are computed where the maps are; the generator computes on the host, and copying them would be a wait.
    """
    anchors = []
    for features, stride, shapes in zip(maps, generator.strides, generator.cell_anchors, strict=True):
        y, x = (
            torch.arange(generator.offset * stride, side * stride, stride, dtype=torch.float32, device=features.device)
            for side in features.shape[-2:]
        )
        centers = torch.meshgrid(y, x, indexing="ij")[::-1]
        anchors.append((torch.stack(centers * 2, dim=2)[:, :, None] + shapes).view(-1, 4))
    return torch.cat(anchors)


def anchors_inside(generator: DefaultAnchorGenerator, maps: list[Tensor], padded_size: Tensor) -> Tensor:
    """Which anchors of the feature maps a batch padded to `padded_size` pixels has too, (R,) bool."""
    masks = []
    for features, stride, num_anchors in zip(maps, generator.strides, generator.num_anchors, strict=True):
        rows, columns = (
            torch.arange(0, side * stride, stride, device=features.device) < limit
            for side, limit in zip(features.shape[-2:], padded_size, strict=True)
        )
        masks.append((rows[:, None] & columns)[..., None].expand(-1, -1, num_anchors).flatten())
    return torch.cat(masks)


def _rows(values: Tensor, indices: Tensor) -> Tensor:
    """Of (N, R, 4) values those at (N, S) indices, (N, S, 4)."""
    return values.gather(1, indices[..., None].expand(-1, -1, values.shape[2]))
