"""Anchors labelled and proposals chosen for a whole batch are detectron2's, bit for bit, random choices included."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.training import demo
from trainers import mask_rcnn
from trainers.speedups import proposals
from trainers.speedups.apply import REPLACEMENTS, exchange
from trainers.speedups.proposals import BatchedRPN, BatchedStandardROIHeads, top_proposals

SIZES = [(96, 96), (80, 96), (96, 61)]


@pytest.fixture(scope="module")
def detectors() -> tuple[Any, Any]:
    """The demo's model as detectron2 has it, and one with its RPN and ROI heads exchanged."""
    plan = demo(2, recipe="plain")
    torch.manual_seed(0)
    plain: Any = mask_rcnn.build_detector(mask_rcnn.build_config(plan), plan)
    batched = copy.deepcopy(plain)
    exchange(batched, {"batched_proposals": REPLACEMENTS["batched_proposals"]})
    return plain, batched


@pytest.fixture(scope="module")
def rpns(detectors: tuple[Any, Any]) -> tuple[RPN, BatchedRPN]:
    plain, batched = (model.proposal_generator for model in detectors)
    assert type(plain) is RPN and type(batched) is BatchedRPN
    return plain, batched


@pytest.fixture(scope="module")
def heads(detectors: tuple[Any, Any]) -> tuple[StandardROIHeads, BatchedStandardROIHeads]:
    plain, batched = (model.roi_heads for model in detectors)
    assert type(plain) is StandardROIHeads and type(batched) is BatchedStandardROIHeads
    return plain, batched


def anchors_of(rpns: tuple[RPN, BatchedRPN]) -> list[Boxes]:
    return list(rpns[0].anchor_generator([torch.zeros(1, 64, side, side) for side in (24, 12, 6, 3, 2)]))


def objects(counts: list[int], seed: int, whole: bool) -> list[Instances]:
    """Boxes at random; at whole pixels and with twins, so that some overlaps are equal."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n, count in enumerate(counts):
        corners = torch.rand(count, 2, generator=generator) * 70
        boxes = torch.cat([corners, corners + torch.rand(count, 2, generator=generator) * 40], dim=1)
        if whole:
            boxes = boxes.round()
            boxes[1::2] = boxes[: 2 * (count // 2) : 2]
        found.append(Instances(SIZES[n % 3], gt_boxes=Boxes(boxes)))
    return found


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(0, 7), min_size=1, max_size=5), seed=st.integers(0, 2**20), whole=st.booleans())
def test_labels_boxes_and_random_choices_are_detectron2s(
    rpns: tuple[RPN, BatchedRPN], counts: list[int], seed: int, whole: bool
) -> None:
    anchors, images = anchors_of(rpns), objects(counts, seed, whole)
    torch.manual_seed(seed)
    theirs = rpns[0].label_and_sample_anchors(anchors, images)
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    ours = rpns[1].label_and_sample_anchors(anchors, images)
    assert torch.equal(torch.get_rng_state(), after)
    for one, other in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("counts", [[3, 0, 5], [0], [0, 0], [6]])
def test_losses_and_their_gradients_are_detectron2s(rpns: tuple[RPN, BatchedRPN], counts: list[int]) -> None:
    anchors, generator = anchors_of(rpns), torch.Generator().manual_seed(1)
    labels, boxes = rpns[1].label_and_sample_anchors(anchors, objects(counts, 3, whole=False))
    shapes = [(len(counts), len(map_anchors)) for map_anchors in anchors]
    logits = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    deltas = [torch.randn(*shape, 4, generator=generator).requires_grad_() for shape in shapes]
    with EventStorage(0):
        theirs = rpns[0].losses(anchors, logits, labels, deltas, boxes)
    ours = rpns[1].losses(anchors, logits, labels, deltas, boxes)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    gradients = [
        torch.autograd.grad(torch.stack(list(losses.values())).sum(), logits + deltas) for losses in (ours, theirs)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    seed=st.integers(0, 2**20),
    whole=st.booleans(),
    append=st.booleans(),
)
def test_proposals_and_their_objects_are_detectron2s(
    heads: tuple[StandardROIHeads, BatchedStandardROIHeads], counts: list[int], seed: int, whole: bool, append: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = objects(counts, seed, whole)
    found = objects([37 + n for n in range(len(counts))], seed + 1, whole)
    offered = [
        Instances(each.image_size, proposal_boxes=each.gt_boxes, objectness_logits=torch.randn(len(each)))
        for each in found
    ]
    for target, offer in zip(targets, offered, strict=True):
        target.gt_classes = torch.randint(0, 3, (len(target),), generator=generator)
        target.gt_masks = PolygonMasks([[torch.rand(6, generator=generator).numpy()] for _ in range(len(target))])
        if len(target):  # some that overlap
            near = torch.rand(12, 4, generator=generator) * 8
            offer.proposal_boxes.tensor[:12] = target.gt_boxes.tensor[torch.arange(12) % len(target)] + near
    for each in heads:
        each.proposal_append_gt = append
    torch.manual_seed(seed)
    with EventStorage(0):
        theirs = heads[0].label_and_sample_proposals(offered, targets)
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    with EventStorage(0):  # without any object it is detectron2's
        ours = heads[1].label_and_sample_proposals(offered, targets)
    assert torch.equal(torch.get_rng_state(), after)
    for one, other in zip(ours, theirs, strict=True):
        assert one.image_size == other.image_size
        assert set(one.get_fields()) == set(other.get_fields())
        for name, value in other.get_fields().items():
            mine = one.get(name)
            if isinstance(value, PolygonMasks):
                assert [p[0].tolist() for p in mine.polygons] == [p[0].tolist() for p in value.polygons]
            else:
                pair = [each.tensor if isinstance(each, Boxes) else each for each in (mine, value)]
                assert pair[0].dtype == pair[1].dtype
                assert torch.equal(*pair)


def test_too_many_pairs_are_matched_image_by_image(
    rpns: tuple[RPN, BatchedRPN], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposals, "MAX_PAIRS", 10)
    monkeypatch.setattr(proposals, "match", None)
    torch.manual_seed(0)
    labels, _ = rpns[1].label_and_sample_anchors(anchors_of(rpns), objects([2, 3], 0, whole=False))
    assert [int((each >= 0).sum()) for each in labels] == [64, 64]


def predictions(rpns: tuple[RPN, BatchedRPN], images: int, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    boxes, logits = [], []
    for map_anchors in anchors_of(rpns):
        noise = torch.randn(images, len(map_anchors), 4, generator=generator) * 12
        boxes.append(map_anchors.tensor + noise)  # some reach out of the image, some are empty
        logits.append(
            torch.randn(images, len(map_anchors), generator=generator).mul(4).round() / 4
        )  # with equal scores
    return boxes, logits


LIMITS: dict[str, Any] = {"nms_thresh": 0.7, "pre_nms_topk": 200, "post_nms_topk": 100, "min_box_size": 0.0}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_proposals_are_detectron2s(rpns: tuple[RPN, BatchedRPN], seed: int, images: int, training: bool) -> None:
    boxes, logits = predictions(rpns, images, seed)
    sizes = SIZES[:images]
    theirs = find_top_rpn_proposals(boxes, logits, sizes, training=training, **LIMITS)
    ours = top_proposals(boxes, logits, sizes, training=training, **LIMITS)
    assert len(ours) == len(theirs) == images
    for one, other in zip(ours, theirs, strict=True):
        assert one.image_size == other.image_size
        assert torch.equal(one.proposal_boxes.tensor, other.proposal_boxes.tensor)
        assert torch.equal(one.objectness_logits, other.objectness_logits)


def test_boxes_that_are_not_finite_end_training_and_are_left_out_of_evaluation(rpns: tuple[RPN, BatchedRPN]) -> None:
    boxes, logits = predictions(rpns, 2, 0)
    boxes[0][1, 5, 2] = float("inf")
    logits[0][1, 5] = 100.0  # so that it is looked at
    with pytest.raises(FloatingPointError):
        top_proposals(boxes, logits, SIZES[:2], training=True, **LIMITS)
    theirs = find_top_rpn_proposals(boxes, logits, SIZES[:2], training=False, **LIMITS)
    ours = top_proposals(boxes, logits, SIZES[:2], training=False, **LIMITS)
    assert torch.equal(ours[1].proposal_boxes.tensor, theirs[1].proposal_boxes.tensor)


def test_decoded_proposals_are_detectron2s(rpns: tuple[RPN, BatchedRPN]) -> None:
    anchors, (_, logits) = anchors_of(rpns), predictions(rpns, 2, 1)
    deltas = [torch.randn(2, len(map_anchors), 4) for map_anchors in anchors]
    theirs, ours = (rpn.predict_proposals(anchors, logits, deltas, SIZES[:2]) for rpn in rpns)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.proposal_boxes.tensor, other.proposal_boxes.tensor)


def test_all_roi_heads_of_detectron2_that_sample_in_the_same_way_are_exchanged() -> None:
    alike = {
        heads
        for _, heads in ROI_HEADS_REGISTRY
        if heads.label_and_sample_proposals is ROIHeads.label_and_sample_proposals
        and heads.__module__[:9] == "detectron"
    }
    assert alike == set(REPLACEMENTS["batched_proposals"]) - {RPN}
