"""Figures of steps: quantiles of their parts, every worker by itself, and the windows of all ranks joined into one.

A replayed log has windows and no single steps; nothing here makes steps of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.figures.records import Quantiles, RankFigures
from orchestrator.figures.throughput import throughput
from trainers.contract.events import StepsDone, WorkerStarted

PARTS = ("data", "forward", "backward", "communication", "optimizer")
"""Parts of a step."""


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
        windows = [
            e for e in steps if not e.step_seconds and e.first_iteration >= warmup_iters and "data" in e.part_seconds
        ]
        waited, whole = sum(e.part_seconds["data"] for e in windows), sum(e.seconds for e in windows)
    return waited / whole if whole > 0 else None


def peak_memory(steps: Sequence[StepsDone]) -> float | None:
    """Most memory used in any of the windows (GiB); None where no window has it."""
    return max((e.peak_memory_gib for e in steps if e.peak_memory_gib is not None), default=None)


def rank_figures(
    rank: int, steps: Sequence[StepsDone], workers: Sequence[WorkerStarted], warmup_iters: int, world_size: int
) -> RankFigures:
    """One rank's figures over the steps after warm-up.

    Args:
        rank: The rank.
        steps: Windows of all ranks.
        workers: Starts of all ranks.
        warmup_iters: Iterations left out.
        world_size: Number of workers: one has nobody to wait for.
    """
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
    """Mean over the window and the ranks, by detectron2's name; those that are known."""
    learning_rate: float | None
    """At its last step."""
    step_seconds: Quantiles
    """Of the steps of all ranks, in seconds; None where single steps are not known."""
    data_seconds: float | None
    """Mean wait of a step for the loader, in seconds."""
    peak_memory_gib: float | None
    """Most memory any rank used so far."""


class WindowJoin:
    """Collects the windows of one trial until every rank's is there.

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
        waits = [
            w.part_seconds["data"] / (w.iteration - w.first_iteration) for w in windows if "data" in w.part_seconds
        ]
        return JointWindow(
            iteration=event.iteration,
            time=max(w.time for w in windows),
            images_per_second=sum(images) / slowest if len(images) == len(windows) and slowest > 0 else None,
            losses=ranks[0].losses,
            learning_rate=ranks[0].learning_rate,
            step_seconds=quantiles([seconds for w in windows for seconds in w.step_seconds]),
            data_seconds=statistics.fmean(waits) if waits else None,
            peak_memory_gib=peak_memory(windows),
        )
