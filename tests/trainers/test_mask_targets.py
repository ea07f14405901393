"""Mask targets drawn an image at a time are detectron2's, bit for bit."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from tests.builders.polygons import boxes_around, shapes
from trainers.speedups.mask_targets import PackedPolygons, pack, rasterize


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), num_instances=st.integers(0, 20), mask_size=st.sampled_from([7, 14, 28, 56]))
def test_targets_are_detectron2s_bit_for_bit(seed: int, num_instances: int, mask_size: int) -> None:
    rng = np.random.default_rng(seed)
    polygons = shapes(rng, num_instances)
    boxes = boxes_around(polygons, rng)
    ours = PackedPolygons(polygons).crop_and_resize(boxes, mask_size)
    theirs = PolygonMasks(polygons).crop_and_resize(boxes, mask_size)
    assert ours.dtype == torch.bool and ours.shape == (num_instances, mask_size, mask_size)
    assert num_instances == 0 or ours.equal(theirs)


@pytest.mark.parametrize(
    "chosen",
    [
        3,
        slice(1, 6, 2),
        [0, 0, 5],
        [],
        torch.tensor([7, 2, 2, 0]),
        torch.tensor([True, False] * 4),
        torch.zeros(8, dtype=torch.bool),
    ],
    ids=str,
)
def test_selected_instances_are_the_ones_detectron2_selects(chosen: Any) -> None:
    rng = np.random.default_rng(0)
    polygons = shapes(rng, 8)
    ours, theirs = PackedPolygons(polygons)[chosen], PolygonMasks(polygons)[chosen]
    assert len(ours) == len(theirs)
    for found, expected in zip(ours, theirs, strict=True):
        assert [p.tolist() for p in found] == [p.tolist() for p in expected]
    if len(theirs):
        boxes = boxes_around(theirs.polygons, rng)
        assert ours.crop_and_resize(boxes, 28).equal(theirs.crop_and_resize(boxes, 28))
        assert ours.get_bounding_boxes().tensor.equal(theirs.get_bounding_boxes().tensor)
    assert ours.nonempty().tolist() == theirs.nonempty().tolist()


def test_a_selection_of_a_selection_and_a_pickled_one_are_the_same() -> None:
    rng = np.random.default_rng(1)
    polygons = shapes(rng, 6)
    theirs = PolygonMasks(polygons)[[4, 1, 1, 3]][torch.tensor([True, False, True, True])]
    ours = pickle.loads(pickle.dumps(PackedPolygons(polygons)[[4, 1, 1, 3]]))[torch.tensor([True, False, True, True])]  # noqa: S301 - our own bytes
    boxes = boxes_around(theirs.polygons, rng)
    assert ours.crop_and_resize(boxes, 28).equal(theirs.crop_and_resize(boxes, 28))


def test_joined_instances_are_those_of_the_parts() -> None:
    rng = np.random.default_rng(2)
    first, second = shapes(rng, 2), shapes(rng, 3)
    joined = PackedPolygons.cat([PackedPolygons(first), PackedPolygons(second)[1:]])
    assert [len(polygons) for polygons in joined] == [len(polygons) for polygons in first + second[1:]]


def test_an_instance_without_polygons_is_an_empty_mask() -> None:
    masks = PackedPolygons([[], [np.array([0.0, 0, 10, 0, 10, 10, 0, 10])]])
    drawn = masks.crop_and_resize(torch.tensor([[0.0, 0, 10, 10]] * 2), 28)
    assert not drawn[0].any() and drawn[1].all()
    assert masks.nonempty().tolist() == [False, True]


@pytest.mark.parametrize("coordinates", [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
def test_what_is_no_polygon_is_refused(coordinates: list[float]) -> None:
    with pytest.raises(ValueError, match="polygon"):
        PackedPolygons([[np.array(coordinates)]])


def test_packing_leaves_other_masks_alone() -> None:
    bitmaps = Instances((4, 4), gt_masks=BitMasks(torch.zeros(2, 4, 4, dtype=torch.bool)))
    assert type(pack(bitmaps).gt_masks) is BitMasks
    polygons = Instances((4, 4), gt_masks=PolygonMasks([[np.array([0.0, 0, 4, 0, 4, 4])]]))
    assert type(pack(polygons).gt_masks) is PackedPolygons
    assert pack(Instances((4, 4))).get_fields() == {}


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), side=st.sampled_from([7, 14, 28, 56]))
def test_polygons_are_drawn_as_pycocotools_draws_them(seed: int, side: int) -> None:
    rng = np.random.default_rng(seed)
    polygons = []
    for kind in range(12):  # far outside, on whole and half steps, straight lines, corners twice
        corners = rng.normal(side / 2, rng.choice([0.3, 3, side / 2, side * 3]), (rng.integers(3, 30), 2))
        if kind % 4:
            corners = (corners * (kind % 4 * 5 - 4)).round() / (kind % 4 * 5 - 4)
        if kind == 4:
            corners[:, rng.integers(0, 2)] = corners[0, 0]
        polygons.append(np.repeat(corners, 2, axis=0) if kind == 5 else corners)
    expected = coco_mask.decode(coco_mask.frPyObjects([polygon.ravel() for polygon in polygons], side, side))
    owner = np.repeat(np.arange(12), [len(polygon) for polygon in polygons])
    assert np.array_equal(rasterize(np.concatenate(polygons).T, owner, 12, side), expected.transpose(2, 0, 1))
