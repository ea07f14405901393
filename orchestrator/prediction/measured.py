"""What a calibration measured at one size: every step on every rank, aligned by iteration, warm-up left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.experiment.spec import SpecError
from orchestrator.runlog.folder import TrialEvents
from trainers.contract.events import CheckpointSaved, StepsDone

Array = NDArray[np.float64]

MIN_STEPS = 10
"""Fewer joint steps have no distribution that could be drawn from."""


@dataclass(frozen=True, slots=True)
class MeasuredSize:
    """The steps of one size. Arrays are seconds, of shape (ranks, steps) where nothing else is said."""

    world_size: int
    batch: int
    """Images of a step over all workers."""
    own: Array
    """A rank's step without waiting for others' gradients."""
    data: Array
    """The part of it that waited for the loader."""
    communication: Array
    """Of shape (steps,): what exchanging gradients took once the last rank was ready; 0 for one worker.

    The wait of the rank that is ready last: it waits for no other.
    """

    @property
    def images_per_worker(self) -> float:
        """Images of a worker in a step."""
        return self.batch / self.world_size

    @property
    def step_seconds(self) -> float:
        """Mean step: the slowest rank's own time and the exchange."""
        return float((self.own.max(axis=0) + self.communication).mean())

    def take(self, steps: NDArray[np.int_]) -> MeasuredSize:
        """The same with some of its steps, which may be taken more than once."""
        own, data = self.own[:, steps], self.data[:, steps]
        return MeasuredSize(self.world_size, self.batch, own, data, self.communication[steps])


def measured_size(trial: TrialEvents) -> MeasuredSize:
    """The steps of a trial after its warm-up, of the attempts with all workers.

    Raises:
        SpecError: They were not measured one by one, or are too few.
    """
    plan, size = trial.plan, trial.trial.world_size
    batch = trial.trial.global_batch_size
    if plan is None or batch is None:
        raise SpecError(f"{trial.label}: its events or its batch are missing, so nothing can be predicted from it")
    steps: dict[tuple[int, int], dict[int, tuple[float, float, float]]] = defaultdict(dict)
    for event in trial.events:
        if isinstance(event, StepsDone):
            for iteration, parts in _single_steps(event, size):
                if iteration >= plan.throughput_warmup_iters:
                    steps[event.attempt, iteration][event.rank] = parts
    joint = [[ranks[rank] for rank in sorted(ranks)] for _, ranks in sorted(steps.items()) if len(ranks) == size]
    if len(joint) < MIN_STEPS:
        raise SpecError(
            f"{trial.label}: only {len(joint)} steps after the warm-up were measured one by one on all its {size} "
            f"workers, and a prediction needs {MIN_STEPS}"
        )
    step, data, wait = np.asarray(joint, dtype=np.float64).transpose(2, 1, 0)
    return MeasuredSize(size, batch, step - wait, data, wait.min(axis=0))


def _single_steps(event: StepsDone, world_size: int) -> Iterator[tuple[int, tuple[float, float, float]]]:
    """Iteration and (whole step, wait for data, wait for others) of each step of a window, where all are known."""
    waits = event.step_part_seconds.get("communication", ())
    if world_size == 1:
        waits = (0.0,) * len(event.step_seconds)
    if len(event.step_seconds) == len(event.data_seconds) == len(waits):
        parts = zip(event.step_seconds, event.data_seconds, waits, strict=True)
        yield from enumerate(parts, event.first_iteration)


def checkpoint_stall(trials: Sequence[TrialEvents]) -> float | None:
    """Mean stall of the checkpoints of some trials, in seconds; None where none was written."""
    stalls = [e.stall_seconds for trial in trials for e in trial.events if isinstance(e, CheckpointSaved)]
    return float(np.mean(stalls)) if stalls else None
