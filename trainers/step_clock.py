"""Times the parts of every step: by CUDA events where there is a GPU, by the host's clock elsewhere.

A GPU's work is queued, so that the host's clock would time its queueing, and synchronising at every part would slow
down what is measured. Events are put into the queue instead, and read at the end of a window. Waiting for other workers
is timed apart from the backward pass: it begins when the last local gradients are ready, which is when
DistributedDataParallel calls its communication hook with them. Nothing is marked while a CUDA graph is captured, or
within its replay: events of a graph are recorded again by each replay, so the times of the one before would be lost.
"""

# No `from __future__ import annotations` here: torch compares a communication hook's annotations with classes.

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

_BETWEEN = "between"


class StepClock:
    """Marks the ends of a step's parts, and returns their seconds when the window of steps is over.

    Args:
        device: Where the model is.
        model: The model; where it is in DistributedDataParallel, waiting for gradients is timed too. A communication
            hook is registered on it, of which it can have one.
        host_clock: Seconds, read where the device is no GPU.
    """

    def __init__(
        self, device: torch.device, model: nn.Module, host_clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device, self._host_clock = device, host_clock
        self._start: Any = None
        self._marks: list[list[tuple[str, Any]]] = []
        self._ready: Any = None
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(self, _reduce)

    def begin(self) -> None:
        """A step begins. Time since the previous one of the window belongs to the step, but to none of its parts."""
        now = self._now()
        if not self._marks:
            self._start = now
        self._marks.append([(_BETWEEN, now)])

    def mark(self, part: str) -> None:
        """A part of the step ends here."""
        if part == "backward" and self._ready is not None:
            self._marks[-1].append((part, self._ready))
            part, self._ready = "communication", None
        self._marks[-1].append((part, self._now()))

    def own_gradients_ready(self) -> None:
        """A bucket of gradients is ready to be shared; the last one of a backward pass counts."""
        self._ready = self._now()

    def read(self) -> tuple[list[float], dict[str, list[float]]]:
        """The seconds of every step since the last call, and of its parts; the device must be synchronised.

        A part that a step has several times, once for each of its batches, is added up.
        """
        steps: list[float] = []
        parts: dict[str, list[float]] = {}
        before = self._start
        for marks in self._marks:
            began = before
            of_step: dict[str, float] = {}
            for part, mark in marks:
                if part != _BETWEEN:
                    of_step[part] = of_step.get(part, 0.0) + self._seconds(before, mark)
                before = mark
            for part, seconds in of_step.items():
                parts.setdefault(part, []).append(seconds)
            steps.append(self._seconds(began, before))
        self._marks = []
        return steps, parts

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return self._host_clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        # A microsecond is finer than either clock's precision, and makes the events a third as long.
        seconds: float = begin.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - begin
        return round(seconds, 6)


def _reduce(clock: StepClock, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    clock.own_gradients_ready()
    assert dist.group.WORLD is not None  # DistributedDataParallel needs it
    return allreduce_hook(dist.group.WORLD, bucket)
