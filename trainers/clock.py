"""Arithmetic of the clocks: throughput, quantiles, drift, skew. Standard library only.

The definitions are those of docs/measurement.md: a mean of rates (each window's images/s averaged) is not a rate, and
rank 0's rate times the world size is not the cluster's.
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
    """Steps of one rank: images trained on and the wall time they took, hooks left out."""

    first_iteration: int
    """First iteration of the window, from 0."""
    num_images: float
    """Images this rank trained on; a fraction where a window was cut."""
    step_seconds: tuple[float, ...]
    """Wall time of each step, in order."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive steps of all ranks together: one point of a drift curve."""

    first_iteration: int
    """First iteration, from 0."""
    iteration: int
    """Iterations done at its end."""
    num_images: float
    """Images all workers trained on."""
    seconds: float
    """Wall time of its steps on the slowest worker."""


def after_warmup(window: Window, warmup_iters: int) -> Window | None:
    """The window without its iterations before `warmup_iters`; None where nothing is left.

    Its images are taken in proportion to its steps: every step of a rank has the same number of images.
    """
    skipped = min(max(warmup_iters - window.first_iteration, 0), len(window.step_seconds))
    steps = window.step_seconds[skipped:]
    if not steps:
        return None
    share = len(steps) / len(window.step_seconds)
    return Window(window.first_iteration + skipped, window.num_images * share, steps)


def throughput(windows_by_rank: Mapping[int, Sequence[Window]], warmup_iters: int) -> float | None:
    """Images per second over all workers, by the slowest worker's wall time, warm-up left out.

    Args:
        windows_by_rank: The windows of every rank of the trial. An iteration that was trained again after a restart
            counts once per time it was trained, images and seconds alike.
        warmup_iters: Iterations from 0 that are left out; a window is cut there.

    Returns:
        None when no iteration is left.
    """
    images = 0.0
    slowest = 0.0
    for windows in windows_by_rank.values():
        kept = [rest for window in windows if (rest := after_warmup(window, warmup_iters))]
        images += sum(window.num_images for window in kept)
        slowest = max(slowest, sum(sum(window.step_seconds) for window in kept))
    return images / slowest if slowest > 0 else None


def stretches(
    windows_by_rank: Mapping[int, Sequence[Window]], warmup_iters: int, max_points: int = 50
) -> list[Stretch]:
    """The drift curve: consecutive windows of all ranks, joined evenly into at most `max_points` stretches.

    Ranks close their windows together, so the n-th window of every rank covers the same iterations; where a rank's
    last windows are missing (it died), the others' are left out too. Stretches never cross a restart.

    Args:
        windows_by_rank: As for `throughput`, each rank's windows in the order they were run.
        warmup_iters: Iterations from 0 that are left out.
        max_points: Points wanted at most; each restart adds one.
    """
    columns = [list(column) for column in zip(*windows_by_rank.values(), strict=False)]
    points: list[Stretch] = []
    for column in columns:
        cut = [rest for window in column if (rest := after_warmup(window, warmup_iters))]
        if len(cut) == len(column):
            first = cut[0].first_iteration
            points.append(
                Stretch(
                    first,
                    first + len(cut[0].step_seconds),
                    sum(window.num_images for window in cut),
                    max(sum(window.step_seconds) for window in cut),
                )
            )
    return join_stretches(points, math.ceil(len(points) / max_points) if points else 1)


def join_stretches(points: Sequence[Stretch], size: int) -> list[Stretch]:
    """Joins `size` consecutive stretches into one; a gap or a step back in the iterations begins a new one."""
    joined: list[Stretch] = []
    parts = 0
    for point in points:
        if joined and parts < size and point.first_iteration == joined[-1].iteration:
            last = joined.pop()
            point = Stretch(
                last.first_iteration, point.iteration, last.num_images + point.num_images, last.seconds + point.seconds
            )
            parts += 1
        else:
            parts = 1
        joined.append(point)
    return joined


def matched(points: Sequence[Stretch], first_iteration: int, iteration: int) -> list[Stretch]:
    """The stretches that lie wholly between two iterations."""
    return [p for p in points if p.first_iteration >= first_iteration and p.iteration <= iteration]


def rate(points: Sequence[Stretch]) -> float | None:
    """Images over seconds of several stretches together; None of none. Never the mean of their rates."""
    seconds = sum(point.seconds for point in points)
    return sum(point.num_images for point in points) / seconds if seconds > 0 else None


def drift_ratio(points: Sequence[Stretch]) -> float | None:
    """Throughput of the last quarter of a drift curve over that of the first; None below four stretches."""
    quarter = len(points) // 4
    if quarter == 0:
        return None
    last, first = rate(points[-quarter:]), rate(points[:quarter])
    return last / first if last and first else None


def skew(own_seconds: Iterable[float]) -> float | None:
    """How much slower the slowest worker is by itself: its own time over the median worker's; None for one worker.

    A worker's own time is its step time less its waiting for other workers, which would make every worker look as slow
    as the slowest.
    """
    values = list(own_seconds)
    middle = quantile(values, 0.5)
    return max(values) / middle if len(values) > 1 and middle else None
