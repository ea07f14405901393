"""Draws one image of a generated data set: filled shapes on a noisy ground, with COCO annotations that fit exactly.

Area and box of an annotation are those of the mask that pycocotools decodes from its segmentation, and the pixels
painted are those of the same mask, so nothing is lost between what is drawn and what is scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

Mask = npt.NDArray[np.uint8]
Colour = npt.NDArray[np.float64]

GENERATOR_VERSION = 1
"""Raised whenever the same parameters would give other bytes, so that old folders are not taken for new ones."""

SHAPE_NAMES = ("circle", "square", "triangle", "star", "cross", "hexagon", "diamond", "arrow")


@dataclass(frozen=True)
class ShapesParameters:
    """What a drawn data set depends on; written into its folder as `generated.json`."""

    num_train: int = 256
    num_val: int = 64
    width: int = 128
    height: int = 128
    """Pixels, like the width."""
    num_classes: int = 3
    """Shapes to tell apart, at least 1; beyond the named ones they are regular polygons."""
    seed: int = 0
    crowd_fraction: float = 0.0
    """Share of the images that also hold one crowd region (RLE, `iscrowd` 1), 0 to 1."""
    min_shapes: int = 1
    """Fewest shapes per image; fewer are drawn only where there is no room left."""
    max_shapes: int = 4
    """Most shapes per image."""
    mask_format: Literal["polygon", "rle"] = "polygon"
    """How the masks of shapes other than crowds are written: polygons, or compressed RLE."""
    distinct_images: int | None = None
    """Images drawn per split; further ones are hard links to them under new names (for load tests of COCO's size).
    None draws every one."""
    version: int = GENERATOR_VERSION

    def __post_init__(self) -> None:
        """Refuses values that no image can be drawn from: ValueError with the field, its value and what is allowed."""
        lowest = {"num_train": 0, "num_val": 0, "num_classes": 1, "seed": 0, "min_shapes": 1, "distinct_images": 1}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} is {value}; it must be at least {low}")
        for name in ("width", "height"):
            if not 8 <= getattr(self, name) <= 10_000:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 8 to 10000 pixels")
        if not 0.0 <= self.crowd_fraction <= 1.0:
            raise ValueError(f"crowd_fraction is {self.crowd_fraction}; it must be 0 to 1")
        if self.max_shapes < self.min_shapes:
            raise ValueError(f"max_shapes is {self.max_shapes}, below min_shapes {self.min_shapes}")
        if self.mask_format not in ("polygon", "rle"):
            raise ValueError(f"mask_format is {self.mask_format!r}; it must be 'polygon' or 'rle'")


def draw_image(rng: np.random.Generator, parameters: ShapesParameters) -> tuple[Mask, list[dict[str, Any]]]:
    """Draws one image (height x width x 3, BGR, uint8) and its annotations without ids.

    Shapes never cover each other by more than a sixth of the smaller one; what is covered is taken out of the mask.
    """
    height, width = parameters.height, parameters.width
    image, ground = _draw_ground(rng, height, width)
    wanted = int(rng.integers(parameters.min_shapes, parameters.max_shapes + 1))
    # The more shapes, the smaller each: three quarters of the image would be covered if all had the largest size.
    largest = min(0.28, 0.55 / math.sqrt(wanted)) * min(height, width)
    masks: list[Mask] = []
    polygons: list[list[float]] = []
    classes: list[int] = []
    covered: list[bool] = []
    for _ in range(20 * wanted):
        if len(masks) == wanted:
            break
        kind = int(rng.integers(parameters.num_classes))
        radius = float(rng.uniform(0.55, 1.0)) * largest
        polygon = _outline(rng, kind, radius, height, width)
        mask = _rasterize([polygon], height, width)
        size = int(mask.sum())
        if any(int((mask & other).sum()) * 6 > min(size, int(other.sum())) for other in masks) or not size:
            continue
        covered = [hidden or bool((mask & other).any()) for hidden, other in zip(covered, masks, strict=True)]
        covered.append(False)
        masks = [*(other & ~mask for other in masks), mask]
        polygons.append(polygon)
        classes.append(kind)
        image[mask.astype(bool)] = _paint(rng, ground, size)
    shapes = [
        _annotation(parameters, kind, [polygon] if not hidden else _trace(mask), mask)
        for kind, polygon, hidden, mask in zip(classes, polygons, covered, masks, strict=True)
    ]
    if parameters.crowd_fraction and rng.random() < parameters.crowd_fraction:
        shapes.extend(_draw_crowd(rng, parameters, image, ground, masks))
    return image, shapes


def _draw_ground(rng: np.random.Generator, height: int, width: int) -> tuple[Mask, Colour]:
    """Draws the textured ground; also returns its mean colour (3, 0 to 255)."""
    import cv2

    colour = rng.uniform(60, 195, 3)
    coarse = rng.normal(0, 6, (max(2, height // 16), max(2, width // 16), 3)).astype(np.float32)
    texture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    noise = rng.normal(0, 2, (height, width, 3))
    return np.clip(colour + texture + noise, 0, 255).astype(np.uint8), colour


def _paint(rng: np.random.Generator, ground: Colour, num_pixels: int) -> Mask:
    """Draws a colour that differs clearly from the ground's, with a little noise, for a number of pixels."""
    colour = rng.uniform(0, 255, 3)
    while float(np.abs(colour - ground).max()) < 90:
        colour = rng.uniform(0, 255, 3)
    return np.clip(colour + rng.normal(0, 2, (num_pixels, 3)), 0, 255).astype(np.uint8)


def _draw_crowd(
    rng: np.random.Generator, parameters: ShapesParameters, image: Mask, ground: Colour, taken: list[Mask]
) -> list[dict[str, Any]]:
    """Draws small shapes of one class where no other shape is, with one annotation of uncompressed RLE for all."""
    height, width = parameters.height, parameters.width
    kind = int(rng.integers(parameters.num_classes))
    free = ~np.any(np.array(taken, dtype=bool), axis=0) if taken else np.ones((height, width), dtype=bool)
    crowd = np.zeros((height, width), dtype=np.uint8)
    for _ in range(12):
        polygon = _outline(rng, kind, 0.06 * min(height, width), height, width)
        mask = _rasterize([polygon], height, width) & free
        image[mask.astype(bool)] = _paint(rng, ground, int(mask.sum()))
        crowd |= mask
    if not crowd.any():
        return []
    flat = crowd.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges.tolist(), flat.size]).tolist()
    segmentation = {"counts": [0, *counts] if flat[0] else counts, "size": [height, width]}
    return [{**_measure(crowd, kind), "iscrowd": 1, "segmentation": segmentation}]


def _annotation(parameters: ShapesParameters, kind: int, polygons: list[list[float]], mask: Mask) -> dict[str, Any]:
    if parameters.mask_format == "rle":
        encoded = coco_mask.encode(np.asfortranarray(mask))
        segmentation: Any = {"counts": encoded["counts"].decode("ascii"), "size": [parameters.height, parameters.width]}
        return {**_measure(mask, kind), "iscrowd": 0, "segmentation": segmentation}
    # Measured on the mask that readers decode from the polygons, which may differ by an edge pixel from the drawn one.
    seen = _rasterize(polygons, parameters.height, parameters.width)
    return {**_measure(seen, kind), "iscrowd": 0, "segmentation": polygons}


def _measure(mask: Mask, kind: int) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
    return {"category_id": kind + 1, "bbox": [float(value) for value in box], "area": float(mask.sum())}


def _rasterize(polygons: list[list[float]], height: int, width: int) -> Mask:
    mask: Mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
    return mask


def _trace(mask: Mask) -> list[list[float]]:
    """Outlines a mask, at four times its size so that the outline runs along pixel edges, not centres."""
    import cv2

    enlarged = mask.repeat(4, axis=0).repeat(4, axis=1)
    outlines, _ = cv2.findContours(enlarged, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    # Half a pixel of tolerance: a stair of hundreds of corners would slow every reader of the polygons.
    simple = [cv2.approxPolyDP(outline, 2.0, True) for outline in outlines]
    kept = [outline for outline in simple if len(outline) >= 3 and cv2.contourArea(outline) > 16]
    kept = kept or [max(outlines, key=cv2.contourArea)]
    return [np.round((outline.reshape(-1) + 0.5) / 4, 2).tolist() for outline in kept]


def _outline(rng: np.random.Generator, kind: int, radius: float, height: int, width: int) -> list[float]:
    """Places a shape inside the image, turned by up to 12 degrees: [x0, y0, x1, y1, …] in pixels."""
    x = float(rng.uniform(radius, max(radius, width - radius)))
    y = float(rng.uniform(radius, max(radius, height - radius)))
    turn = math.radians(float(rng.uniform(-12, 12)))
    points: list[float] = []
    for angle, reach in _corners(kind):
        points.append(round(min(max(x + radius * reach * math.sin(angle + turn), 0.0), width), 2))
        points.append(round(min(max(y - radius * reach * math.cos(angle + turn), 0.0), height), 2))
    return points


def _corners(kind: int) -> list[tuple[float, float]]:
    """The corners of a shape as (angle from upwards, distance from the centre; 1 is the radius)."""
    full = 2 * math.pi
    name = SHAPE_NAMES[kind] if kind < len(SHAPE_NAMES) else ""
    if name == "square":
        return [(full * (index + 0.5) / 4, 1.0) for index in range(4)]
    if name == "star":
        return [(full * index / 10, 1.0 if index % 2 == 0 else 0.42) for index in range(10)]
    if name == "cross":
        arm, inner = math.atan2(1, 3), math.hypot(1, 1) / math.hypot(1, 3)
        quarter = [(-arm, 1.0), (arm, 1.0), (full / 8, inner)]
        return [(angle + full * side / 4, reach) for side in range(4) for angle, reach in quarter]
    if name == "arrow":
        return [(0.0, 1.0), (full * 0.36, 1.0), (full / 2, 0.25), (full * 0.64, 1.0)]
    num_corners = {"circle": 28, "triangle": 3, "hexagon": 6, "diamond": 4}.get(name, kind - len(SHAPE_NAMES) + 7)
    squeeze = 0.55 if name == "diamond" else 1.0
    return [(full * index / num_corners, squeeze if index % 2 else 1.0) for index in range(num_corners)]


def name_shape(kind: int) -> str:
    """The name of a class, by its number from 0."""
    return SHAPE_NAMES[kind] if kind < len(SHAPE_NAMES) else f"polygon of {kind - len(SHAPE_NAMES) + 7} sides"
