"""Figures of steps: throughput along a run, quantiles of their parts, every worker by itself, and joint windows.

A mean of rates is not a rate, and rank 0's rate times the number of workers is not the cluster's: a throughput is the
images of all workers over the seconds of the slowest. A replayed log has windows and no single steps; nothing here
makes steps of them.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from orchestrator.figures.records import CurvePoint, Quantiles, RankFigures
from trainers.contract.events import StepsDone, WorkerStarted

MAX_POINTS = 50
"""Points of a drift curve; one more is made per step back or gap."""

PARTS = ("data", "forward", "backward", "graph", "communication", "optimizer")
"""Parts of a step; `graph` is both passes of a step that a CUDA graph replayed."""


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

    Ranks close their windows together. Where a rank's last windows of an attempt are missing (it died), the others' are
    left out too. A point never spans a step back or a gap.

    Args:
        steps: The windows of all ranks.
        warmup_iters: Iterations from 0 that are left out.
        max_points: Most points wanted; one more is made per step back or gap.
    """
    joint: dict[tuple[int, int], dict[int, CurvePoint | None]] = defaultdict(dict)
    for step in steps:
        joint[step.attempt, step.first_iteration][step.rank] = after_warmup(step, warmup_iters)
    num_ranks = len({rank for windows in joint.values() for rank in windows})
    points: list[CurvePoint] = []
    for _, by_rank in sorted(joint.items(), key=itemgetter(0)):
        windows = [window for window in by_rank.values() if window]
        if len(windows) == num_ranks:
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
    groups: list[list[CurvePoint]] = []
    for point in points:
        if groups and len(groups[-1]) < size and point.first_iteration == groups[-1][-1].iteration:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [
        CurvePoint(
            first_iteration=group[0].first_iteration,
            iteration=group[-1].iteration,
            num_images=sum(point.num_images for point in group),
            seconds=sum(point.seconds for point in group),
        )
        for group in groups
    ]


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


def quantiles(values: Sequence[float]) -> Quantiles:
    """Median, 95th and 99th percentile by linear interpolation between order statistics; None of no values."""
    if not values:
        return Quantiles()
    if len(values) == 1:
        return Quantiles(p50=values[0], p95=values[0], p99=values[0])
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return Quantiles(p50=cuts[49], p95=cuts[94], p99=cuts[98])


def step_parts(steps: Sequence[StepsDone], part: str, warmup_iters: int) -> list[float]:
    """Seconds of a part (or `step`, the whole) of every step after warm-up, all given ranks together."""
    values: list[float] = []
    for event in steps:
        whole = {"step": event.step_seconds, "data": event.data_seconds}
        each = whole.get(part) or event.step_part_seconds.get(part, ())
        values += each[max(0, warmup_iters - event.first_iteration) :]
    return values


def data_wait_share(steps: Sequence[StepsDone], warmup_iters: int) -> float | None:
    """Waiting for data over the wall time of the steps after warm-up, 0–1; None where not measured."""
    waited = sum(step_parts(steps, "data", warmup_iters))
    whole = sum(step_parts(steps, "step", warmup_iters))
    if not whole:  # a log has windows only
        windows = [e for e in steps if e.first_iteration >= warmup_iters and "data" in e.part_seconds]
        waited, whole = sum(e.part_seconds["data"] for e in windows), sum(e.seconds for e in windows)
    return waited / whole if whole > 0 else None


def peak_memory(steps: Sequence[StepsDone]) -> float | None:
    """Most memory used in any of the windows (GiB); None where no window has it."""
    return max((e.peak_memory_gib for e in steps if e.peak_memory_gib is not None), default=None)


def rank_figures(
    rank: int, steps: Sequence[StepsDone], workers: Sequence[WorkerStarted], warmup_iters: int, world_size: int
) -> RankFigures:
    """One rank's figures over the steps after warm-up, from the windows and starts of all ranks."""
    own = [e for e in steps if e.rank == rank]
    parts = {name: step_parts(own, name, warmup_iters) for name in PARTS}
    whole = step_parts(own, "step", warmup_iters)
    waits_known = world_size > 1 and len(parts["communication"]) == len(whole) > 0
    return RankFigures(
        rank=rank,
        host=next((e.host for e in reversed(workers) if e.rank == rank), None),
        images_per_second=throughput(own, warmup_iters),
        step_seconds=quantiles(whole),
        part_seconds={name: quantiles(values) for name, values in parts.items() if values},
        own_seconds=sum(whole) - sum(parts["communication"]) if waits_known else None,
        peak_memory_gib=peak_memory(own),
    )


@dataclass(frozen=True, slots=True)
class JointWindow:
    """The same steps on all ranks."""

    iteration: int
    """Iterations done at its end."""
    time: float
    """When the last rank ended it (Unix seconds)."""
    images_per_second: float | None
    """Images of all ranks over the seconds of the slowest; None where a log does not say the batch."""
    losses: dict[str, float]
    """Mean over the window and the ranks, by detectron2's name without `loss_`; those that are known."""
    learning_rate: float | None
    """At its last step."""
    step_seconds: Quantiles
    """Of the steps of all ranks, in seconds; None where single steps are not known."""
    data_seconds: float | None
    """Mean wait of a step for the loader, in seconds."""
    data_wait_share: float | None
    """Waiting for the loader over the wall time of the steps, 0–1."""
    peak_memory_gib: float | None
    """Most memory any rank used so far."""


class WindowJoin:
    """Collects the windows of one trial until those of all ranks are known.

    Args:
        world_size: Number of ranks, where an attempt's workers do not say otherwise.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._sizes: dict[int, int] = {}
        self._waiting: dict[tuple[int, int], dict[int, StepsDone]] = {}

    def expect(self, worker: WorkerStarted) -> None:
        """Takes from a worker how many ranks its attempt has."""
        self._sizes[worker.attempt] = worker.world_size or self._world_size

    def add(self, event: StepsDone) -> JointWindow | None:
        """Takes one rank's window; returns the joint one when it was the last of them."""
        ranks = self._waiting.setdefault((event.attempt, event.iteration), {})
        ranks[event.rank] = event
        if sum(window.num_ranks for window in ranks.values()) < self._sizes.get(event.attempt, self._world_size):
            return None
        del self._waiting[event.attempt, event.iteration]
        windows = list(ranks.values())
        images = [w.num_images for w in windows if w.num_images is not None]
        slowest = max(w.seconds for w in windows)
        timed = [w for w in windows if "data" in w.part_seconds]
        waits = [w.part_seconds["data"] / (w.iteration - w.first_iteration) for w in timed]
        return JointWindow(
            iteration=event.iteration,
            time=max(w.time for w in windows),
            images_per_second=sum(images) / slowest if len(images) == len(windows) and slowest > 0 else None,
            losses={name.removeprefix("loss_"): value for name, value in ranks[0].losses.items()},
            learning_rate=ranks[0].learning_rate,
            step_seconds=quantiles([seconds for w in windows for seconds in w.step_seconds]),
            data_seconds=statistics.fmean(waits) if waits else None,
            data_wait_share=data_wait_share(windows, 0),
            peak_memory_gib=peak_memory(windows),
        )
