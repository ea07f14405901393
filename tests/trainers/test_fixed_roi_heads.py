"""The ROI heads in fixed shapes label, choose and learn as detectron2's do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import StandardROIHeads, build_roi_heads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from tests.builders.models import tiny_config
from tests.builders.padded_batches import padded, random_records
from trainers.speedups.fixed_roi_heads import FixedROIHeads, Slots
from trainers.speedups.padded_batch import PaddedBatch

HEIGHT, WIDTH, NUM_CLASSES = 64, 96, 3
SETTINGS = {
    "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.1,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": 2.0,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
}


def heads(**settings: Any) -> tuple[StandardROIHeads, FixedROIHeads]:
    """detectron2's heads and ours, with the same weights."""
    torch.manual_seed(0)
    shapes = {f"p{level}": ShapeSpec(channels=8, stride=2**level) for level in range(2, 6)}
    theirs = build_roi_heads(tiny_config(SETTINGS | settings), shapes).train()
    for parameter in theirs.parameters():  # the predictors begin with weights so small that gradients vanish
        torch.nn.init.normal_(parameter, std=0.1)
    ours = copy.deepcopy(theirs)
    ours.__class__ = FixedROIHeads
    assert type(theirs) is StandardROIHeads and isinstance(ours, FixedROIHeads)
    return theirs, ours


def objects(counts: list[int], seed: int, num_classes: int = NUM_CLASSES) -> tuple[PaddedBatch, list[Instances]]:
    """Images of these numbers of objects, as a batch and as detectron2 has them."""
    records = random_records([(HEIGHT, WIDTH)] * len(counts), counts, seed, num_classes)
    return padded(records, (HEIGHT, WIDTH)), [record["instances"] for record in records]


def proposals_near(batch: PaddedBatch, num_valid: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Up to 40 proposals of each image, half of them near objects; zeros where there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(len(num_valid), 40, 2, generator=generator) * 50
    boxes = torch.cat([corners, corners + 1 + torch.rand(len(num_valid), 40, 2, generator=generator) * 40], dim=2)
    for n, count in enumerate(batch.num_objects.tolist()):
        if count:
            noise = torch.randn(20, 4, generator=generator) * 2
            boxes[n, ::2] = batch.boxes[n, torch.arange(20) % count] + noise
    boxes[..., 2:] = torch.maximum(boxes[..., 2:], boxes[..., :2] + 0.5)
    valid_mask = torch.arange(40) < torch.tensor(num_valid)[:, None]
    return boxes.masked_fill(~valid_mask[..., None], 0.0), valid_mask


def features(num_images: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        f"p{level}": torch.randn(num_images, 8, HEIGHT >> level, WIDTH >> level, generator=generator).requires_grad_()
        for level in range(2, 6)
    }


def as_instances(slots: Slots, targets: list[Instances]) -> list[Instances]:
    """What detectron2 trains on if it has sampled these slots."""
    found = []
    for n, target in enumerate(targets):
        mask = slots.valid_mask[n]
        sampled = Instances((HEIGHT, WIDTH), proposal_boxes=Boxes(slots.boxes[n, mask]))
        sampled.gt_classes = slots.classes[n, mask]
        if len(target):
            owners = slots.owners[n, mask]
            sampled.gt_boxes, sampled.gt_masks = target.gt_boxes[owners], target.gt_masks[owners]
        found.append(sampled)
    return found


AGNOSTIC = {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True, "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True}


@pytest.mark.parametrize(
    ("counts", "num_valid", "settings"),
    [
        ([3, 1], [40, 40], {}),
        ([3, 1], [40, 40], AGNOSTIC),
        ([3, 1], [40, 40], {"MODEL.MASK_ON": False, "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.0}),
        ([2, 0, 5], [40, 40, 40], {}),
        ([2, 1], [3, 40], {}),  # fewer proposals than slots
        ([0, 0], [40, 5], {}),
        ([2, 0], [0, 0], {}),  # the objects alone; an image with nothing at all
        ([6, 6], [40, 40], {"MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.9}),
        ([2, 2], [40, 40], {"MODEL.ROI_HEADS.NUM_CLASSES": 1}),
    ],
)
def test_losses_and_gradients_of_the_same_proposals_are_detectron2s(
    counts: list[int], num_valid: list[int], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = heads(**settings)
    batch, targets = objects(counts, 1, theirs.num_classes)
    slots = ours.sample_slots(batch, *proposals_near(batch, num_valid, seed=2))
    monkeypatch.setattr(ours, "sample_slots", lambda *_: slots)
    maps = features(len(counts)), features(len(counts))

    found = ours.fixed_losses(batch, maps[0], torch.empty(0), torch.empty(0))
    instances = as_instances(slots, targets)
    with EventStorage(0):
        expected = theirs._forward_box(maps[1], instances) | theirs._forward_mask(maps[1], instances)

    assert list(found) == list(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=2e-6, atol=1e-7)
    if any(counts):
        assert all(loss > 0 for loss in found.values())
    torch.stack(list(found.values())).sum().backward()
    torch.stack(list(expected.values())).sum().backward()
    gradients = [
        [*(map_features.grad for map_features in levels.values()), *(p.grad for p in roi_heads.parameters())]
        for levels, roi_heads in zip(maps, (ours, theirs), strict=True)
    ]
    for one, other in zip(*gradients, strict=True):
        assert one is not None  # DistributedDataParallel waits for a gradient of each parameter
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("append", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.3, 0.6], "MODEL.ROI_HEADS.IOU_LABELS": [0, -1, 1]}],
    ids=["one threshold", "two thresholds"],
)
def test_proposals_get_the_labels_and_objects_that_detectron2_gives_them(
    append: bool, settings: dict[str, Any]
) -> None:
    everything = {"MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 60, "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0}
    theirs, ours = heads(**everything, **settings)
    theirs.proposal_append_gt = ours.proposal_append_gt = append
    batch, targets = objects([3, 0, 5], seed=3)
    boxes, valid_mask = proposals_near(batch, [40, 30, 35], seed=4)
    slots = ours.sample_slots(batch, boxes, valid_mask)
    offered = [
        Instances((HEIGHT, WIDTH), proposal_boxes=Boxes(each[mask]), objectness_logits=torch.zeros(int(mask.sum())))
        for each, mask in zip(boxes, valid_mask, strict=True)
    ]
    with EventStorage(0):
        expected = theirs.label_and_sample_proposals(offered, targets)
    for n, sampled in enumerate(expected):
        mask = slots.valid_mask[n]
        boxes_of_objects = batch.boxes[n, slots.owners[n, mask]]
        found = torch.cat([slots.boxes[n, mask], slots.classes[n, mask, None], boxes_of_objects], dim=1)
        boxes_of_objects = sampled.gt_boxes.tensor if len(targets[n]) else torch.zeros(len(sampled), 4)
        wanted = torch.cat([sampled.proposal_boxes.tensor, sampled.gt_classes[:, None], boxes_of_objects], dim=1)
        assert sorted(found.tolist()) == sorted(wanted.tolist())
        assert slots.positive_mask[n].equal(mask & (slots.classes[n] < NUM_CLASSES))


def test_objects_come_first_and_never_exceed_their_share() -> None:
    _, ours = heads()
    batch, _ = objects([6, 6, 0], seed=5)
    slots = ours.sample_slots(batch, *proposals_near(batch, [40, 3, 40], seed=6))
    assert slots.positive_mask.sum(1).tolist() == [4, 4, 0]  # a quarter of 16
    assert slots.positive_mask[:2, :4].all()
    assert slots.valid_mask.sum(1)[[0, 2]].tolist() == [16, 16]


def test_what_stands_in_empty_slots_changes_nothing() -> None:
    _, ours = heads()
    batch, _ = objects([2, 0], seed=7)
    boxes, valid_mask = proposals_near(batch, [4, 6], seed=8)
    losses = []
    for others in (boxes, boxes.masked_scatter(~valid_mask[..., None], torch.tensor([9.0, 9, 3, 3]).repeat(70))):
        torch.manual_seed(0)
        losses.append(ours.fixed_losses(batch, features(2), others, valid_mask))
    assert losses[0] == losses[1]
    assert all(loss.isfinite() for loss in losses[0].values())


def test_losses_in_16_bits_are_summed_in_32() -> None:
    _, ours = heads()
    batch, _ = objects([3, 2], seed=1)
    boxes, valid_mask = proposals_near(batch, [40, 40], seed=2)
    torch.manual_seed(0)
    exact = ours.fixed_losses(batch, features(2), boxes, valid_mask)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ours.fixed_losses(batch, features(2), boxes, valid_mask)
    for name, loss in rounded.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=0.03, atol=0.0)
