"""Sizes a loader for its model and machine: as many processes as keep the data ahead of the step, no more.

Too few starve the accelerator, too many compete for the CPUs. The training order does not depend on the number, so the
loader can be replaced in the middle of training and every image still comes once.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from trainers.contract.plan import TrialPlan
from trainers.loading import TrainingImages
from trainers.loop import TrainingLoop

logger = logging.getLogger(__name__)

RESERVE = 1.5
"""How much faster than the steps the loader should be: images differ in size and in time to decode."""

NUM_TIMED = 8
"""Images, evenly spaced over the data set, on which the loader's speed is measured."""

GRAPH_WINDOWS = 5
"""Windows of steps after which it is measured with CUDA graphs: before, most steps are the eager ones of new shapes."""


class LoaderSizing:
    """A hook that measures a window of steps and, once, replaces the loader by one of the right size.

    Args:
        plan: The trial; the hook runs only where it allows more loader processes than it starts with.
        images: Read by the loader.
        start: Iteration at which training starts.
        load: Makes the batches from an iteration on with a number of processes.
    """

    every_window = False

    def __init__(
        self, plan: TrialPlan, images: TrainingImages, start: int, load: Callable[[int, int], Iterator[Any]]
    ) -> None:
        self.plan, self.images, self.load = plan, images, load
        self._at = start + plan.log_period * (GRAPH_WINDOWS if plan.recipe.cuda_graphs else 1)

    def due(self, iteration: int, ending: bool) -> bool:  # noqa: ARG002 - a hook's interface
        """Once, when steps are as fast as they will be."""
        return iteration == self._at and self.plan.most_loader_workers > self.plan.loader_workers

    def run(self, loop: TrainingLoop) -> None:
        """Replaces the loader where another number of processes is right; each rank decides for itself."""
        steps = [step - data for step, data in zip(loop.window.step_seconds, loop.window.data_seconds, strict=True)]
        step = statistics.median(steps[len(steps) // 2 :])  # the first ones compile kernels and fill caches
        batch = self._seconds_per_image() * self.plan.batch_per_worker * self.plan.batches_per_step
        wanted = processes(batch, step, self.plan.most_loader_workers)
        logger.info(
            "One process makes the images of a step in %.3f s, it takes %.3f s without waiting: %d loader processes, "
            "from %d.", batch, step, wanted, self.plan.loader_workers,
        )  # fmt: skip
        if wanted != self.plan.loader_workers:
            loop.batches = self.load(loop.iteration, wanted)

    def _seconds_per_image(self) -> float:
        taken = []
        for number in range(NUM_TIMED):
            started = time.perf_counter()
            self.images.collation([self.images[number, number * len(self.images) // NUM_TIMED]])
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)


def processes(batch_seconds: float, step_seconds: float, max_processes: int) -> int:
    """Loader processes, 1 to `max_processes`, that stay ahead of the steps.

    Args:
        batch_seconds: Time in which one process makes the batches of a step.
        step_seconds: A step without its wait for data.
        max_processes: CPUs available for loading.
    """
    if step_seconds <= 0:
        return max_processes
    return max(1, min(max_processes, math.ceil(RESERVE * batch_seconds / step_seconds)))
