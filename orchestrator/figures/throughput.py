"""Throughput of windows of steps, and how it changes along a run: the drift curve.

A mean of rates is not a rate, and rank 0's rate times the number of workers is not the cluster's: everything here is
images of all workers over the seconds of the slowest.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from orchestrator.figures.records import CurvePoint
from trainers.contract.events import StepsDone

MAX_POINTS = 50
"""Points of a drift curve; one more is made per restart."""


def throughput(steps: Iterable[StepsDone], warmup_iters: int) -> float | None:
    """Images per second over all workers, by the slowest worker's wall time, warm-up left out.

    Args:
        steps: The windows of all ranks. An iteration that was trained again after a restart counts once per time it was
            trained, images and seconds alike.
        warmup_iters: Iterations from 0 that are left out; a window is cut there.

    Returns:
        None when no iteration is left.
    """
    images = 0.0
    seconds: dict[int, float] = defaultdict(float)
    for step in steps:
        rest = after_warmup(step, warmup_iters)
        if rest:
            images += rest.num_images
            seconds[step.rank] += rest.seconds
    slowest = max(seconds.values(), default=0.0)
    return images / slowest if slowest > 0 else None


def rate_curve(steps: Iterable[StepsDone], warmup_iters: int, max_points: int = MAX_POINTS) -> list[CurvePoint]:
    """The drift curve: consecutive windows of all ranks, joined evenly.

    Ranks close their windows together, so the n-th window of every rank covers the same iterations; where a rank's
    last windows are missing (it died), the others' are left out too. A point never spans a restart.

    Args:
        steps: The windows of all ranks.
        warmup_iters: Iterations from 0 that are left out.
        max_points: Most points wanted; one more is made per restart.
    """
    by_rank: dict[int, list[CurvePoint | None]] = defaultdict(list)
    for step in sorted(steps, key=lambda e: (e.attempt, e.first_iteration)):
        by_rank[step.rank].append(after_warmup(step, warmup_iters))
    points: list[CurvePoint] = []
    for column in zip(*by_rank.values(), strict=False):
        windows = [window for window in column if window]
        if len(windows) == len(column):
            slowest = max(windows, key=lambda window: window.seconds)
            points.append(slowest.model_copy(update={"num_images": sum(window.num_images for window in windows)}))
    return [point for point in join_points(points, math.ceil(len(points) / max_points)) if point.seconds > 0]


def after_warmup(window: StepsDone, warmup_iters: int) -> CurvePoint | None:
    """A rank's window without its iterations before `warmup_iters`; None where nothing is left, or images are unknown.

    Its images are taken in proportion to its steps: every step of a rank has the same number of images.
    """
    num_steps = window.iteration - window.first_iteration
    skipped = min(max(warmup_iters - window.first_iteration, 0), num_steps)
    if skipped == num_steps or window.num_images is None:
        return None
    share = (num_steps - skipped) / num_steps
    return CurvePoint(
        first_iteration=window.first_iteration + skipped,
        iteration=window.iteration,
        num_images=window.num_images * share,
        seconds=sum(window.step_seconds[skipped:]) if window.step_seconds else window.seconds * share,
    )


def join_points(points: Sequence[CurvePoint], size: int) -> list[CurvePoint]:
    """Joins `size` consecutive points into one; a gap or a step back in the iterations begins a new one."""
    joined: list[CurvePoint] = []
    parts = 0
    for point in points:
        if joined and parts < size and point.first_iteration == joined[-1].iteration:
            last = joined.pop()
            point = CurvePoint(
                first_iteration=last.first_iteration,
                iteration=point.iteration,
                num_images=last.num_images + point.num_images,
                seconds=last.seconds + point.seconds,
            )
            parts += 1
        else:
            parts = 1
        joined.append(point)
    return joined


def matched(points: Sequence[CurvePoint], first_iteration: int, iteration: int) -> list[CurvePoint]:
    """The points that lie wholly between two iterations."""
    return [p for p in points if p.first_iteration >= first_iteration and p.iteration <= iteration]


def rate(points: Sequence[CurvePoint]) -> float | None:
    """Images over seconds of several points together; None of none. Never the mean of their rates."""
    seconds = sum(point.seconds for point in points)
    return sum(point.num_images for point in points) / seconds if seconds > 0 else None


def drift_ratio(points: Sequence[CurvePoint]) -> float | None:
    """Throughput of the last quarter of a drift curve over that of the first; None below four points."""
    quarter = len(points) // 4
    if quarter == 0:
        return None
    last, first = rate(points[-quarter:]), rate(points[:quarter])
    return last / first if last and first else None


def skew(own_seconds: Sequence[float]) -> float | None:
    """How much slower the slowest worker is by itself: its time over the median worker's; None for one worker.

    Args:
        own_seconds: Every worker's step time less its waiting for other workers: with it in, every worker looks as slow
            as the slowest.
    """
    middle = statistics.median(own_seconds) if len(own_seconds) > 1 else 0.0
    return max(own_seconds) / middle if middle else None
