"""Run-length encodes masks as pycocotools does; on a GPU only the places where they change are copied to the host.

A mask of 640 x 480 has 307,200 pixels and a few hundred changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

MAX_PIXELS = 2**27
"""Pixels in which changes are looked for at once, some 430 masks of 640 x 480; each takes three bytes meanwhile."""


def changes(masks: torch.Tensor) -> torch.Tensor:
    """Where masks change from 0 to 1 or back, counting from 0 before each mask's first pixel.

    Waits for the device once for `MAX_PIXELS`, for the number of changes.

    Args:
        masks: (N, height, width), bool, on any device.

    Returns:
        (M,), int64, rising: the pixels at which a run begins. Pixels are counted column by column, mask after mask.
    """
    height, width = masks.shape[1:]
    num_pixels = height * width
    parts = masks.split(max(1, MAX_PIXELS // max(1, num_pixels)))
    found = []
    for number, part in enumerate(parts):
        changed = torch.empty_like(part, memory_format=torch.contiguous_format)
        torch.bitwise_xor(part[:, 1:], part[:, :-1], out=changed[:, 1:])
        torch.bitwise_xor(part[:, 0, 1:], part[:, -1, :-1], out=changed[:, 0, 1:])  # after the column before it
        changed[:, 0, 0] = part[:, 0, 0]
        rows = _where(changed.flatten())
        columns = rows % width * height + rows % num_pixels // width + rows // num_pixels * num_pixels
        found.append(columns.sort().values + number * len(parts[0]) * num_pixels)
    return torch.cat(found)


def _where(flags: torch.Tensor) -> torch.Tensor:
    """The places of true values; on a CPU by NumPy, which is several times as fast."""
    return flags.nonzero().squeeze(1) if flags.is_cuda else torch.from_numpy(np.flatnonzero(flags.numpy()))


def encode(begins: torch.Tensor, num_masks: int, height: int, width: int) -> list[dict[str, Any]]:
    """The RLE of each mask, its counts as text.

    Args:
        begins: From `changes`, on the host.
        num_masks: Number of masks.
        height: Of each in pixels.
        width: Of each in pixels.
    """
    if not num_masks:
        return []
    mask_ends = np.arange(1, num_masks + 1) * (height * width)
    before = np.searchsorted(begins.numpy(), mask_ends)
    lengths = np.diff(np.insert(begins.numpy(), before, mask_ends), prepend=0)
    counts = _compressed(lengths, before + np.arange(1, num_masks + 1))
    return [{"size": [height, width], "counts": text} for text in counts]


def _compressed(lengths: NDArray[np.int64], ends: NDArray[np.int64]) -> list[str]:
    """Lengths of runs as pycocotools writes them (maskApi.c, `rleToString`), a text for each mask.

    A length is written as its difference from that of the run two before it, the first three of a mask as they are: in
    groups of five bits, the lowest first, each as a character from "0" on, whose sixth bit says that more follow.

    Args:
        lengths: Of the runs of all masks.
        ends: Number of the run after each mask's last one.
    """
    starts = np.concatenate([[0], ends[:-1]])
    first_runs = (starts[:, None] + np.arange(3)).clip(max=ends[:, None] - 1)
    numbers = lengths.copy()
    numbers[2:] -= lengths[:-2]
    numbers[first_runs] = lengths[first_runs]
    characters, written = [], []
    more = np.ones(len(numbers), dtype=bool)
    while more.any():
        written.append(more)
        bits = numbers & 31
        numbers >>= 5
        more = more & (numbers != -(bits >> 4))  # what is left repeats the highest bit, the sign
        characters.append((bits + (more << 5) + ord("0")).astype(np.uint8))
    num_characters = np.sum(written, axis=0)
    text = np.stack(characters, axis=1)[np.stack(written, axis=1)].tobytes().decode("ascii")
    text_ends = np.cumsum(num_characters)[ends - 1].tolist()
    return [text[start:end] for start, end in zip([0, *text_ends], text_ends, strict=False)]
