"""`python -m orchestrator.prediction.coverage`: how often the intervals hold a truth that is known, on made-up steps.

Takes minutes. Everything is drawn: no machine takes part, and what the model leaves out of a real one is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from orchestrator.prediction import model
from orchestrator.prediction.measured import Array, MeasuredSize

NUM_CALIBRATIONS, NUM_STEPS, NUM_TRUE_STEPS = 100, 60, 20_000

SPREAD, COMMON_SPREAD, SPIKE, SPIKE_SHARE, COMMUNICATION = 0.1, 0.05, 0.5, 0.01, 0.05
"""Of steps of 1 s: spread of a rank's own time, of what all ranks of a step have in common, size and share of rare slow
steps, and seconds of communication per doubling of the workers."""


def own_seconds(chance: np.random.Generator, num_ranks: int, num_steps: int, *, spikes: bool) -> Array:
    """Own times of ranks in steps, of shape (ranks, steps): normal, or lognormal with rare slow steps."""
    drawn = SPREAD * chance.standard_normal((num_ranks, num_steps))
    if not spikes:
        return 1 + drawn
    slow: Array = np.exp(drawn) + SPIKE * (chance.random((num_ranks, num_steps)) < SPIKE_SHARE)
    return slow


def calibrated(chance: np.random.Generator, sizes: Sequence[int], *, spikes: bool) -> list[MeasuredSize]:
    """A calibration on so many workers, whose steps have something in common, too."""
    made = []
    for size in sizes:
        own = own_seconds(chance, size, NUM_STEPS, spikes=spikes) + COMMON_SPREAD * chance.standard_normal(NUM_STEPS)
        exchange = np.full(NUM_STEPS, COMMUNICATION * math.log2(size))
        made.append(MeasuredSize(size, size, own, np.zeros_like(own), exchange))
    return made


def coverage(sizes: Sequence[int], world_size: int, *, spikes: bool) -> tuple[float, float, float]:
    """Share of the intervals that hold the true step (0–1), mean and largest error of the predicted throughput."""
    many = own_seconds(np.random.default_rng(0), world_size, NUM_TRUE_STEPS, spikes=spikes)
    truth = float(many.max(axis=0).mean()) + COMMUNICATION * math.log2(world_size)
    held, errors = 0, []
    for number in range(NUM_CALIBRATIONS):
        measured = calibrated(np.random.default_rng([number, *sizes]), sizes, spikes=spikes)
        drawn = [model.step_at(each, world_size, world_size, shape) for each, shape in model.resampled(measured)]
        low, high = model.interval([step.seconds for step in drawn])
        held += low <= truth <= high
        errors.append(truth / model.central(measured, world_size, world_size).seconds - 1)
    return held / NUM_CALIBRATIONS, float(np.mean(errors)), float(np.abs(errors).max())


def main() -> None:
    """Prints a line for each kind of steps, calibration and predicted size."""
    console = Console(emoji=False)
    for spikes in (False, True):
        for sizes in ((1, 2), (1, 2, 8)):
            for world_size in (4, 64) if len(sizes) == 2 else (16, 64):
                held, mean, largest = coverage(sizes, world_size, spikes=spikes)
                steps = "rare slow steps" if spikes else "normal steps"
                text = f"{steps}, from {', '.join(map(str, sizes))}, {world_size} workers: {held:.0%} of the intervals "
                text += f"hold the truth; images/s off by {mean:+.1%} on average, {largest:.1%} at most"
                console.print(text, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
