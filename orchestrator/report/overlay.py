"""Draws objects over a photo: masks, boxes, keypoints, and labels that hide neither objects nor each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle

from orchestrator.data.masks import check_rle
from orchestrator.report.class_colors import Color

LONGER_SIDE, LARGE_SIDE, THUMBNAIL_SIDE = 420, 760, 210
"""Pixels of the longer side of a picture, of one with many objects or of a strip, and of a small one without labels."""

MAX_ASPECT = 4.0
"""Of the longer to the shorter side; what is longer is cut into pieces that are stacked."""

GAP = 8
"""Pixels between pieces."""

CROWDED = 12
"""Objects from which on a picture is large, its labels are small, and masks are drawn without their boxes."""

MAX_LABELS = 40

MIN_BOX = 5
"""Pixels of a drawn box's shorter side, so that an object of one pixel is seen."""

MAX_HIDDEN = 0.15
"""Share of an object that another one's label may cover."""

DARK: Color = (15, 20, 28)
UNKNOWN: Color = (200, 200, 200)
"""Colour of a class that the data set does not name."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the picture."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture with objects."""

    picture: Image.Image
    num_objects: int
    num_unlabelled: int
    num_pieces: int
    """Rows or columns that the photo is cut into."""
    is_wide: bool

    @property
    def is_crowded(self) -> bool:
        """Whether it shows many objects."""
        return self.num_objects > CROWDED


@dataclass(slots=True)
class _Shape:
    box: Box
    color: Color
    text: str
    mask: NDArray[np.bool_] | None
    keypoints: list[tuple[float, float]] = field(default_factory=list)

    @property
    def area(self) -> float:
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


def draw(
    photo: Image.Image, entries: Sequence[Mapping[str, Any]], names: Mapping[Any, str], colors: Mapping[str, Color],
    *, thumbnail: bool = False,
) -> Drawn:  # fmt: skip
    """Draws annotations or detections in COCO's form over a photo.

    Args:
        photo: The photo.
        entries: The objects; those without a usable box are left out.
        names: Names of the classes, by category id.
        colors: Their colours, by name.
        thumbnail: Draw it small, without labels.
    """
    is_wide = photo.width >= photo.height
    aspect = max(photo.size) / min(photo.size)
    num_pieces = round(math.sqrt(aspect)) if aspect > MAX_ASPECT else 1
    is_large = num_pieces > 1 or len(entries) > CROWDED
    side = THUMBNAIL_SIDE if thumbnail else LARGE_SIDE if is_large else LONGER_SIDE
    scale = side / max(max(photo.size) / num_pieces, min(photo.size) * num_pieces)
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    made = (_shape(entry, photo, size, names, colors) for entry in entries)
    # The largest first: a small object in front of it stays visible.
    shapes = sorted((shape for shape in made if shape is not None), key=lambda shape: -shape.area)
    pixels = np.asarray(photo.resize(size, Image.Resampling.BICUBIC)).copy()
    _fill_masks(pixels, shapes)
    drawn = Image.fromarray(pixels)
    for shape in shapes:
        is_tiny = shape.area <= 4 * MIN_BOX**2
        _outline(ImageDraw.Draw(drawn), shape, with_box=shape.mask is None or is_tiny or len(shapes) <= CROWDED)
    cuts = [round(max(size) * piece / num_pieces) for piece in range(num_pieces + 1)]
    num_labels = 0 if thumbnail else _label(drawn, shapes, cuts, is_wide=is_wide)
    return Drawn(_stack(drawn, cuts, is_wide=is_wide), len(shapes), len(shapes) - num_labels, num_pieces, is_wide)


def _shape(
    entry: Mapping[str, Any], photo: Image.Image, size: tuple[int, int], names: Mapping[Any, str],
    colors: Mapping[str, Color],
) -> _Shape | None:  # fmt: skip
    """An object in pixels of the picture; None where it has no usable box."""
    numbers = entry.get("bbox") or []
    if len(numbers) != 4 or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        return None
    across, down = size[0] / photo.width, size[1] / photo.height
    left, top, width, height = numbers
    name = names.get(entry.get("category_id"), "?")
    score = f" {100 * entry['score']:.0f} %" if "score" in entry else ""
    points = entry.get("keypoints") or []
    return _Shape(
        _at_least(MIN_BOX, left * across, top * down, (left + width) * across, (top + height) * down),
        colors.get(name, UNKNOWN),
        name[:24] + score,
        _mask(entry.get("segmentation"), photo, size),
        [(points[n] * across, points[n + 1] * down) for n in range(0, len(points) - 2, 3) if points[n + 2] > 0],
    )


def _at_least(size: float, left: float, top: float, right: float, bottom: float) -> Box:
    """A box, grown around its middle where it is smaller."""
    x, y = max(0.0, size - (right - left)) / 2, max(0.0, size - (bottom - top)) / 2
    return left - x, top - y, right + x, bottom + y


def _mask(shape: Any, photo: Image.Image, size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """A mask at the picture's size; None where there is none, or one that cannot be read."""
    width, height = size
    if isinstance(shape, list):
        scales = np.array([width / photo.width, height / photo.height])
        # As detectron2, without what is no polygon.
        polygons = [polygon for polygon in shape if len(polygon) >= 6 and len(polygon) % 2 == 0]
        if not polygons:
            return None
        scaled = [(np.reshape(polygon, (-1, 2)) * scales).ravel().tolist() for polygon in polygons]
        inside: NDArray[np.bool_] = rle.decode(rle.merge(rle.frPyObjects(scaled, height, width))) > 0
        return inside
    if not isinstance(shape, dict) or check_rle(shape, photo.size):
        return None  # pycocotools would read beyond a bad one
    counts = shape["counts"]
    encoded = rle.frPyObjects(shape, *shape["size"]) if isinstance(counts, list) else shape
    decoded = Image.fromarray(rle.decode(encoded) * np.uint8(255)).resize(size, Image.Resampling.BILINEAR)
    soft = np.asarray(decoded)
    return soft > (127 if soft.max() > 127 else 0)  # an object of a pixel is not lost


def _fill_masks(pixels: NDArray[np.uint8], shapes: Iterable[_Shape]) -> None:
    """Tints the masks and draws their outlines in their colour and, around it, a dark line: visible on any photo."""
    masks = [(shape.mask, shape.color) for shape in shapes if shape.mask is not None and shape.mask.any()]
    windows = [(inside, color, _window(inside)) for inside, color in masks]
    for inside, color, window in windows:
        part, within = pixels[window], inside[window]
        part[within] = (0.6 * part[within] + 0.4 * np.array(color)).astype(np.uint8)
    for inside, _, window in windows:
        pixels[window][_grown(inside[window]) & ~inside[window]] = DARK
    for inside, color, window in windows:
        pixels[window][inside[window] & _grown(~inside[window])] = color


def _window(inside: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Rows and columns around a mask, with a pixel more on each side."""
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    return slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(columns[0] - 1, 0), columns[-1] + 2)


def _grown(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """With the pixels next to it."""
    padded = np.pad(inside, 1)
    grown: NDArray[np.bool_] = inside | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown


def _outline(pen: ImageDraw.ImageDraw, shape: _Shape, *, with_box: bool) -> None:
    """Draws the box, in its colour between two dark lines, and the keypoints."""
    left, top, right, bottom = shape.box
    if with_box:
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=DARK)
        pen.rectangle(shape.box, outline=shape.color)
    for x, y in shape.keypoints:
        pen.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=shape.color, outline=DARK)


def _label(drawn: Image.Image, shapes: Sequence[_Shape], cuts: Sequence[int], *, is_wide: bool) -> int:
    """Labels the objects for which there is room, the largest first; returns how many."""
    pen, font = ImageDraw.Draw(drawn), _font(11 if len(shapes) > CROWDED else 13)
    boxes = np.array([shape.box for shape in shapes]).reshape(-1, 4)
    placed: list[Box] = []
    for number, shape in enumerate(shapes):
        width, height = pen.textlength(shape.text, font) + 5, font.size + 4
        others = np.delete(boxes, number, axis=0)
        for left, top in _places(shape.box, width, height):
            label = left, top, left + width, top + height
            if _is_free(label, placed, others, drawn.size, cuts, is_wide=is_wide):
                placed.append(label)
                pen.rectangle(label, fill=DARK)
                red, green, blue = ((channel + 255) // 2 for channel in shape.color)  # light enough to be read
                pen.text((left + 2, top + 1), shape.text, fill=(red, green, blue), font=font)
                break
        if len(placed) == MAX_LABELS:
            break
    return len(placed)


def _places(box: Box, width: float, height: float) -> list[tuple[float, float]]:
    """Left and top of where a label may be: outside its object, or inside a much larger one."""
    left, top, right, bottom = box
    places = [
        (left, top - height - 1),
        (left, bottom + 1),
        (right - width, top - height - 1),
        (right - width, bottom + 1),
    ]
    places += [(right + 1, top), (left - width - 1, top)]
    if (right - left) * (bottom - top) * MAX_HIDDEN > width * height:
        places += [(left + 1, top + 1), (right - width - 1, top + 1), (left + 1, bottom - height - 1)]
    return places


def _is_free(
    label: Box, placed: Sequence[Box], others: NDArray[np.float64], size: tuple[int, int], cuts: Sequence[int], *,
    is_wide: bool,
) -> bool:  # fmt: skip
    """Whether a label is inside one piece of the picture, on no other label, and hides no other object."""
    left, top, right, bottom = label
    if left < 0 or top < 0 or right >= size[0] or bottom >= size[1]:
        return False
    start, end = (left, right) if is_wide else (top, bottom)
    if any(start < cut < end for cut in cuts) or (placed and _overlap(label, np.array(placed)).any()):
        return False
    areas = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
    return bool((_overlap(label, others) <= MAX_HIDDEN * areas).all())


def _overlap(box: Box, others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area that a box shares with each of some others."""
    across = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
    down = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
    shared: NDArray[np.float64] = np.clip(across, 0, None) * np.clip(down, 0, None)
    return shared


def _stack(drawn: Image.Image, cuts: Sequence[int], *, is_wide: bool) -> Image.Image:
    """The pieces of a strip below each other, or next to each other; the whole picture where it is not cut."""
    if len(cuts) == 2:
        return drawn
    short = drawn.height if is_wide else drawn.width
    longest, across = max(end - start for start, end in pairwise(cuts)), (len(cuts) - 1) * (short + GAP) - GAP
    stacked = Image.new("RGBA", (longest, across) if is_wide else (across, longest))
    for number, (start, end) in enumerate(pairwise(cuts)):
        place = number * (short + GAP)
        if is_wide:
            stacked.paste(drawn.crop((start, 0, end, short)), (0, place))
        else:
            stacked.paste(drawn.crop((0, start, short, end)), (place, 0))
    return stacked


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's font, which has more letters than Pillow's."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
