"""What the loop does between windows of steps to report progress; and the state that checkpoints hold."""

from __future__ import annotations

import datetime
import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils.events import CommonMetricPrinter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainers.batching import ShapesMet
from trainers.contract.events import StepsDone
from trainers.contract.plan import TrialPlan
from trainers.evaluation_server import restore_values
from trainers.loop import TrainingLoop
from trainers.machine import peak_memory_gib

logger = logging.getLogger(__name__)

Send = Callable[..., None]
"""Sends an event of the given class with the given fields, without waiting."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def share_buffers(model: nn.Module, world_size: int) -> None:
    """Copies rank 0's buffers to every rank: running statistics of batch norm drift apart while ranks train.

    In one message for each type, as a backbone has hundreds of buffers of a few numbers.
    """
    if world_size == 1:
        return
    by_type: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    for buffer in unwrapped(model).buffers():
        by_type[buffer.dtype].append(buffer)
    for buffers in by_type.values():
        packed = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(packed, src=0)
        for buffer, values in zip(buffers, packed.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))


class ProgressHook:
    """Sends every window as an event, and writes detectron2's progress line into the log on rank 0."""

    every_window = True

    def __init__(self, plan: TrialPlan, send: Send) -> None:
        self.plan, self.send = plan, send
        self.printer = CommonMetricPrinter(plan.solver.max_iter)
        self._num_steps, self._seconds = 0, 0.0
        self._shapes = ShapesMet(plan.recipe.has_fixed_shapes(plan.device))

    def due(self, iteration: int, ending: bool) -> bool:
        """Every log period."""
        return iteration % self.plan.log_period == 0 or ending

    def run(self, loop: TrainingLoop) -> None:
        """Sends the window; at the end, logs the closing line of detectron2's logs, warm-up and hooks left out."""
        window = loop.window
        measured = window.step_seconds[max(0, self.plan.throughput_warmup_iters - window.first_iteration) :]
        self._num_steps += len(measured)
        self._seconds += sum(measured)
        parts = {"data": window.data_seconds, **window.part_seconds}
        self.send(
            StepsDone,
            first_iteration=window.first_iteration,
            iteration=loop.iteration,
            num_images=window.num_images,
            seconds=sum(window.step_seconds),
            step_seconds=tuple(window.step_seconds),
            data_seconds=tuple(window.data_seconds),
            part_seconds={name: sum(each) for name, each in parts.items()},
            step_part_seconds={
                name: tuple(each) for name, each in window.part_seconds.items() if len(each) == len(window.step_seconds)
            },
            losses=window.losses if loop.rank == 0 else {},
            learning_rate=window.learning_rate,
            peak_memory_gib=peak_memory_gib(loop.device),
            **self._shapes.fields(window.batches),
            num_graphs=window.graphs.num_graphs if window.graphs else None,
            capture_seconds=window.graphs.capture_seconds if window.graphs else None,
            eager_steps=dict(window.graphs.eager_steps) if window.graphs else {},
        )
        if loop.rank == 0:
            # The storage has moved on to the next iteration; detectron2 prints before it does.
            loop.storage.iter -= 1
            self.printer.write()
            loop.storage.iter += 1
        if loop.stop_reason and self._num_steps:
            took, each = datetime.timedelta(seconds=int(self._seconds)), self._seconds / self._num_steps
            logger.info("Overall training speed: %d iterations in %s (%.4f s / it)", self._num_steps, took, each)


def training_state(loop: TrainingLoop) -> dict[str, Any]:
    """All that a later start needs to go on as if nothing had happened.

    Positions in the data and random choices are functions of seed, rank and iteration, and need no state.
    """
    state = {
        "model": unwrapped(loop.model).state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "scheduler": loop.scheduler.state_dict(),
        "scaler": loop.scaler.state_dict(),
        "iteration": loop.iteration,
        "stop_reason": loop.stop_reason,
    }
    return state | {"ema": loop.average.state()} if loop.average else state


def state_sha256(state: dict[str, Any]) -> str:
    """Hash over every tensor and value of a state, the same for bit-identical states only."""
    digest = hashlib.sha256()

    def add(value: Any, place: str) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{place}:{value.dtype}:{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(value[key], f"{place}.{key}")
        elif isinstance(value, list | tuple):
            for index, inner in enumerate(value):
                add(inner, f"{place}.{index}")
        else:
            digest.update(f"{place}={value!r}".encode())

    add(state, "")
    return digest.hexdigest()


def restore(loop: TrainingLoop, state: dict[str, Any]) -> None:
    """Restores a state that `CheckpointHook` saved."""
    unwrapped(loop.model).load_state_dict(state["model"])
    # There may be more or fewer ranks than when it was saved: one goes on with that of a planned rank it stands for.
    saved = state["ranks"]
    restore_values(unwrapped(loop.model), saved[loop.rank * len(saved) // loop.plan.world_size])
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.scheduler.load_state_dict(state["scheduler"])
    if state["scaler"]:  # saved in another precision, it is empty; where there is no scaler now, torch ignores it
        loop.scaler.load_state_dict(state["scaler"])
    if loop.average:
        loop.average.restore(state["ema"])
    # A run that had been stopped goes on; one that had finished has nothing left to do.
    loop.stop_reason = state["stop_reason"] if state["stop_reason"] in ("target", "patience", "max_iter") else None
