"""Losses without training statistics are detectron2's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, MaskRCNNConvUpsampleHead
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from trainers.speedups.apply import REPLACEMENTS, exchange
from trainers.speedups.quiet_heads import QuietFastRCNNOutputLayers, QuietMaskRCNNHead


def quiet(head: torch.nn.Module) -> Any:
    """A copy of a head with its class exchanged."""
    exchanged = copy.deepcopy(head)
    exchange(exchanged, {"quiet_heads": REPLACEMENTS["quiet_heads"]})
    return exchanged


def proposals(classes: int, seed: int) -> Instances:
    rng = np.random.default_rng(seed)
    polygons = [[rng.uniform(0, 50, 12)] for _ in range(5)]
    found = Instances((50, 50))
    found.proposal_boxes = Boxes(torch.tensor([[5.0, 5, 40, 45]] * 5))
    found.gt_classes = torch.tensor(rng.integers(0, classes, 5))
    found.gt_masks = PolygonMasks(polygons)
    return found


@pytest.mark.parametrize("num_classes", [1, 4])
@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_the_mask_heads_loss_is_detectron2s(num_classes: int, num_images: int) -> None:
    images = [proposals(num_classes, seed) for seed in range(num_images)] + [proposals(num_classes, 9)[:0]]
    head = MaskRCNNConvUpsampleHead(ShapeSpec(channels=8), num_classes=num_classes, conv_dims=[8, 8])
    features = torch.randn(5 * num_images, 8, 14, 14)
    silent = quiet(head)
    assert type(silent) is QuietMaskRCNNHead
    with EventStorage():
        expected = head(features, images)
    losses = silent(features, images)
    assert losses.keys() == expected.keys() and losses["loss_mask"].equal(expected["loss_mask"])


def test_the_mask_heads_inference_is_detectron2s() -> None:
    head = MaskRCNNConvUpsampleHead(ShapeSpec(channels=8), num_classes=4, conv_dims=[8, 8]).eval()
    features, found = torch.randn(5, 8, 14, 14), []
    for each in (head, quiet(head)):
        image = Instances((50, 50), pred_classes=torch.arange(5) % 4)
        found.append(each(features, [image])[0].pred_masks)
    assert found[0].equal(found[1])


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("num_images", [1, 3])
def test_the_box_predictors_losses_are_detectron2s(num_images: int, sigmoid: bool) -> None:
    images = [proposals(4, seed) for seed in range(num_images)]
    for image in images[1:]:
        image.gt_boxes = Boxes(image.proposal_boxes.tensor + 1)
        image.gt_classes[0] = 4  # background
    images[0].gt_classes[:] = 4  # an image without objects
    predictor = FastRCNNOutputLayers(
        ShapeSpec(channels=8),
        box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
        num_classes=4,
        loss_weight={"loss_box_reg": 2.0},
        use_sigmoid_ce=sigmoid,
    )
    silent = quiet(predictor)
    assert type(silent) is QuietFastRCNNOutputLayers
    predictions = torch.randn(5 * num_images, 5), torch.randn(5 * num_images, 16)
    with EventStorage():
        expected = predictor.losses(predictions, images)
    losses = silent.losses(predictions, images)
    assert losses.keys() == expected.keys() and all(losses[name].equal(expected[name]) for name in losses)
