"""Checks COCO's run-length encoded masks before compiled code that trusts them gets to see them."""

from __future__ import annotations

from typing import Any

LOWEST, HIGHEST = 48, 111
"""Codes of the characters that pycocotools' compressed counts are made of: six bits each, from '0' on."""


def check_rle(mask: dict[str, Any], image_size: tuple[int, int]) -> str:
    """Tells what is wrong with a run-length encoded mask, or "".

    Args:
        mask: `{"size": [height, width], "counts": list or text}`.
        image_size: Width and height of its image in pixels; (0, 0) where they are not known.
    """
    size, counts = mask.get("size"), mask.get("counts")
    if type(size) is not list or len(size) != 2 or not all(type(v) is int and 0 < v < 2**24 for v in size):
        return f"its RLE size is {str(size)[:40]}, not [height, width]"
    if image_size != (0, 0) and (size[1], size[0]) != image_size:
        return f"its RLE is for an image of {size[1]} x {size[0]}, the image has {image_size[0]} x {image_size[1]}"
    if isinstance(counts, str):
        total = sum_compressed_counts(counts)
        if total is None:
            return "its RLE counts are not a text that pycocotools could have written"
    elif type(counts) is list and all(type(count) is int and count >= 0 for count in counts):
        total = sum(counts)
    else:
        return f"its RLE counts are a {type(counts).__name__} that holds something else than run lengths"
    if total != size[0] * size[1]:
        shown = f"{total:,}" if total < 2**53 else "far more"
        return f"its RLE covers {shown} pixels, the image has {size[0] * size[1]:,}"
    return ""


def sum_compressed_counts(text: str) -> int | None:
    """Adds up the run lengths of compressed counts; None where the text is none, or holds a negative run.

    The encoding (pycocotools, `maskApi.c`, `rleToString`): each run is written in groups of five bits, lowest first,
    with a bit for "more follow"; from the fourth run on, the difference to the run two before.
    """
    import numpy as np

    if not text.isascii():
        return None
    codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64)
    if not len(codes):
        return 0
    if codes.min() < LOWEST or codes.max() > HIGHEST:
        return None
    codes -= LOWEST
    last = (codes & 32) == 0
    if not last[-1]:
        return None
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        return None
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    # Undo the differences: runs 1, 3, 5 … and 2, 4, 6 … are two cumulative sums; run 0 stands alone.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if (runs < 0).any():
        return None
    return int(runs.sum())
