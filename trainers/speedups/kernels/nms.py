"""Triton kernels of non-maximum suppression: all lists of boxes in two launches, as torchvision's kernel decides."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BITS = tl.constexpr(64)
"""Boxes in a block, and bits in a word of the mask of overlaps."""


def nms_keep(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """`trainers.speedups.batched_nms.nms_keep` on a GPU."""
    num_lists, num_boxes = valid.shape
    keep = torch.empty_like(valid, memory_format=torch.contiguous_format)
    num_words = triton.cdiv(num_boxes, BITS.value)
    overlaps = torch.empty((num_lists, num_boxes, num_words), dtype=torch.int64, device=boxes.device)
    # Without fusion a product is rounded before it is added to something, except where the kernel says `fma`.
    _find_overlaps[(num_words, num_words, num_lists)](
        boxes.contiguous(), overlaps, num_boxes, num_words, threshold, num_warps=2, enable_fp_fusion=False
    )
    _walk[(num_lists,)](
        overlaps, valid.contiguous(), keep, num_boxes, num_words, triton.next_power_of_2(num_words), num_warps=1
    )
    return keep


@triton.jit
def _find_overlaps(boxes, overlaps, num_boxes, num_words, threshold):
    """Writes for each box of a block (axis 1) which boxes of a block (axis 0) from its own on overlap too much with it.

    Bit j of a word stands for the box j of the second block. The numbers are those of torchvision's `devIoU`, compiled:
    the area of the second box is added to the first's in one rounding (FFMA in its machine code for sm_80 to sm_100 of
    version 0.29.1), everything else is rounded at each operation, and the division is exact.
    """
    column_block, row_block = tl.program_id(0), tl.program_id(1)
    if column_block < row_block:
        return
    first_box = tl.program_id(2).to(tl.int64) * num_boxes
    # The bits of a word lie along axis 0 of the tile, where one thread has many of them in registers.
    rows = row_block * BITS + tl.arange(0, BITS)
    columns = column_block * BITS + tl.arange(0, BITS)
    row_boxes, row_mask = boxes + (first_box + rows) * 4, rows < num_boxes
    column_boxes, column_mask = boxes + (first_box + columns) * 4, columns < num_boxes
    x0, y0 = tl.load(row_boxes, row_mask, 0.0)[None, :], tl.load(row_boxes + 1, row_mask, 0.0)[None, :]
    x1, y1 = tl.load(row_boxes + 2, row_mask, 0.0)[None, :], tl.load(row_boxes + 3, row_mask, 0.0)[None, :]
    other_x0 = tl.load(column_boxes, column_mask, 0.0)[:, None]
    other_y0 = tl.load(column_boxes + 1, column_mask, 0.0)[:, None]
    other_x1 = tl.load(column_boxes + 2, column_mask, 0.0)[:, None]
    other_y1 = tl.load(column_boxes + 3, column_mask, 0.0)[:, None]
    width = tl.maximum(tl.minimum(x1, other_x1) - tl.maximum(x0, other_x0), 0.0)
    height = tl.maximum(tl.minimum(y1, other_y1) - tl.maximum(y0, other_y0), 0.0)
    intersection = width * height
    areas = tl.fma(other_x1 - other_x0, other_y1 - other_y0, (x1 - x0) * (y1 - y0))
    too_much = tl.div_rn(intersection, areas - intersection) > threshold
    too_much = too_much & (columns[:, None] > rows[None, :]) & column_mask[:, None]
    bits = tl.full((BITS,), 1, tl.int64) << tl.arange(0, BITS).to(tl.int64)
    words = tl.sum(tl.where(too_much, bits[:, None], 0), axis=0)
    tl.store(overlaps + (first_box + rows) * num_words + column_block, words, row_mask)


@triton.jit
def _walk(overlaps, valid, keep, num_boxes, num_words, WORDS: tl.constexpr):
    """Goes through one list of boxes in its order; a box that is not yet suppressed survives and suppresses others.

    WORDS: `num_words` or more, a power of two.
    """
    first_box = tl.program_id(0).to(tl.int64) * num_boxes
    words, lanes = tl.arange(0, WORDS), tl.arange(0, BITS)
    bits = tl.full((BITS,), 1, tl.int64) << lanes.to(tl.int64)
    suppressed = tl.zeros((WORDS,), tl.int64)
    for block in range(num_words):
        boxes = block * BITS + lanes
        is_valid = tl.load(valid + first_box + boxes, boxes < num_boxes, 0).to(tl.int1)
        # The word of this block; no bit is in both summands.
        word = tl.sum(tl.where(words == block, suppressed, 0))
        word = word | tl.sum(tl.where(is_valid, 0, bits))
        for bit in tl.static_range(BITS):
            row = overlaps + (first_box + block * BITS + bit) * num_words
            exists = block * BITS + bit < num_boxes
            survives = ((word >> bit) & 1) == 0
            word = word | tl.where(survives, tl.load(row + block, exists, 0), 0)
            suppressed = suppressed | tl.load(row + words, survives & (words > block) & (words < num_words), 0)
        tl.store(keep + first_box + boxes, ((word >> lanes.to(tl.int64)) & 1) == 0, boxes < num_boxes)
