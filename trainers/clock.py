"""Arithmetic of the clocks: throughput, quantiles, time to train, scaling. Standard library only.

The definitions are docs/measurement.md's. The trap this module protects against: a mean of rates (each window's
images/s averaged) is not a rate, and rank 0's rate times the world size is not the cluster's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


def quantile(values: Iterable[float], q: float) -> float | None:
    """The q-quantile (0–1) by linear interpolation between order statistics; None of no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True, slots=True)
class Window:
    """Steps of one rank: images trained on and the wall time they took, hooks left out.

    Attributes:
        first_iteration: First iteration of the window, from 0.
        num_images: Images this rank trained on.
        step_seconds: Wall time of each step, in order.
    """

    first_iteration: int
    num_images: int
    step_seconds: tuple[float, ...]


def throughput(windows_by_rank: Mapping[int, Sequence[Window]], warmup_iters: int) -> float | None:
    """Images per second over all workers, by the slowest worker's wall time, warm-up left out.

    Args:
        windows_by_rank: The windows of every rank of the trial. An iteration that was trained again after a restart
            counts once per time it was trained, images and seconds alike.
        warmup_iters: Iterations from 0 that are left out. A window is cut at that iteration: its images are taken in
            proportion to its steps, since every step of a rank has the same number of images.

    Returns:
        None when no iteration is left.
    """
    images = 0.0
    slowest = 0.0
    for windows in windows_by_rank.values():
        seconds = 0.0
        for window in windows:
            skipped = min(max(warmup_iters - window.first_iteration, 0), len(window.step_seconds))
            steps = window.step_seconds[skipped:]
            if steps:
                images += window.num_images * len(steps) / len(window.step_seconds)
                seconds += sum(steps)
        slowest = max(slowest, seconds)
    return images / slowest if slowest > 0 else None
