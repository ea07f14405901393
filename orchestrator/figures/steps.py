"""Figures of steps: windows by rank, quantiles of a step's parts, every worker by itself.

The trap it protects against: a replayed log tells of windows, not of steps; nothing here makes single steps of them
but the drift curve, which needs no more than their sum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from orchestrator.figures.record_parts import Quantiles, RankFigures
from trainers import clock
from trainers.contract.events import StepsDone, WorkerStarted
from trainers.contract.plan import TrialPlan


def windows_by_rank(steps: Sequence[StepsDone]) -> dict[int, list[clock.Window]]:
    """Every rank's windows of steps, in the order they were run."""
    windows: dict[int, list[clock.Window]] = defaultdict(list)
    for step in sorted(steps, key=lambda e: (e.attempt, e.first_iteration)):
        count = step.iteration - step.first_iteration
        each = step.step_seconds or (step.seconds / count,) * count
        windows[step.rank].append(clock.Window(step.first_iteration, step.num_images, each))
    return dict(windows)


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
    if not whole:  # a log tells of windows alone
        told = [
            e for e in steps if not e.step_seconds and e.first_iteration >= warmup_iters and "data" in e.part_seconds
        ]
        waited, whole = sum(e.part_seconds["data"] for e in told), sum(e.seconds for e in told)
    return waited / whole if whole > 0 else None


def rank_figures(
    rank: int, steps: Sequence[StepsDone], workers: Sequence[WorkerStarted], plan: TrialPlan
) -> RankFigures:
    """One rank's own figures over the steps after warm-up."""
    own = [e for e in steps if e.rank == rank]
    warmup = plan.throughput_warmup_iters
    parts = {
        name: step_parts(own, name, warmup) for name in ("data", "forward", "backward", "communication", "optimizer")
    }
    whole = step_parts(own, "step", warmup)
    waits_known = plan.world_size > 1 and len(parts["communication"]) == len(whole) > 0
    return RankFigures(
        rank=rank,
        host=next((e.host for e in reversed(workers) if e.rank == rank), None),
        images_per_second=clock.throughput(windows_by_rank(own), warmup),
        step_seconds=quantiles(whole),
        part_seconds={name: quantiles(values) for name, values in parts.items() if values},
        own_seconds=sum(whole) - sum(parts["communication"]) if waits_known else None,
        peak_memory_gib=max((e.peak_memory_gib for e in own), default=None),
    )


def quantiles(values: Sequence[float]) -> Quantiles:
    """Median, 95th and 99th percentile; None of no values."""
    return Quantiles(**{f"p{q}": clock.quantile(values, q / 100) for q in (50, 95, 99)})
