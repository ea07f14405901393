"""Triton kernels of ROIAlign in NHWC memory order, all levels of a feature pyramid in one launch each way.

Every sample of torchvision's `roi_align_kernel.cu` is taken where torchvision takes it, with its operations in 32 bits.

Each program picks the map of its level from five pointers: a launch for each level would start as many programs again,
most of them to find that their box is on another level, and levels of few pixels would not fill a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_LEVELS = 5
TILE_HEIGHT, TILE_WIDTH = 4, 16
"""Rows and columns of pixels whose gradients one program sums."""
BOXES = 64
"""Boxes among which a program looks at once for those that touch its pixels."""
MARGIN = tl.constexpr(1.125)
"""A sample contributes to pixels at most 1 away; the rest is more than positions can be wrong by rounding."""

MAPS = tuple(f"{name}{level}" for name in ("height", "width") for level in range(MAX_LEVELS))
"""Arguments for which no kernel of their own is compiled: a new canvas costs no compilation."""


def pool(
    features: list[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    scales: list[float],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """`trainers.speedups.level_pooling.pool` on a GPU; maps in another order than channels-last are copied to it.

    Raises:
        ValueError: More than `MAX_LEVELS` feature maps.
    """
    channels = features[0].shape[1]
    pooled = features[0].new_empty((len(boxes), output_size, output_size, channels)).permute(0, 3, 1, 2)
    block = min(triton.next_power_of_2(channels), 256)
    if len(boxes):
        _pool[(len(boxes) * output_size, triton.cdiv(channels, block))](
            *_of_levels([x.contiguous(memory_format=torch.channels_last) for x in features]),
            *_extents(features),
            *_of_levels(scales),
            *(numbers.contiguous() for numbers in (boxes, image, level)),
            pooled,
            channels,
            output_size,
            sampling_ratio,
            aligned,
            triton.next_power_of_2(output_size),
            block,
        )
    return pooled


def pool_backward(
    grad: Tensor,
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    num_images: int,
    heights: list[int],
    widths: list[int],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    """The gradients of the feature maps, (N, C, H, W) in channels-last order, from those of the pooled values.

    Each program sums what all boxes contribute to its pixels, in the order of the boxes, so the same batch gives the
    same bits.
    """
    channels, size = grad.shape[1:3]
    maps = list(zip(heights, widths, strict=True))
    gradients = [grad.new_empty((num_images, *extents, channels)).permute(0, 3, 1, 2) for extents in maps]
    num_levels = len(gradients)
    # The boxes of one image and level are a group.
    group, order = torch.sort((image * num_levels + level).int(), stable=True)
    groups = torch.arange(num_images * num_levels + 1, dtype=torch.int32, device=grad.device)
    starts = torch.searchsorted(group, groups, out_int32=True)
    tiles = num_images * sum(triton.cdiv(y, TILE_HEIGHT) * triton.cdiv(x, TILE_WIDTH) for y, x in maps)
    columns = triton.next_power_of_2(size)
    block = max(16, min(triton.next_power_of_2(channels), 64 if grad.dtype == torch.float32 else 128))
    _pool_backward[(tiles, triton.cdiv(channels, block))](
        *_of_levels(gradients),
        *_extents(gradients),
        *_of_levels(scales),
        boxes.contiguous(),
        order,
        starts,
        grad.contiguous(memory_format=torch.channels_last),
        num_images,
        channels,
        num_levels,
        size,
        sampling_ratio,
        aligned,
        columns,
        max(16 // columns, 1),
        TILE_HEIGHT,
        TILE_WIDTH,
        BOXES,
        block,
        num_stages=1,
    )
    return gradients


def _of_levels(values: Sequence[Any]) -> list[Any]:
    """A value for each level that a kernel has; no box is on those beyond the last."""
    if len(values) > MAX_LEVELS:
        raise ValueError(f"ROIAlign in Triton knows {MAX_LEVELS} levels, got {len(values)}")
    return [*values, *[values[-1]] * (MAX_LEVELS - len(values))]


def _extents(maps: list[Tensor]) -> list[int]:
    """Heights, then widths; 0 for levels beyond the last."""
    padding = [0] * (MAX_LEVELS - len(maps))
    return [*(x.shape[2] for x in maps), *padding, *(x.shape[3] for x in maps), *padding]


@triton.jit(do_not_specialize=MAPS)
def _pool(
    features0, features1, features2, features3, features4,
    height0, height1, height2, height3, height4, width0, width1, width2, width3, width4,
    scale0, scale1, scale2, scale3, scale4,
    boxes, image, level, pooled, channels,
    SIZE: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Pools one row of bins of one box: all its columns, at most CHANNELS channels."""
    box = (tl.program_id(0) // SIZE).to(tl.int64)
    number = tl.load(level + box)
    height = _of_level(number, height0, height1, height2, height3, height4)
    width = _of_level(number, width0, width1, width2, width3, width4)
    scale = _of_level(number, scale0, scale1, scale2, scale3, scale4)
    y, bin_height, samples_y = _axis(boxes + box * 4 + 1, scale, SIZE, RATIO, ALIGNED)
    x, bin_width, samples_x = _axis(boxes + box * 4, scale, SIZE, RATIO, ALIGNED)
    row = tl.full((1, 1), tl.program_id(0) % SIZE, tl.int32)
    column = tl.arange(0, COLUMNS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    mask = (column < SIZE) & (channel < channels)
    pixels = _of_level(number, features0, features1, features2, features3, features4)
    pixels += tl.load(image + box).to(tl.int64) * height * width * channels
    total = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for i in range(samples_y):
        top, down, inside_y = _sample(y, row, bin_height, i, samples_y, height)
        upper = pixels + top.to(tl.int64) * width * channels
        lower = pixels + tl.minimum(top + 1, height - 1).to(tl.int64) * width * channels
        for j in range(samples_x):
            left, across, inside_x = _sample(x, column, bin_width, j, samples_x, width)
            inside = mask & inside_x & inside_y
            right = tl.minimum(left + 1, width - 1) * channels + channel
            left = left * channels + channel
            over = (1 - across) * _load(upper + left, inside) + across * _load(upper + right, inside)
            under = (1 - across) * _load(lower + left, inside) + across * _load(lower + right, inside)
            total += (1 - down) * over + down * under
    count = tl.maximum(samples_y.to(tl.float32) * samples_x.to(tl.float32), 1.0)
    bins = (box * SIZE * SIZE + row * SIZE + column) * channels
    tl.store(pooled + bins + channel, (total / count).to(pooled.dtype.element_ty), mask)


@triton.jit(do_not_specialize=MAPS)
def _pool_backward(
    gradient0, gradient1, gradient2, gradient3, gradient4,
    height0, height1, height2, height3, height4, width0, width1, width2, width3, width4,
    scale0, scale1, scale2, scale3, scale4,
    boxes, order, starts, grad, num_images, channels, num_levels,
    SIZE: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr, BOXES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums the gradients of a tile of a feature map, at most CHANNELS channels.

    The coarsest level comes first: its pixels have the most boxes, so their programs take the longest.
    """
    end4 = num_images * tl.cdiv(height4, TILE_HEIGHT) * tl.cdiv(width4, TILE_WIDTH)
    end3 = end4 + num_images * tl.cdiv(height3, TILE_HEIGHT) * tl.cdiv(width3, TILE_WIDTH)
    end2 = end3 + num_images * tl.cdiv(height2, TILE_HEIGHT) * tl.cdiv(width2, TILE_WIDTH)
    end1 = end2 + num_images * tl.cdiv(height1, TILE_HEIGHT) * tl.cdiv(width1, TILE_WIDTH)
    tile = tl.program_id(0)
    number = (tile < end4).to(tl.int32) + (tile < end3) + (tile < end2) + (tile < end1)
    height = _of_level(number, height0, height1, height2, height3, height4)
    width = _of_level(number, width0, width1, width2, width3, width4)
    scale = _of_level(number, scale0, scale1, scale2, scale3, scale4)
    tile -= _of_level(number, end1, end2, end3, end4, 0)
    tiles_across, tiles_down = tl.cdiv(width, TILE_WIDTH), tl.cdiv(height, TILE_HEIGHT)
    image = tile // (tiles_across * tiles_down)
    top = tile // tiles_across % tiles_down * TILE_HEIGHT
    left = tile % tiles_across * TILE_WIDTH

    pixel = tl.arange(0, TILE_HEIGHT * TILE_WIDTH)[:, None]
    pixel_y, pixel_x = top + pixel // TILE_WIDTH, left + pixel % TILE_WIDTH
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    # A product of matrices goes through ROWS rows of COLUMNS bins.
    bin_number = tl.arange(0, ROWS * COLUMNS)
    bin_row, bin_column = bin_number // COLUMNS, bin_number % COLUMNS
    bin_mask = (bin_column < SIZE)[:, None] & (channel < channels)
    bins = (bin_row * SIZE + bin_column)[:, None] * channels + channel
    lane = tl.arange(0, BOXES)
    total = tl.zeros((TILE_HEIGHT * TILE_WIDTH, CHANNELS), tl.float32)
    group = starts + image * num_levels + number
    end = tl.load(group + 1)
    for first in range(tl.load(group), end, BOXES):
        exists = first + lane < end
        corners = boxes + tl.load(order + first + lane, exists, 0) * 4
        touches = exists & _touches(corners, left, left + TILE_WIDTH - 1, scale, SIZE, RATIO, ALIGNED)
        touches = touches & _touches(corners + 1, top, top + TILE_HEIGHT - 1, scale, SIZE, RATIO, ALIGNED)
        following = tl.min(tl.where(touches, lane, BOXES))
        while following < BOXES:
            box = tl.load(order + first + following)
            x, bin_width, samples_x = _axis(boxes + box * 4, scale, SIZE, RATIO, ALIGNED)
            y, bin_height, samples_y = _axis(boxes + box * 4 + 1, scale, SIZE, RATIO, ALIGNED)
            across = _weights(pixel_x, x, bin_column[None, :], bin_width, samples_x, width)
            first_row, end_row = _bins(y, bin_height, top, top + TILE_HEIGHT - 1, SIZE)
            values = grad + box.to(tl.int64) * SIZE * SIZE * channels
            for i in range(first_row, end_row, ROWS):
                rows = i + bin_row
                weight = across * _weights(pixel_y, y, rows[None, :], bin_height, samples_y, height)
                mask = bin_mask & (rows < end_row)[:, None]
                value = tl.load(values + i * SIZE * channels + bins, mask, 0.0)
                if grad.dtype.element_ty == tl.float32:
                    total = tl.dot(weight, value, total, input_precision="ieee")
                else:  # weights in twice as many bits
                    high = weight.to(value.dtype)
                    total = tl.dot(high, value, total)
                    total = tl.dot((weight - high.to(tl.float32)).to(value.dtype), value, total)
            following = tl.min(tl.where(touches & (lane > following), lane, BOXES))
    gradient = _of_level(number, gradient0, gradient1, gradient2, gradient3, gradient4)
    gradient += image.to(tl.int64) * height * width * channels + top.to(tl.int64) * width * channels
    offsets = (pixel // TILE_WIDTH * width + pixel_x) * channels + channel
    mask = (pixel_y < height) & (pixel_x < width) & (channel < channels)
    tl.store(gradient + offsets, total.to(gradient.dtype.element_ty), mask)


@triton.jit
def _of_level(level, value0, value1, value2, value3, value4):
    coarse = tl.where(level == 3, value3, value4)
    return tl.where(level == 0, value0, tl.where(level == 1, value1, tl.where(level == 2, value2, coarse)))


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask, 0.0).to(tl.float32)


@triton.jit
def _axis(corner, scale, SIZE: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """Where boxes begin along one axis, the extent of their bins, both in pixels of the map, and samples in a bin.

    `corner` points to the coordinate of the first corners; that of the second is two farther.
    """
    offset = 0.5 if ALIGNED else 0.0
    start = tl.load(corner) * scale - offset
    extent = tl.load(corner + 2) * scale - offset - start
    if not ALIGNED:
        extent = tl.maximum(extent, 1.0)
    bin_size = tl.div_rn(extent, tl.full(extent.shape, SIZE, tl.float32))
    samples = tl.ceil(bin_size).to(tl.int32)
    if RATIO > 0:
        samples = tl.full(samples.shape, RATIO, tl.int32)
    return start, bin_size, samples


@triton.jit
def _sample(start, bin_number, bin_size, number, samples, extent):
    """The pixel before a sample of a bin along one axis, how far it is beyond it, and whether it counts."""
    position = start + bin_number * bin_size + tl.div_rn((number + 0.5) * bin_size, samples.to(tl.float32))
    inside = (position >= -1.0) & (position <= extent)
    position = tl.maximum(position, 0.0)
    before = tl.minimum(position.to(tl.int32), extent - 1)
    beyond = tl.where(before >= extent - 1, 0.0, position - before)
    return before, beyond, inside


@triton.jit
def _weights(pixel, start, bin_number, bin_size, samples, extent):
    """The weights of pixels in the means of bins along one axis."""
    weight = (pixel + bin_number) * 0.0
    for number in range(samples):
        before, beyond, inside = _sample(start, bin_number, bin_size, number, samples, extent)
        share = tl.where(pixel == before, 1.0 - beyond, tl.where(pixel == before + 1, beyond, 0.0))
        weight += tl.where(inside, share, 0.0)
    return weight / samples.to(tl.float32)


@triton.jit
def _touches(corner, first, last, scale, SIZE: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """Whether boxes may have samples next to the pixels from `first` to `last` along one axis."""
    start, bin_size, samples = _axis(corner, scale, SIZE, RATIO, ALIGNED)
    end = start + bin_size * SIZE
    near = (tl.maximum(start, end) >= first - MARGIN) & (tl.minimum(start, end) <= last + MARGIN)
    return near & (samples > 0)


@triton.jit
def _bins(start, bin_size, first_pixel, last_pixel, SIZE: tl.constexpr):
    """The range of bins that may have samples next to these pixels along one axis."""
    # Bins without extent are all at `start`.
    divisor = tl.where(bin_size == 0, 1.0, bin_size)
    before, after = (first_pixel - MARGIN - start) / divisor, (last_pixel + MARGIN - start) / divisor
    first = tl.minimum(tl.maximum(tl.floor(tl.minimum(before, after)), 0.0), SIZE).to(tl.int32)
    end = tl.minimum(tl.maximum(tl.floor(tl.maximum(before, after)) + 1.0, 0.0), SIZE).to(tl.int32)
    return tl.where(bin_size == 0, 0, first), tl.where(bin_size == 0, SIZE, end)
