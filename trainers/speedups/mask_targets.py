"""Draws mask training targets from polygons, an image's instances at a time: detectron2's own, bit for bit.

detectron2 copies, shifts, scales, rasterizes and decodes the polygons of every proposal by itself, in Python, and
copies all polygons again whenever instances are selected. Here an image's polygons are one array that selections
share, and all proposals are drawn together in a few dozen array operations.

Other libraries' rasterizers fill other border pixels. This one fills those of pycocotools, from the same floats that
detectron2 computes, down to which of its steps round to 32 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances, PolygonMasks
from numpy.typing import NDArray

STEPS_PER_PIXEL = 5
"""Steps in which pycocotools walks along an edge (maskApi.c, `rleFrPoly`)."""
MIN_BOX_SIDE = 0.1
"""Pixels; a box narrower than this is scaled as if it were this wide (detectron2/structures/masks.py)."""


class PackedPolygons(PolygonMasks):
    """An image's polygon masks in one array; takes detectron2's `PolygonMasks`' place.

    Args:
        polygons: For each instance its polygons, each a flat vector (x0, y0, x1, y1, …) in pixels of the image.

    Raises:
        ValueError: A polygon has fewer than three corners or an odd number of coordinates.
    """

    def __init__(self, polygons: Sequence[Sequence[NDArray[Any] | torch.Tensor]]) -> None:
        flat = [np.asarray(polygon, dtype=np.float64) for instance in polygons for polygon in instance]
        for polygon in flat:
            if polygon.size % 2 or polygon.size < 6:
                raise ValueError(f"cannot make a polygon of {polygon.size} coordinates")
        interleaved = np.concatenate(flat) if flat else np.empty(0)
        self._points = np.stack([interleaved[::2], interleaved[1::2]])  # whole rows are fetched from faster than pairs
        self._first_point = _starts([polygon.size // 2 for polygon in flat])
        self._first_polygon = _starts([len(instance) for instance in polygons])
        self._selected = np.arange(len(polygons))

    @property
    def polygons(self) -> list[list[NDArray[np.float64]]]:
        """The polygons as detectron2's class has them, for code that reads them one by one."""
        return [
            [
                self._points[:, self._first_point[p] : self._first_point[p + 1]].T.reshape(-1)
                for p in range(self._first_polygon[i], self._first_polygon[i + 1])
            ]
            for i in self._selected.tolist()
        ]

    def __len__(self) -> int:
        return len(self._selected)

    def __iter__(self) -> Iterator[list[NDArray[np.float64]]]:
        return iter(self.polygons)

    def __getitem__(self, item: int | slice | list[int] | torch.Tensor) -> PackedPolygons:
        """Some of the instances, by number, slice, list, integer tensor or boolean tensor; nothing is copied."""
        if isinstance(item, torch.Tensor):
            index: Any = item.cpu().numpy()
            if index.dtype.kind not in "biu":
                raise ValueError(f"cannot select instances by a tensor of {item.dtype}")
        elif isinstance(item, int):
            index = [item]
        else:
            index = item if isinstance(item, slice) else np.asarray(item, dtype=np.int64)
        chosen = copy.copy(self)
        chosen._selected = self._selected[index]
        return chosen

    def nonempty(self) -> torch.Tensor:
        """For each instance whether it has a polygon; shape (N,), bool."""
        return torch.from_numpy(np.diff(self._first_polygon)[self._selected] > 0)

    def flat(self) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """Corners (2, V), x and y, polygon after polygon; the polygon of each, (V,); the instance of each polygon."""
        polygons, owners = ranges(self._first_polygon, self._selected)
        points, polygon_of_point = ranges(self._first_point, polygons)
        return self._points.take(points, axis=1), polygon_of_point, owners

    def crop_and_resize(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        """The part of each instance within its box, (x0, y0, x1, y1) in pixels of the image, drawn on a square grid.

        Returns:
            (N, mask_size, mask_size), bool, on the device of `boxes`.

        Raises:
            ValueError: There are more or fewer boxes than instances.
        """
        if len(boxes) != len(self):
            raise ValueError(f"{len(boxes)} boxes for {len(self)} instances")
        drawn = draw_in_boxes(*self.flat(), boxes.detach().cpu().numpy(), mask_size)
        return torch.from_numpy(drawn).to(boxes.device)


def draw_in_boxes(
    points: NDArray[np.float64],
    polygon: NDArray[np.int64],
    owners: NDArray[np.int64],
    boxes: NDArray[np.float32],
    side: int,
) -> NDArray[np.bool_]:
    """Draws polygons as seen through boxes, from the floats that detectron2's `rasterize_polygons_within_box` computes.

    Args:
        points: (2, V), x and y in pixels of the image, polygon after polygon.
        polygon: (V,) which polygon each belongs to, ascending from 0.
        owners: (P,) the box of each polygon, ascending; a box shows the union of its polygons.
        boxes: (R, 4), corners (x0, y0, x1, y1) in pixels of the image.
        side: Rows and columns of a box's grid.

    Returns:
        (R, side, side).
    """
    drawn = np.zeros((len(boxes), side, side), dtype=np.uint8)
    if len(owners):
        owner = owners[polygon]
        sides = boxes[:, 2:] - boxes[:, :2]
        # detectron2 divides by a side in the boxes' 32 bits, by the least side in 64.
        min_side = np.asarray(MIN_BOX_SIDE, dtype=sides.dtype)
        scale = (side / np.maximum(sides, min_side)).astype(np.float64)
        scale[sides < min_side] = side / MIN_BOX_SIDE
        offset = np.ascontiguousarray(boxes[:, :2].T).take(owner, axis=1)
        vertices = (points - offset) * np.ascontiguousarray(scale.T).take(owner, axis=1)
        masks = rasterize(vertices, polygon, len(owners), side)
        further = np.flatnonzero(owners[1:] == owners[:-1]) + 1  # all but the first polygon of a box
        # Assigned from the last to the first, a box keeps its first; the others are added to it.
        drawn[owners[::-1]] = masks[::-1]
        for number in further.tolist():
            drawn[owners[number]] |= masks[number]
    return drawn.view(np.bool_)


def rasterize(
    vertices: NDArray[np.float64], polygon: NDArray[np.int64], num_polygons: int, side: int
) -> NDArray[np.uint8]:
    """Draws polygons, each on a separate square grid: the pixels that pycocotools' `rleFrPoly` fills.

    pycocotools walks along every edge in steps of a fifth of a pixel, and fills a column of pixels by parity from the
    points where the walk crosses the column's middle. Only these crossings matter, and there are at most as many on
    an edge as columns: they are computed directly, for all edges at once, with the roundings that the walk has.

    Args:
        vertices: (2, V), x and y in pixels of the grid, polygon after polygon.
        polygon: (V,) which polygon each belongs to, ascending from 0.
        num_polygons: How many there are; each has a vertex at least.
        side: Rows and columns of a grid.

    Returns:
        (num_polygons, side, side), 0 or 1.
    """
    points = np.trunc(vertices * STEPS_PER_PIXEL + 0.5).astype(np.int64)
    last = np.append(np.flatnonzero(polygon[1:] != polygon[:-1]), len(polygon) - 1)
    following = np.arange(1, len(polygon) + 1)
    following[last[0]], following[last[1:]] = 0, last[:-1] + 1
    ends = points.take(following, axis=1)
    delta = np.abs(ends - points)
    shallow = delta[0] >= delta[1]
    # Edges are walked from left to right, steep ones from top to bottom.
    turned = np.where(shallow, points[0] > ends[0], points[1] > ends[1])
    (start_x, start_y), (end_x, end_y) = np.where(turned, ends, points), np.where(turned, points, ends)
    low, high = np.minimum(start_x, end_x), np.maximum(start_x, end_x)
    first = np.maximum(-((2 - low) // STEPS_PER_PIXEL), 0)
    count = np.maximum(np.minimum((high - 3) // STEPS_PER_PIXEL, side - 1) - first + 1, 0)

    # One entry for each crossing of an edge and a column's middle, between fine positions 2 and 3 of the column.
    edge = np.repeat(np.arange(len(count)), count)
    column = np.arange(len(edge)) + (first - np.cumsum(count) + count).take(edge)
    middle = column * STEPS_PER_PIXEL + 2
    across, down = end_x - start_x, end_y - start_y
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = np.where(shallow, down, across) / np.where(shallow, across, down)
    x, y, slope, is_shallow = start_x.take(edge), start_y.take(edge), slopes.take(edge), shallow.take(edge)
    before = y + slope * (middle - x) + 0.5
    after = y + slope * (middle + 1 - x) + 0.5
    on_shallow = np.trunc(np.minimum(before, after))
    # On a steep edge: the last step before the walk reaches the middle, or the last one after it when going left.
    rising = slope > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        reached = (middle + 0.5 - x) / slope
    step = np.where(rising, np.ceil(reached) - 1, np.floor(reached))
    step[is_shallow] = 0

    def beyond(steps: NDArray[np.float64]) -> NDArray[np.bool_]:
        past: NDArray[np.bool_] = (x + slope * steps + 0.5 >= middle + 1) == rising
        return past

    step -= beyond(step)
    step += ~beyond(step + 1)
    fine = np.where(is_shallow, on_shallow, y + step)
    row = np.ceil(np.clip((fine + 0.5) / STEPS_PER_PIXEL - 0.5, 0, side)).astype(np.int64)
    columns = num_polygons * side
    crossings = np.bincount(row * columns + polygon.take(edge) * side + column, minlength=(side + 1) * columns)
    filled = crossings.astype(np.uint8).reshape(side + 1, columns)[:-1]
    for below in range(1, side):  # all columns of all polygons at once; along a column would be one number at a time
        filled[below] ^= filled[below - 1]
    masks: NDArray[np.uint8] = (filled & np.uint8(1)).reshape(side, num_polygons, side)
    return masks.transpose(1, 0, 2)


def pack(instances: Instances) -> Instances:
    """Exchanges an image's polygon masks for packed ones, in place; other masks stay as they are. Returns the image."""
    if instances.has("gt_masks") and type(instances.gt_masks) is PolygonMasks:
        instances.gt_masks = PackedPolygons(instances.gt_masks.polygons)
    return instances


def _starts(sizes: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of several consecutive runs begins, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def ranges(starts: NDArray[np.int64], chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The members of the chosen runs, one run after the other, and for each the position of its run in `chosen`."""
    first, sizes = starts[chosen], starts[chosen + 1] - starts[chosen]
    run = np.repeat(np.arange(len(chosen)), sizes)
    offsets = _starts(sizes)[:-1]
    return np.arange(len(run)) + (first - offsets)[run], run
