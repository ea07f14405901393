"""Chooses the few sizes, canvases, to which training batches are padded, from the data set and the config's `INPUT`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode
from numpy.typing import NDArray

Canvas = tuple[int, int]
"""Height and width in pixels."""

MAX_WASTE = 0.12
"""Largest share of the canvases' pixels, on average, that detectron2's own padding would not have. Every step computes
on them; every further canvas costs new kernels and one more captured step, once."""

MAX_CANVASES = 12
"""As many at most, whatever the waste: each holds memory."""

NUM_DRAWN = 2048
"""Batches that stand for all; on COCO's images the waste of others differs by less than 0.01."""


def choose_canvases(cfg: CfgNode, image_sizes: NDArray[np.int32], batch_size: int, divisibility: int) -> list[Canvas]:
    """The canvases for a data set, smallest first: few, with a waste below `MAX_WASTE`.

    Every batch fits one of them, except where `INPUT.CROP` makes a shape that none of the drawn batches has. The same
    arguments give the same canvases.

    Args:
        cfg: The model's config, of which `INPUT` and `DATALOADER.ASPECT_RATIO_GROUPING` count.
        image_sizes: (N, 2), height and width of the images before augmentation; N is not 0.
        batch_size: Images in a batch, which share a canvas.
        divisibility: What the sides are multiples of: the backbone's `size_divisibility`; 0 and 1 for no matter.
    """
    rng = np.random.default_rng(0)
    wide = (image_sizes[:, 1] > image_sizes[:, 0]) & bool(cfg.DATALOADER.ASPECT_RATIO_GROUPING)
    chosen, drawn = [], []
    for group in (image_sizes[~wide], image_sizes[wide]):
        if len(group):
            count = max(1, round(NUM_DRAWN * len(group) / len(image_sizes)))
            images = group[rng.integers(len(group), size=count * batch_size)]
            shapes = _augmented(cfg, images, rng).reshape(count, batch_size, 2).max(axis=1)
            drawn.append(padded(shapes, divisibility))
            chosen.append(padded(np.maximum(_largest(cfg, group), shapes.max(axis=0)), divisibility))
    return _with_more(np.stack(chosen), *np.unique(np.concatenate(drawn), axis=0, return_counts=True))


def smallest_fitting(canvases: Sequence[Canvas], height: int, width: int) -> Canvas | None:
    """The first of the canvases, smallest first, on which an image fits; None if there is none."""
    return next((canvas for canvas in canvases if height <= canvas[0] and width <= canvas[1]), None)


def padded(shapes: NDArray[np.int64], divisibility: int) -> NDArray[np.int64]:
    """Heights and widths rounded up to multiples, as detectron2's `ImageList.from_tensors` does."""
    multiple = max(1, divisibility)
    rounded: NDArray[np.int64] = -(-shapes // multiple) * multiple
    return rounded


def resized(sizes: NDArray[np.int64], short_edges: NDArray[np.int64], max_size: int) -> NDArray[np.int64]:
    """What detectron2's `ResizeShortestEdge.get_output_shape` gives for (N, 2) sizes; a short edge of 0 leaves them."""
    scaled = sizes * (short_edges / sizes.min(axis=1))[:, None]
    np.put_along_axis(scaled, sizes.argmin(axis=1)[:, None], short_edges[:, None].astype(np.float64), axis=1)
    longest = scaled.max(axis=1, keepdims=True)
    scaled = np.where(longest > max_size, scaled * (max_size / np.maximum(longest, 1)), scaled)
    return np.where(short_edges[:, None] == 0, sizes, (scaled + 0.5).astype(np.int64))


def _augmented(cfg: CfgNode, sizes: NDArray[np.int32], rng: np.random.Generator) -> NDArray[np.int64]:
    """Random shapes that detectron2's training augmentations give images of (N, 2) sizes: the crop, then the resize."""
    shapes = _cropped(cfg, sizes.astype(np.int64), rng) if cfg.INPUT.CROP.ENABLED else sizes.astype(np.int64)
    edges = np.atleast_1d(cfg.INPUT.MIN_SIZE_TRAIN)
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        return resized(shapes, rng.integers(edges[0], edges[-1], len(shapes), endpoint=True), cfg.INPUT.MAX_SIZE_TRAIN)
    return resized(shapes, rng.choice(edges, len(shapes)), cfg.INPUT.MAX_SIZE_TRAIN)


def _cropped(cfg: CfgNode, sizes: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Random sizes of detectron2's `RandomCrop.get_crop_size`."""
    kind, size = cfg.INPUT.CROP.TYPE, np.array(cfg.INPUT.CROP.SIZE)
    cropped: NDArray[np.int64]
    if kind == "absolute":
        cropped = np.minimum(sizes, size.astype(np.int64))
    elif kind == "absolute_range":
        cropped = rng.integers(np.minimum(sizes, size[0]), np.minimum(sizes, size[1]), endpoint=True)
    else:
        shares = size + rng.random(sizes.shape) * (1 - size) if kind == "relative_range" else size
        cropped = np.maximum(1, (sizes * shares + 0.5).astype(np.int64))
    return cropped


def _largest(cfg: CfgNode, sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Greatest height and greatest width of the images where nothing is cropped, (2,)."""
    shapes = sizes.astype(np.int64)
    edges = np.unique(cfg.INPUT.MIN_SIZE_TRAIN)
    each = [resized(shapes, np.full(len(shapes), edge), cfg.INPUT.MAX_SIZE_TRAIN).max(axis=0) for edge in edges]
    largest: NDArray[np.int64] = np.max(each, axis=0)
    return largest


def _with_more(chosen: NDArray[np.int64], shapes: NDArray[np.int64], counts: NDArray[np.int64]) -> list[Canvas]:
    """Adds, one after the other, the canvas that saves most, until the waste is small.

    Args:
        chosen: (C, 2), canvases that fit all shapes together.
        shapes: (S, 2), shapes of the batches.
        counts: (S,), batches of each shape.
    """
    # A best canvas is as high as one of the shapes and as wide as one; there are some hundreds of them.
    heights, widths = np.meshgrid(np.unique(shapes[:, 0]), np.unique(shapes[:, 1]))
    candidates = np.stack([heights.ravel(), widths.ravel()], axis=1)
    areas = np.where((shapes <= candidates[:, None]).all(axis=2), candidates.prod(axis=1)[:, None], np.inf)
    taken = np.where((shapes <= chosen[:, None]).all(axis=2), chosen.prod(axis=1)[:, None], np.inf).min(axis=0)
    own = shapes.prod(axis=1) @ counts
    canvases = {(int(height), int(width)) for height, width in chosen}
    while own < (1 - MAX_WASTE) * (taken @ counts) and len(canvases) < MAX_CANVASES:
        best = (np.minimum(areas, taken) @ counts).argmin()
        taken = np.minimum(areas[best], taken)
        canvases.add((int(candidates[best, 0]), int(candidates[best, 1])))
    return sorted(canvases, key=lambda canvas: (canvas[0] * canvas[1], canvas))
