"""Triton kernel that draws mask targets: the pixels of `trainers.speedups.mask_targets`, bit for bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainers.speedups.mask_targets import MIN_BOX_SIDE

STEPS = tl.constexpr(5)
"""Steps in which pycocotools walks through a pixel (maskApi.c, `rleFrPoly`)."""
MIN_SIDE = tl.constexpr(MIN_BOX_SIDE)


def draw_masks(
    edges: Tensor, edge_polygon: Tensor, first_edge: Tensor, boxes: Tensor, image: Tensor, owner: Tensor, side: int
) -> Tensor:
    """`trainers.speedups.device_masks.draw_masks` on a GPU."""
    masks = torch.empty((len(boxes), side, side), dtype=torch.bool, device=boxes.device)
    if masks.numel():
        block = triton.next_power_of_2(side)
        # Without fusion every product is rounded before something is added to it, as in compiled C and in numpy.
        _draw[(len(boxes),)](
            *(tensor.contiguous() for tensor in (edges, edge_polygon, first_edge, boxes, image, owner)),
            masks,
            edges.shape[1],
            first_edge.shape[1],
            side,
            block,
            num_warps=1 if block <= 32 else 4,
            enable_fp_fusion=False,
        )
    return masks


@triton.jit
def _draw(
    edges, edge_polygon, first_edge, boxes, image, owner, masks, num_edges, num_starts,
    SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draws the object of one box: SIDE rows and columns, BLOCK the power of two from there on.

    A crossing of an edge and the middle of a column flips the pixels of the column from its row on, so what an edge
    adds needs no other edge, and the sum of flips is the parity that pycocotools fills by.
    """
    box = tl.program_id(0).to(tl.int64)
    number, image_number = tl.load(owner + box), tl.load(image + box).to(tl.int64)
    starts = first_edge + image_number * num_starts + tl.maximum(number, 0)
    first, end = tl.load(starts), tl.load(starts + 1)
    end = tl.where(number < 0, first, end)
    box_x, box_y = tl.load(boxes + box * 4), tl.load(boxes + box * 4 + 1)
    scale_x = _scale(tl.load(boxes + box * 4 + 2) - box_x, SIDE)
    scale_y = _scale(tl.load(boxes + box * 4 + 3) - box_y, SIDE)
    box_x, box_y = box_x.to(tl.float64), box_y.to(tl.float64)

    rows = tl.arange(0, BLOCK)
    middle = (rows * STEPS + 2).to(tl.float64)  # of each column; a walk crosses it on its way to the next step
    drawn = tl.zeros((BLOCK, BLOCK), tl.int32)
    parity = tl.zeros((BLOCK, BLOCK), tl.int32)
    polygon = tl.full((), -1, tl.int32)
    for edge in range(first, end):
        position = image_number * num_edges + edge
        x0 = _fine((tl.load(edges + position * 4) - box_x) * scale_x)
        y0 = _fine((tl.load(edges + position * 4 + 1) - box_y) * scale_y)
        x1 = _fine((tl.load(edges + position * 4 + 2) - box_x) * scale_x)
        y1 = _fine((tl.load(edges + position * 4 + 3) - box_y) * scale_y)
        edge_polygon_number = tl.load(edge_polygon + position)
        drawn = drawn | tl.where(edge_polygon_number == polygon, 0, parity)
        parity = tl.where(edge_polygon_number == polygon, parity, 0)
        polygon = edge_polygon_number
        row = _first_flipped(x0, y0, x1, y1, middle, SIDE)
        parity = parity ^ (rows[:, None] >= row[None, :]).to(tl.int32)
    drawn = drawn | parity
    pixels = masks + box * SIDE * SIDE + rows[:, None] * SIDE + rows[None, :]
    tl.store(pixels, drawn != 0, (rows[:, None] < SIDE) & (rows[None, :] < SIDE))


@triton.jit
def _scale(length, SIDE: tl.constexpr):
    """Pixels of the grid to one of the image: divided in 32 bits, as a quotient of 64 bits that is rounded again is."""
    scale = (SIDE / tl.maximum(length, MIN_SIDE).to(tl.float64)).to(tl.float32).to(tl.float64)
    return tl.where(length < MIN_SIDE, SIDE * 10.0, scale)


@triton.jit
def _fine(position):
    """The step of pycocotools' walk at a position in pixels of the grid, as C rounds it."""
    return (position * STEPS + 0.5).to(tl.int64).to(tl.float64)


@triton.jit
def _first_flipped(x0, y0, x1, y1, middle, SIDE: tl.constexpr):
    """The row from which on an edge flips each column's pixels; SIDE or more where it does not cross its middle."""
    across, down = tl.abs(x1 - x0), tl.abs(y1 - y0)
    is_shallow = across >= down
    # Edges are walked from left to right, steep ones from top to bottom.
    is_turned = tl.where(is_shallow, x0 > x1, y0 > y1)
    x, y = tl.where(is_turned, x1, x0), tl.where(is_turned, y1, y0)
    end_x, end_y = tl.where(is_turned, x0, x1), tl.where(is_turned, y0, y1)
    # Where a divisor is 0 the edge is a point or upright, and crosses nothing.
    length = tl.maximum(across, down)
    slope = tl.where(is_shallow, end_y - y, end_x - x) / tl.where(length == 0, 1.0, length)
    before, after = y + slope * (middle - x) + 0.5, y + slope * (middle + 1.0 - x) + 0.5
    on_shallow = tl.floor(tl.minimum(before, after))  # of what is negative C's rounding is another, and the row still 0
    # On a steep edge: the last step before the walk reaches the middle, or the last one after it when going left.
    is_rising = slope > 0
    reached = (middle + 0.5 - x) / tl.where(slope == 0, 1.0, slope)
    step = tl.where(is_rising, tl.ceil(reached) - 1.0, tl.floor(reached))
    step = tl.where((x + slope * step + 0.5 >= middle + 1.0) == is_rising, step - 1.0, step)
    following = x + slope * (step + 1.0) + 0.5
    step = tl.where((following >= middle + 1.0) == is_rising, step, step + 1.0)
    fine = tl.where(is_shallow, on_shallow, y + step)
    row = tl.ceil(tl.minimum(tl.maximum((fine + 0.5) / STEPS - 0.5, 0.0), SIDE))
    is_crossed = (tl.minimum(x, end_x) <= middle) & (tl.maximum(x, end_x) > middle)
    return tl.where(is_crossed, row, SIDE).to(tl.int32)
