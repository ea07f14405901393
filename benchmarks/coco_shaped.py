"""Draws images and annotations that cost a detector what COCO's do: their sizes, objects, outlines and JPEG's details.

The tables describe 123 images of COCO 2017 (57 of train2017, 66 of val2017), whose files have 4.5 bits a pixel and
decode in 7.3 ns a pixel where these do in 7.5. What the images show cannot be learnt.
"""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.data.layout import Dataset, coco_layout
from trainers.contract.cpus import num_usable_cpus

SIZES = {
    (640, 480): 20, (640, 427): 15, (480, 640): 8, (640, 426): 7, (640, 425): 5, (427, 640): 4, (500, 375): 6,
    (640, 428): 5, (500, 334): 4, (640, 360): 2, (640, 383): 3, (640, 393): 3, (640, 449): 3, (640, 506): 3,
    (426, 640): 3, (621, 640): 2, (375, 500): 2, (640, 559): 2, (449, 640): 1, (612, 612): 1, (351, 500): 1,
}  # fmt: skip
"""(width, height) in pixels, and how many of 100 images have it; rarer sizes are counted at their nearest neighbour."""

OBJECTS = {1: 12, 2: 14, 3: 11, 4: 12, 5: 9, 6: 8, 7: 6, 8: 5, 9: 4, 12: 6, 14: 4, 17: 4, 21: 2, 33: 2, 45: 1}
"""Objects of an image, and how many of 100 images have as many."""

MEDIAN_SIDE, SIDE_SPREAD = 65.0, 0.9
"""Of an object's box: the median of its sides in pixels, and the standard deviation of their logarithm."""

MEDIAN_CORNERS, CORNERS_SPREAD = 17.0, 0.65
"""The same of the corners of its outline."""

IN_TWO_PARTS = 0.06
"""Share of objects whose outline is two polygons."""

NUM_CLASSES = 80
JPEG_QUALITY = 95

Box = list[float]


def polygon(box: Box, rng: np.random.Generator, corners: int = 24) -> list[float]:
    """A ragged outline within a box (x, y, width, height), about as many corners as COCO's."""
    x, y, width, height = box
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    reach = rng.uniform(0.7, 1.0, corners) / 2
    points = np.stack([x + width * (0.5 + reach * np.cos(angle)), y + height * (0.5 + reach * np.sin(angle))], axis=1)
    flat: list[float] = points.round(2).ravel().tolist()
    return flat


def photograph(width: int, height: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """An image with detail of every size, as photographs have it, so that decoding its JPEG takes as long."""
    image = np.full((height, width, 3), 110, np.float32)
    for octave in range(8):
        shape = max(2, height >> octave), max(2, width >> octave)
        grey = rng.standard_normal((*shape, 1), dtype=np.float32)
        layer = grey + 0.6 * rng.standard_normal((*shape, 3), dtype=np.float32)
        image += 7.0 * 1.45**octave * cv2.resize(layer, (width, height), interpolation=cv2.INTER_LINEAR)
    drawn: NDArray[np.uint8] = np.clip(image, 0, 255).astype(np.uint8)
    return drawn


def coco_shaped(root: Path, num_images: int = 512, scale: float = 1.0) -> Dataset:
    """Draws a training and a validation set into `root`, unless it is there; returns where their files are.

    Args:
        root: The folder; one that exists is complete.
        num_images: Of the training set; the validation set has an eighth of them.
        scale: Of all lengths in pixels; less than 1 for tests.
    """
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as partial:
            made = Path(partial) / root.name
            _write(made, num_images, scale)
            made.rename(root)
    return coco_layout(root)


def _write(root: Path, num_images: int, scale: float) -> None:
    (root / "annotations").mkdir(parents=True)
    for number, (split, count) in enumerate((("train2017", num_images), ("val2017", max(1, num_images // 8)))):
        folder = root / split
        folder.mkdir()
        work = [(str(folder), number, index, scale) for index in range(count)]
        processes = num_usable_cpus()
        if count < 64:
            drawn = [_draw(each) for each in work]
        else:
            # Not fork: the caller may run threads, whose locks a fork would copy.
            with ProcessPoolExecutor(processes, mp_context=get_context("forkserver")) as pool:
                drawn = list(pool.map(_draw, work, chunksize=-(-count // (4 * processes))))
        images = [image for image, _ in drawn]
        annotations = [each for _, own in drawn for each in own]
        for identifier, annotation in enumerate(annotations, 1):
            annotation["id"] = identifier
        categories = [{"id": each, "name": f"class {each}"} for each in range(1, NUM_CLASSES + 1)]
        values = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(values), encoding="utf-8")


def _draw(work: tuple[str, int, int, float]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder, split, index, scale = work
    cv2.setNumThreads(1)
    rng = np.random.default_rng([split, index])
    width, height = (max(8, round(side * scale)) for side in list(SIZES)[_choice(rng, SIZES)])
    name = f"{index + 1:012d}.jpg"
    image = photograph(width, height, rng)
    cv2.imwrite(str(Path(folder, name)), image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    annotations = [_annotate(index + 1, width, height, scale, rng) for _ in range(list(OBJECTS)[_choice(rng, OBJECTS)])]
    return {"id": index + 1, "width": width, "height": height, "file_name": name}, annotations


def _choice(rng: np.random.Generator, table: dict[Any, int]) -> int:
    weights = np.array(list(table.values()), float)
    return int(rng.choice(len(table), p=weights / weights.sum()))


def _annotate(image_id: int, width: int, height: int, scale: float, rng: np.random.Generator) -> dict[str, Any]:
    sides = np.exp(rng.normal(np.log(MEDIAN_SIDE * scale), SIDE_SPREAD, 2))
    box_width, box_height = np.clip(sides, 4, [width - 1, height - 1]).tolist()
    x, y = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    box = [round(float(value), 2) for value in (x, y, box_width, box_height)]
    parts = 2 if rng.random() < IN_TWO_PARTS else 1
    corners = np.exp(rng.normal(np.log(MEDIAN_CORNERS), CORNERS_SPREAD, parts)).clip(4, 120).astype(int)
    return {
        "image_id": image_id, "category_id": int(rng.integers(1, NUM_CLASSES + 1)), "iscrowd": 0, "bbox": box,
        "area": box_width * box_height * 0.7, "segmentation": [polygon(box, rng, int(each)) for each in corners],
    }  # fmt: skip
