"""The model of a step on N workers, made of parts that were measured apart at small sizes.

    step(N) = own(images of a worker) x (1 + stragglers(N)) + communication(N)

`own` is a worker's step without waiting for others. `stragglers` is by how much the slowest of N workers exceeds their
mean: the expected maximum of N draws from the measured deviations of ranks from the mean of their step, so that what
slows all ranks of a step at once makes nobody wait. `communication` is what computation does not hide.

Limits. The expected maximum is bounded by the slowest deviation that was seen: of more workers than there are measured
deviations, it is too low, and heavy tails that a short run does not show are missing. Ranks are drawn independently.
With few ranks, the mean of a step holds a good part of each, which takes skew from the deviations (their variance is
corrected). What only happens beyond the calibration's sizes (a slower link between hosts, a storage that is shared) is
not in the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.figures.step_terms import fit_terms, ring_term, terms_at
from orchestrator.prediction.measured import Array, MeasuredSize

NUM_RESAMPLES = 400
"""Bootstrap samples; the ends of a 95 % interval are then their 10th values from either side."""

NUM_BLOCKS = 10
"""Blocks that a size's steps are resampled in: neighbouring steps resemble each other (Künsch, "The jackknife and the
bootstrap for general stationary observations", Annals of Statistics 17, 1989)."""

SEED = 20
"""Of the resampling: the same events give the same intervals."""

SHAPES = ("tree", "ring")
"""How exposed communication may grow where one size alone shows it: log2(N) as in a tree or with latency, or
2 (N - 1) / N as in a ring that is limited by bandwidth."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step on N workers, in seconds."""

    compute: float
    data: float
    stragglers: float
    communication: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.data + self.stragglers + self.communication


def expected_maximum(values: Array, num_draws: int) -> float:
    """Expected maximum of independent draws from the empirical distribution of some values.

    The k-th smallest of n values is the maximum with probability (k / n)^N - ((k - 1) / n)^N.

    Args:
        values: What was measured, in any order.
        num_draws: N.
    """
    ranks = np.arange(len(values) + 1) / len(values)
    return float(np.sort(values) @ np.diff(ranks**num_draws))


def weight_of_slowest(num_values: int, num_draws: int) -> float:
    """Share of steps (0–1) whose slowest of N workers is the slowest value that was seen: the bound of the above."""
    return float(1 - (1 - 1 / num_values) ** num_draws)


def deviations(size: MeasuredSize) -> Array:
    """Deviations of ranks from the mean of their step over the mean own time, as many as ranks times steps.

    The mean of R ranks holds 1 / R of each: their variance is (R - 1) / R of an independent rank's, which is corrected.
    """
    num_ranks = len(size.own)
    apart = (size.own - size.own.mean(axis=0)) * math.sqrt(num_ranks / (num_ranks - 1)) / size.own.mean()
    return np.ravel(apart)


def step_at(sizes: Sequence[MeasuredSize], world_size: int, batch: int, shape: str) -> Step:
    """The step on so many workers, by what was measured at some sizes, of which the largest has several workers.

    Args:
        sizes: What was measured, by ascending world size.
        world_size: N.
        batch: Images of its step over all workers.
        shape: How communication grows, one of `SHAPES`; used where only one of the sizes has several workers.
    """
    largest, images = sizes[-1], batch / world_size
    own = float(largest.own.mean())
    if images != largest.images_per_worker:
        points = [_own_terms(each.images_per_worker) for each in sizes]
        found = fit_terms(points, [float(each.own.mean()) for each in sizes])
        own = sum(seconds * _own_terms(images)[name] for name, seconds in found.items())
    data = own * float(largest.data.mean() / largest.own.mean())
    return Step(
        compute=own - data,
        data=data,
        stragglers=own * max(0.0, expected_maximum(deviations(largest), world_size)) if world_size > 1 else 0.0,
        communication=_communication(sizes, world_size, shape),
    )


def _own_terms(images_per_worker: float) -> dict[str, float]:
    at = terms_at(1, images_per_worker)
    return {name: at[name] for name in ("computation", "serial")}


def _communication(sizes: Sequence[MeasuredSize], world_size: int, shape: str) -> float:
    """Exposed communication: fitted by a tree's and a ring's term, or grown by one of them from a single size."""
    if world_size == 1:
        return 0.0
    seen = {each.world_size: float(each.communication.mean()) for each in sizes if each.world_size > 1}
    if not any(seen.values()):
        return 0.0
    terms = {size: {"tree": math.log2(size), "ring": ring_term(size)} for size in [*seen, world_size]}
    if len(seen) == 1:
        ((size, seconds),) = seen.items()
        return seconds * terms[world_size][shape] / terms[size][shape]
    points = {size: seconds for size, seconds in seen.items() if seconds > 0}
    found = fit_terms([terms[size] for size in points], list(points.values()))
    return sum(seconds * terms[world_size][name] for name, seconds in found.items())


def central(sizes: Sequence[MeasuredSize], world_size: int, batch: int) -> Step:
    """The step that is predicted: the middle of both shapes of communication, where one size cannot tell them apart."""
    tree, ring = (step_at(sizes, world_size, batch, shape) for shape in SHAPES)
    return Step(tree.compute, tree.data, tree.stragglers, (tree.communication + ring.communication) / 2)


def resampled(sizes: Sequence[MeasuredSize]) -> list[tuple[list[MeasuredSize], str]]:
    """Bootstrap samples of all sizes by blocks of steps, each with one of the shapes of communication in turn."""
    chance = np.random.default_rng(SEED)
    return [
        ([each.take(_blocks(each.own.shape[1], chance)) for each in sizes], SHAPES[number % len(SHAPES)])
        for number in range(NUM_RESAMPLES)
    ]


def _blocks(num_steps: int, chance: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.int_]]:
    """Numbers of as many steps as there are, in blocks drawn with replacement; the end joins the beginning."""
    length = max(1, num_steps // NUM_BLOCKS)
    starts = chance.integers(num_steps, size=math.ceil(num_steps / length))
    numbers: np.ndarray[tuple[int], np.dtype[np.int_]] = (starts[:, None] + np.arange(length)).ravel()[:num_steps]
    return numbers % num_steps


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The ends between which 95 % of some values lie."""
    low, high = np.quantile(np.asarray(values), (0.025, 0.975))
    return float(low), float(high)
