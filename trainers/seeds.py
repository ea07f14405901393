"""Derives the seeds of a trial's random choices from its seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def step_seed(seed: int, rank: int, iteration: int) -> int:
    """Seed, 64 bits, of what the model draws in one step on one rank: which anchors and proposals are sampled."""
    return int(np.random.SeedSequence((seed, rank, iteration)).generate_state(1, np.uint64)[0])


def augmentation_seed(seed: int, position: int) -> NDArray[np.uint32]:
    """Seed, 4 words of 32 bits, of one image's augmentation by its position in the training order of all workers."""
    return np.asarray(np.random.SeedSequence((seed, position)).generate_state(4), dtype=np.uint32)
