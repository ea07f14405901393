"""Labels, samples, losses and proposals of the RPN in fixed shapes are detectron2's, whatever the padding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from tests.builders.experiments import TINY_OVERRIDES
from tests.builders.models import tiny_config
from tests.builders.padded_batches import padded, random_records
from trainers.speedups.fixed_rcnn import padded_size
from trainers.speedups.fixed_rpn import FixedRPN, anchors_inside, grid_anchors
from trainers.speedups.fixed_sampling import box_deltas
from trainers.speedups.padded_batch import PaddedBatch

SIZES = [(64, 80), (90, 61), (33, 96)]
CANVAS, PADDED = (128, 160), (96, 96)
"""A canvas, and what detectron2 pads images of these sizes to."""


@pytest.fixture(scope="module")
def rpns() -> tuple[RPN, FixedRPN]:
    """The tiny model's RPN as detectron2 has it and in fixed shapes, both with the same weights."""
    torch.manual_seed(0)
    rpn: RPN = build_model(tiny_config(TINY_OVERRIDES)).proposal_generator
    fixed = copy.deepcopy(rpn)
    fixed.__class__ = FixedRPN
    return rpn, fixed


def maps_of(height: int, width: int) -> list[Tensor]:
    return [torch.zeros(1, 16, -(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32, 64)]


MAP_SIZES = [3 * each[0, 0].numel() for each in maps_of(*CANVAS)]


def on_canvas(rpn: FixedRPN) -> tuple[Tensor, Tensor]:
    """The anchors of the canvas, and which of them detectron2 has too."""
    maps = maps_of(*CANVAS)
    return grid_anchors(rpn.anchor_generator, maps), anchors_inside(rpn.anchor_generator, maps, torch.tensor(PADDED))


def those_inside(values: Tensor, inside: Tensor) -> list[Tensor]:
    """What counts of (…, R) or (…, R, 4) values, for each feature map, as detectron2 takes it."""
    dim = values.dim() - 1 - (values.shape[-1] == 4)
    masks = inside.split(MAP_SIZES)
    return [
        each.index_select(dim, mask.nonzero()[:, 0])
        for each, mask in zip(values.split(MAP_SIZES, dim), masks, strict=True)
    ]


def batch_of(counts: list[int], seed: int = 0) -> tuple[PaddedBatch, list[Any]]:
    records = random_records(SIZES, counts, seed)
    return padded(records, CANVAS), [record["instances"] for record in records]


def test_detectron2s_own_padding_is_known_on_the_device() -> None:
    assert padded_size(torch.tensor(SIZES), 32).tolist() == list(PADDED)
    assert padded_size(torch.tensor([[64, 65]]), 32).tolist() == [64, 96]
    assert padded_size(torch.tensor([[64, 65]]), 1).tolist() == [64, 65]


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_anchors_are_the_generators_and_those_inside_are_the_ones_of_its_own_padding(
    rpns: tuple[RPN, FixedRPN], offset: float
) -> None:
    generator = copy.deepcopy(rpns[1].anchor_generator)
    generator.offset = offset
    anchors, theirs = grid_anchors(generator, maps_of(*CANVAS)), generator(maps_of(*CANVAS))
    assert torch.equal(anchors, Boxes.cat(theirs).tensor)
    inside = anchors_inside(generator, maps_of(*CANVAS), torch.tensor(PADDED))
    assert torch.equal(anchors[inside], Boxes.cat(generator(maps_of(*PADDED))).tensor)


def predictions(images: int, seed: int, with_equal_scores: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and deltas of all anchors of the canvas."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, sum(MAP_SIZES), generator=generator) * 4
    deltas = torch.randn(images, sum(MAP_SIZES), 4, generator=generator)
    return logits.round() / 4 if with_equal_scores else logits, deltas


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0], [1, 6, 2]])
def test_every_anchor_that_detectron2_could_sample_is_sampled_and_no_other(
    rpns: tuple[RPN, FixedRPN], counts: list[int]
) -> None:
    batch, objects = batch_of(counts)
    anchors, inside = on_canvas(rpns[1])
    all_rpns = [copy.copy(rpn) for rpn in rpns]
    for rpn in all_rpns:
        rpn.batch_size_per_image, rpn.positive_fraction = len(anchors) * 2, 0.5  # all of them
    their_labels, their_boxes = all_rpns[0].label_and_sample_anchors(
        all_rpns[0].anchor_generator(maps_of(*PADDED)), objects
    )
    samples, targets = all_rpns[1].sample_anchors(batch, anchors, inside)
    labels = torch.full((len(counts), len(anchors)), -1)
    for n in range(len(counts)):
        used = samples.indices[n][samples.valid_mask[n]]
        assert len(used.unique()) == len(used)
        labels[n, used] = samples.positive_mask[n][samples.valid_mask[n]].long()
        own = labels[n][inside]
        assert own.tolist() == their_labels[n].tolist()
        assert (labels[n][~inside] == -1).all()
        positive = samples.positive_mask[n]
        matched = torch.zeros(len(anchors), 4)
        matched[samples.indices[n][positive]] = targets[n][positive]
        assert torch.equal(matched[inside][own == 1], their_boxes[n][own == 1])


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0], [6, 6, 6]])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_losses_and_gradients_of_the_same_samples_are_detectron2s(
    rpns: tuple[RPN, FixedRPN], counts: list[int], beta: float
) -> None:
    batch, _ = batch_of(counts)
    anchors, inside = on_canvas(rpns[1])
    samples, targets = rpns[1].sample_anchors(batch, anchors, inside)
    logits, deltas = (each.requires_grad_() for each in predictions(3, 1))
    all_rpns = [copy.copy(rpn) for rpn in rpns]
    for rpn in all_rpns:
        rpn.smooth_l1_beta, rpn.loss_weight = beta, {"loss_rpn_cls": 2.0, "loss_rpn_loc": 3.0}
    ours = all_rpns[1].sampled_losses(samples, targets, anchors, logits, deltas)
    labels, boxes = torch.full(logits.shape, -1), torch.zeros(deltas.shape)
    for n, (indices, valid_mask, positive_mask) in enumerate(zip(*samples, strict=True)):
        labels[n, indices[valid_mask]] = positive_mask[valid_mask].long()
        boxes[n, indices[positive_mask]] = targets[n, positive_mask]
    with EventStorage(0):
        theirs = all_rpns[0].losses(
            [Boxes(each) for each in those_inside(anchors, inside)],
            those_inside(logits, inside),
            [each[inside] for each in labels],
            those_inside(deltas, inside),
            [each[inside] for each in boxes],
        )
    assert list(ours) == list(theirs)
    torch.testing.assert_close(ours, theirs)
    totals = [torch.stack(list(losses.values())).sum() for losses in (ours, theirs)]
    gradients = [torch.autograd.grad(total, (logits, deltas)) for total in totals]
    torch.testing.assert_close(*gradients)


def test_box_targets_are_detectron2s(rpns: tuple[RPN, FixedRPN]) -> None:
    transform = rpns[1].box2box_transform
    corners = torch.rand(2, 40, 2)
    boxes, targets = torch.cat([corners, corners + torch.rand(2, 40, 2) + 0.01], dim=2)
    assert torch.equal(box_deltas(boxes, targets, transform.weights), transform.get_deltas(boxes, targets))


def detectron2s_proposals(
    rpn: RPN, sizes: list[tuple[int, int]], anchors: Tensor, inside: Tensor, logits: Tensor, deltas: Tensor
) -> list[Instances]:
    """From the anchors that count."""
    boxes = [Boxes(each) for each in those_inside(anchors, inside)]
    found: list[Instances] = rpn.predict_proposals(
        boxes, those_inside(logits, inside), those_inside(deltas, inside), sizes
    )
    return found


def fixed_proposals(
    rpn: FixedRPN, sizes: list[tuple[int, int]], anchors: Tensor, inside: Tensor, logits: Tensor, deltas: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return rpn.fixed_proposals(torch.tensor(sizes), anchors, inside, MAP_SIZES, logits, deltas)


def assert_proposals_are_detectron2s(
    rpns: tuple[RPN, FixedRPN],
    sizes: list[tuple[int, int]],
    anchors: Tensor,
    inside: Tensor,
    logits: Tensor,
    deltas: Tensor,
) -> Tensor:
    boxes, valid_mask, finite = fixed_proposals(rpns[1], sizes, anchors, inside, logits, deltas)
    assert finite
    theirs = detectron2s_proposals(rpns[0], sizes, anchors, inside, logits, deltas)
    for image_boxes, mask, found in zip(boxes, valid_mask, theirs, strict=True):
        count = len(found)
        assert mask.tolist() == [True] * count + [False] * (len(mask) - count)
        assert torch.equal(image_boxes[:count], found.proposal_boxes.tensor)
        assert (image_boxes[count:] == 0).all()
    return valid_mask


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("min_size", [0.0, 12.0])
def test_proposals_are_detectron2s_on_a_larger_canvas(rpns: tuple[RPN, FixedRPN], seed: int, min_size: float) -> None:
    all_rpns: Any = [copy.copy(rpn) for rpn in rpns]
    for rpn in all_rpns:
        rpn.min_box_size = min_size
    anchors, inside = on_canvas(rpns[1])
    assert_proposals_are_detectron2s(all_rpns, SIZES, anchors, inside, *predictions(3, seed))


@pytest.mark.parametrize("seed", range(4))
def test_proposals_of_equal_scores_come_in_detectron2s_order(rpns: tuple[RPN, FixedRPN], seed: int) -> None:
    anchors, _ = on_canvas(rpns[1])
    inside = torch.ones(len(anchors), dtype=torch.bool)
    found = predictions(2, seed, with_equal_scores=True)
    assert_proposals_are_detectron2s(rpns, [CANVAS, (100, 90)], anchors, inside, *found)


def test_many_anchors_of_which_all_are_proposed_leave_no_gap(rpns: tuple[RPN, FixedRPN]) -> None:
    all_rpns: Any = [copy.copy(rpn) for rpn in rpns]
    for rpn in all_rpns:
        rpn.pre_nms_topk = rpn.post_nms_topk = {True: 5000, False: 5000}
    anchors, inside = on_canvas(rpns[1])
    assert_proposals_are_detectron2s(all_rpns, SIZES[:2], anchors, inside, *predictions(2, 0))


def test_an_image_without_a_box_of_the_least_size_proposes_nothing(rpns: tuple[RPN, FixedRPN]) -> None:
    all_rpns: Any = [copy.copy(rpn) for rpn in rpns]
    for rpn in all_rpns:
        rpn.min_box_size = 60.0
    anchors, inside = on_canvas(rpns[1])
    sizes = [(64, 80), (32, 96)]
    found = assert_proposals_are_detectron2s(all_rpns, sizes, anchors, inside, *predictions(2, 0))
    assert found.any(dim=1).tolist() == [True, False]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["score", "box"])
def test_a_prediction_that_is_not_finite_is_found_where_detectron2_raises(
    rpns: tuple[RPN, FixedRPN], place: str, value: float
) -> None:
    anchors, inside = on_canvas(rpns[1])
    logits, deltas = predictions(2, 0)
    third = slice(sum(MAP_SIZES[:2]), sum(MAP_SIZES[:3]))  # the feature map of stride 16
    within, beyond = (third.start + int(mask[third].nonzero()[-1]) for mask in (inside, ~inside))
    if place == "score":
        # So few anchors of this map count that detectron2 looks at all of them, also at the lowest one.
        inside[third.start : within - 20] = False
    logits[1, [within, beyond]] = 100.0  # so that their boxes are looked at
    planted = logits if place == "score" else deltas
    planted[1, beyond] = value
    assert fixed_proposals(rpns[1], SIZES[:2], anchors, inside, logits, deltas)[2]
    planted[1, within] = value
    with pytest.raises(FloatingPointError):
        detectron2s_proposals(rpns[0], SIZES[:2], anchors, inside, logits, deltas)
    boxes, _, finite = fixed_proposals(rpns[1], SIZES[:2], anchors, inside, logits, deltas)
    assert not finite
    assert boxes.isfinite().all()


def test_both_losses_are_nan_where_a_prediction_is_not_finite(rpns: tuple[RPN, FixedRPN]) -> None:
    batch, _ = batch_of([2, 3, 0])
    maps = {f"p{n}": each.expand(3, -1, -1, -1).clone() for n, each in enumerate(maps_of(*CANVAS), 2)}
    losses = rpns[1].fixed_losses(batch, maps, torch.tensor(PADDED))[2]
    assert all(loss.isfinite() for loss in losses.values())
    maps["p3"][2, 0, 1, 1] = torch.inf
    losses = rpns[1].fixed_losses(batch, maps, torch.tensor(PADDED))[2]
    assert all(loss.isnan() for loss in losses.values())
