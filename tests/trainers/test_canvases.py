"""A few canvases take the batches of a data set without wasting many pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data.transforms import RandomCrop, ResizeShortestEdge
from numpy.typing import NDArray

from trainers.speedups.canvases import MAX_WASTE, Canvas, choose_canvases, padded, resized, smallest_fitting

COCO_SIZES = {
    (480, 640): 205, (640, 480): 75, (427, 640): 165, (640, 427): 45, (426, 640): 55, (375, 500): 45, (500, 375): 15,
    (333, 500): 35, (640, 640): 15, (425, 640): 40, (640, 426): 12, (428, 640): 30, (360, 640): 15, (612, 612): 5,
    (478, 640): 8, (640, 361): 4, (640, 512): 4, (240, 640): 2, (640, 200): 1,
}  # fmt: skip
"""Heights and widths like those of COCO's training images, and how many of 776 have them."""

ZOO_EDGES = (640, 672, 704, 736, 768, 800)
"""Short edges of the model zoo's files."""
MULTI_SCALE = {"INPUT.MIN_SIZE_TRAIN": ZOO_EDGES, "INPUT.MAX_SIZE_TRAIN": 1333}


def config(**settings: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    return cfg


def coco_sizes() -> NDArray[np.int32]:
    return np.repeat(np.array(list(COCO_SIZES), dtype=np.int32), list(COCO_SIZES.values()), axis=0)


def batches(sizes: NDArray[np.int32], edges: tuple[int, ...], batch_size: int) -> NDArray[np.int64]:
    """Shapes to which detectron2 pads 500 random batches of one orientation, as its own functions compute them."""
    rng = np.random.default_rng(7)
    wide = sizes[:, 1] > sizes[:, 0]
    shapes = []
    for number in rng.integers(len(sizes), size=500):
        images = rng.choice(np.flatnonzero(wide == wide[number]), batch_size)
        each = [ResizeShortestEdge.get_output_shape(*sizes[i].tolist(), rng.choice(edges), 1333) for i in images]
        shapes.append(np.max(each, axis=0))
    return padded(np.array(shapes), 32)


def wasted(canvases: list[Canvas], shapes: NDArray[np.int64]) -> float:
    """Share of the canvases' pixels that the batches' own shapes do not have; all must fit."""
    on = [smallest_fitting(canvases, *shape) for shape in shapes.tolist()]
    assert None not in on
    return 1 - float(shapes.prod(axis=1).sum()) / sum(canvas[0] * canvas[1] for canvas in on if canvas)


@pytest.mark.parametrize(
    ("batch_size", "edges", "most"),
    [(1, ZOO_EDGES, 6), (2, ZOO_EDGES, 5), (16, ZOO_EDGES, 2), (2, (800,), 2), (16, (800,), 2)],
)
def test_batches_of_coco_fit_a_few_canvases_with_little_waste(
    batch_size: int, edges: tuple[int, ...], most: int
) -> None:
    canvases = choose_canvases(config(**MULTI_SCALE | {"INPUT.MIN_SIZE_TRAIN": edges}), coco_sizes(), batch_size, 32)
    assert len(canvases) <= most and all(side % 32 == 0 for canvas in canvases for side in canvas)
    assert any(h > w for h, w in canvases) and any(h < w for h, w in canvases)
    assert wasted(canvases, batches(coco_sizes(), edges, batch_size)) < MAX_WASTE + 0.02


@pytest.mark.shared
def test_batches_of_real_images_fit_a_few_canvases_with_little_waste(shared_data: Path) -> None:
    files = (shared_data / "coco/annotations").glob("*.json")
    images = [image for file in files for image in json.loads(file.read_bytes())["images"]]
    sizes = np.array([(image["height"], image["width"]) for image in images], dtype=np.int32)
    canvases = choose_canvases(config(**MULTI_SCALE), sizes, 2, 32)
    assert len(images) == 123 and len(canvases) <= 5
    assert wasted(canvases, batches(sizes, ZOO_EDGES, 2)) < MAX_WASTE + 0.02


def test_images_of_one_size_need_one_canvas() -> None:
    sizes = np.full((5, 2), 64, dtype=np.int32)
    cfg = config(**{"INPUT.MIN_SIZE_TRAIN": (96,), "INPUT.MAX_SIZE_TRAIN": 96})
    assert choose_canvases(cfg, sizes, 2, 32) == [(96, 96)]
    assert choose_canvases(config(**{"INPUT.MIN_SIZE_TRAIN": (0,)}), sizes, 2, 0) == [(64, 64)]


def test_batches_of_both_orientations_fit_a_canvas_that_is_high_and_wide() -> None:
    sizes = np.array([(480, 640), (640, 480)], dtype=np.int32)
    cfg = config(**MULTI_SCALE | {"DATALOADER.ASPECT_RATIO_GROUPING": False})
    assert choose_canvases(cfg, sizes, 2, 32)[-1] == (1088, 1088)


@pytest.mark.parametrize("sampling", ["choice", "range"])
def test_the_largest_canvas_takes_the_rarest_image_at_its_largest_size(sampling: str) -> None:
    sizes = np.array([(480, 640)] * 100_000 + [(100, 900), (901, 100)], dtype=np.int32)
    cfg = config(**{"INPUT.MIN_SIZE_TRAIN": (640, 800), "INPUT.MIN_SIZE_TRAIN_SAMPLING": sampling})
    canvases = choose_canvases(cfg, sizes, 2, 32)
    for size in sizes[-2:].tolist():
        for edge in range(640, 801):
            assert smallest_fitting(canvases, *ResizeShortestEdge.get_output_shape(*size, edge, 1333))


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("relative", [0.6, 0.4]),
        ("relative_range", [0.5, 0.3]),
        ("absolute", [300, 200]),
        ("absolute_range", [100, 300]),
    ],
)
def test_cropped_batches_fit_too(kind: str, size: list[float]) -> None:
    crop = {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": kind, "INPUT.CROP.SIZE": size}
    sizes = coco_sizes()
    canvases = choose_canvases(config(**MULTI_SCALE | crop), sizes, 2, 32)
    rng, cropping = np.random.default_rng(3), RandomCrop(kind, size)
    np.random.seed(3)
    shapes = [cropping.get_crop_size(sizes[i].tolist()) for i in rng.integers(len(sizes), size=300)]
    found = [smallest_fitting(canvases, *ResizeShortestEdge.get_output_shape(*shape, 800, 1333)) for shape in shapes]
    assert sum(canvas is None for canvas in found) <= 3


def test_sizes_are_detectron2s() -> None:
    rng = np.random.default_rng(1)
    sizes, edges = rng.integers(1, 2000, (500, 2)), rng.integers(1, 1500, 500)
    expected = [
        ResizeShortestEdge.get_output_shape(*size, edge, 1333) for size, edge in zip(sizes.tolist(), edges, strict=True)
    ]
    assert resized(sizes, edges, 1333).tolist() == [list(shape) for shape in expected]
    assert resized(sizes, np.zeros(500, dtype=np.int64), 1333).tolist() == sizes.tolist()
