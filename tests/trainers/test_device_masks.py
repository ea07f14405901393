"""Mask targets of a padded batch are detectron2's, bit for bit, also from the kernel for GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from detectron2.structures import PolygonMasks
from torch import Tensor

from tests.builders.compiled import AMPERE, HOPPER, compiled, float_operations, resources
from tests.builders.interpreted import Interpreter, interpreter
from tests.builders.polygons import Polygons, as_edges, boxes_around, shapes
from trainers.speedups.device_masks import draw_masks
from trainers.speedups.kernels import masks as kernel


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreter]:
    with interpreter() as call:
        yield call


def box_per_object(images: list[Polygons], boxes: Tensor) -> tuple[Tensor, ...]:
    """The arguments of `draw_masks` for a box for each object, with room for more edges and objects."""
    counts = [len(image) for image in images]
    num_edges = [sum(polygon.size // 2 for instance in image for polygon in instance) for image in images]
    image = torch.repeat_interleave(torch.tensor(counts))
    owner = torch.cat([torch.arange(count) for count in counts])
    return *as_edges(images, max(counts) + 2, max(num_edges) + 7), boxes, image, owner


def hard_cases() -> tuple[list[Polygons], Tensor]:
    """Objects and boxes whose edges lie where a rounding or an order decides."""
    square, upright = [0.0, 0, 10, 0, 10, 10, 0, 10], [5.0, 1, 5, 9, 5, 5]
    cases: list[tuple[list[list[float]], list[float]]] = [
        ([square], [0, 0, 10, 10]),
        ([square, [2.0, 2, 8, 2, 8, 8, 2, 8]], [0, 0, 10, 10]),  # one within the other: their union, no hole
        ([[2.0, 2, 8, 2, 8, 8, 2, 8, 2, 2, 4, 4, 4, 6, 6, 6, 6, 4]], [0, 0, 10, 10]),  # a hole by parity
        ([upright, [1.0, 5, 9, 5, 4, 5], [3.0, 3, 3, 3, 3, 3]], [0, 0, 10, 10]),  # lines and a point
        ([[0.5, 0.5, 9.5, 0.5, 9.5, 9.5, 0.5, 9.5]], [0, 0, 7, 7]),  # corners on the middles of pixels
        ([[0.0, 0, 9, 3, 3, 9]], [0, 0, 45, 45]),  # slopes of a third
        ([[-4000.0, -3000, 5000, 200, -100, 4500]], [100, 100, 107, 107]),  # edges far outside
        ([square], [20, 20, 30, 30]),
        ([square], [-30, 2, -20, 8]),
        ([square], [4, 4, 4, 4]),
        ([square], [4, 4, 4.05, 4.1]),
        ([square], [0, 0, 1000, 0.1]),
        ([square], [8, 8, 2, 2]),  # inside out
    ]
    polygons = [[np.array(polygon) for polygon in polygons] for polygons, _ in cases]
    return [polygons], torch.tensor([box for _, box in cases])


@pytest.mark.parametrize("seed", range(5))
def test_each_box_shows_its_object_as_detectron2_draws_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images: list[Polygons] = [shapes(rng, 6), [], shapes(rng, 3)]
    boxes = boxes_around(images[0] + images[2], rng)
    drawn = draw_masks(*box_per_object(images, boxes), 28)
    assert drawn.equal(PolygonMasks(images[0] + images[2]).crop_and_resize(boxes, 28))


def test_hard_cases_are_drawn_as_detectron2_draws_them() -> None:
    images, boxes = hard_cases()
    assert draw_masks(*box_per_object(images, boxes), 14).equal(PolygonMasks(images[0]).crop_and_resize(boxes, 14))


def test_a_box_without_an_object_is_empty() -> None:
    images, _ = hard_cases()
    *polygons, boxes, image, owner = box_per_object(images, torch.tensor([[0.0, 0, 10, 10]]).repeat(13, 1))
    drawn = draw_masks(*polygons, boxes, image, torch.where(owner == 1, owner, -1), 14)
    assert drawn.flatten(1).all(1).tolist() == [number == 1 for number in range(13)]
    assert not draw_masks(*polygons, boxes[:2], image[:2], torch.tensor([-1, 13]), 14).any()  # 13: no object either


def test_the_operation_is_what_torch_expects_of_one() -> None:
    images, boxes = hard_cases()
    torch.library.opcheck(draw_masks, (*box_per_object(images, boxes), 14))


def test_the_kernel_draws_hard_cases_bit_for_bit(interpreted: Interpreter) -> None:
    arguments = box_per_object(*hard_cases())
    assert interpreted(kernel.draw_masks, *arguments, 14).equal(draw_masks(*arguments, 14))


def test_the_kernel_draws_objects_at_random_bit_for_bit(interpreted: Interpreter) -> None:
    rng = np.random.default_rng(7)
    images: list[Polygons] = [shapes(rng, 4, most_corners=12), [], shapes(rng, 3, most_corners=9)]
    *polygons, boxes, image, owner = box_per_object(images, boxes_around(images[0] + images[2], rng))
    owner[2] = -1
    drawn = interpreted(kernel.draw_masks, *polygons, boxes, image, owner, 28)
    assert drawn.equal(draw_masks(*polygons, boxes, image, owner, 28))
    assert drawn.any()


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
def test_the_kernel_compiles_for_gpus_to_operations_that_each_round(capability: int) -> None:
    (drawing,) = compiled(capability, kernel.draw_masks, *box_per_object(*hard_cases()), 28)
    rounding = {"add.rn.f64", "sub.rn.f64", "sub.rn.f32", "mul.rn.f64", "div.rn.f64"}
    assert set(float_operations(drawing)) <= rounding | {"min.f64", "max.f64", "max.f32"}
    assert resources(drawing)[1] == 0  # no local memory
