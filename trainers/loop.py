"""The training loop: the step, and hooks for everything that is not the step.

    while no reason to stop:
        until a hook is due:
            before_step(); for each batch of the step: load it, forward and backward; optimizer and schedule
        share losses and requests to stop with the other ranks
        run every hook that is due: progress, evaluation, checkpoint, loader sizing

Decisions that all workers must take together (stop, evaluate, fail on a loss of NaN) are taken at the end of a window
of steps, from values that all ranks have: between two of them only gradients are waited for.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from detectron2.engine.hooks import LRScheduler
from detectron2.utils.events import EventStorage
from torch import nn

from trainers.batching import Batch, BatchTally
from trainers.contract.channel import Command
from trainers.contract.events import StopReason
from trainers.contract.plan import TrialPlan
from trainers.ema import WeightAverage
from trainers.passes import Passes
from trainers.pulse import Activity
from trainers.speedups.graphs import Capture, GraphUse
from trainers.step_clock import StepClock

logger = logging.getLogger(__name__)


class NotFiniteError(ArithmeticError):
    """A loss became NaN or infinite; raised on all ranks together."""


Request = Command | Literal["patience", "target"]
"""What a rank requests of all ranks: the driver's command, or to end because of what evaluations found."""

STOP_REASONS: dict[Request, StopReason | None] = {
    "run": None, "preempt": "preempted", "stop": "interrupted", "patience": "patience", "target": "target",
}  # fmt: skip
"""Why training ends on a request; where ranks request different things, the last of them in this order counts."""


@dataclass(slots=True)
class StepWindow:
    """Steps since the last hooks ran, on this rank; fields have `StepsDone`'s names."""

    first_iteration: int
    batches: BatchTally
    num_images: int = 0
    step_seconds: list[float] = field(default_factory=list)
    data_seconds: list[float] = field(default_factory=list)
    part_seconds: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of the parts other than `data`, in each step."""
    losses: dict[str, float] = field(default_factory=dict)
    """Filled when the window closes."""
    learning_rate: float | None = None
    graphs: GraphUse | None = None
    """Filled when the window closes; None without CUDA graphs."""
    complete: bool = False
    """Whether the window has had its last step."""


class Hook(Protocol):
    """Something done between windows of steps, on all ranks."""

    every_window: bool
    """Whether it also runs when another hook closed the window."""

    def due(self, iteration: int, ending: bool) -> bool:
        """Whether it must run after this many iterations (`ending`: the last ones); the same answer on all ranks."""

    def run(self, loop: TrainingLoop) -> None:
        """Does it; may set `loop.stop_reason`, the same on all ranks."""


class TrainingLoop:
    """Trains one rank from an iteration to the end of the schedule.

    Args:
        plan: The trial.
        model: On `device`, wrapped for several workers.
        optimizer: Its optimizer.
        scheduler: Its learning rate schedule, stepped once per iteration.
        batches: This worker's endless batches, from `start_iteration` on.
        hooks: Run in this order whenever a window closes; a window closes when one is due.
        device: Where the model is.
        rank: This worker.
        start_iteration: Iterations done already.
        activity: Where the loop records what it is doing.
        request: Returns what this rank requests of all ranks; called at the end of every window.
        before_step: Called before every step.
        capture: As in `Passes`.
        average: Running average of the weights, which each step updates; None for none.
    """

    def __init__(
        self,
        plan: TrialPlan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        batches: Iterator[Batch],
        hooks: list[Hook],
        device: torch.device,
        rank: int,
        start_iteration: int,
        activity: Activity,
        request: Callable[[], Request] = lambda: "run",
        before_step: Callable[[], None] = lambda: None,
        capture: Capture | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        self.plan, self.model, self.optimizer, self.scheduler = plan, model, optimizer, scheduler
        self.batches, self.hooks, self.device, self.rank = batches, hooks, device, rank
        self.iteration, self.activity, self.average = start_iteration, activity, average
        self._request, self._before_step = request, before_step
        self.stop_reason: StopReason | None = None
        self._logged_group: int = LRScheduler.get_best_param_group_id(optimizer)  # biases may have another rate
        self._loss_sums = torch.zeros((), device=device)
        self._first_bad = torch.full((), -1.0, device=device)
        self._recent_files: deque[tuple[str, ...]] = deque(maxlen=plan.log_period)
        self.window = self._new_window()
        """Steps since the last hooks ran."""
        self.storage = EventStorage(start_iteration)
        self.clock = StepClock(device, model)
        self._passes = Passes(plan, model, optimizer, device, rank, activity, self.clock, capture)
        self.scaler = self._passes.scaler

    def run(self) -> StopReason:
        """Trains until the schedule or a hook ends it; raises NotFiniteError and BadInputError."""
        with self.storage:
            while self.stop_reason is None:
                self.window = self._new_window()
                self._passes.begin_window()
                while not self.window.complete:
                    self._before_step()
                    self._step(self.window)
                self._close(self.window)
                for hook in self.hooks:
                    if hook.every_window or hook.due(self.iteration, ending=self.stop_reason is not None):
                        hook.run(self)
        return self.stop_reason

    def _new_window(self) -> StepWindow:
        return StepWindow(self.iteration, BatchTally(self.plan.batches_per_step))

    def _closes_window(self) -> bool:
        return self.iteration == self.plan.solver.max_iter or any(
            hook.due(self.iteration, ending=False) for hook in self.hooks
        )

    def _step(self, window: StepWindow) -> None:
        started = time.perf_counter()
        self.clock.begin()
        self._recent_files.append(())
        waited, losses = 0.0, []
        for part in range(self.plan.batches_per_step):
            asked = time.perf_counter()
            batch = self._next_batch(window)
            waited += time.perf_counter() - asked
            losses.append(self._passes.train_on(batch.inputs, self.iteration, part))

        self.activity.enter("step", "optimizer")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update()
        window.learning_rate = self.optimizer.param_groups[self._logged_group]["lr"]
        ends = self.iteration + 1 == self.plan.solver.max_iter
        with contextlib.suppress(IndexError) if ends else contextlib.nullcontext():
            self.scheduler.step()  # fvcore's step schedule has no rate after the last iteration, where none is needed
        self._add_losses(losses[0] if len(losses) == 1 else torch.stack(losses).sum(dim=0))
        self.iteration += 1
        self.activity.iteration = self.iteration
        window.complete = self._closes_window()
        self.clock.mark("optimizer")
        if window.complete:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            window.step_seconds, window.part_seconds = self.clock.read()
            window.data_seconds = window.part_seconds.pop("data")
            window.graphs = self._passes.take_graph_use()

        self.storage.put_scalars(time=time.perf_counter() - started, data_time=waited, smoothing_hint=False)
        self.storage.put_scalar("lr", window.learning_rate, smoothing_hint=False)
        self.storage.step()

    def _next_batch(self, window: StepWindow) -> Batch:
        self.activity.enter("step", "data")
        batch = next(self.batches)
        self.activity.image_files = batch.image_files
        self._recent_files[-1] += batch.image_files
        self.clock.mark("data")
        window.num_images += len(batch)
        window.batches.add(batch)
        return batch

    def _add_losses(self, values: torch.Tensor) -> None:
        """Adds up the losses on the device; nothing is fetched to the host before the window closes."""
        if not self._loss_sums.dim():
            self._loss_sums = torch.zeros_like(values)
        self._loss_sums += values
        bad = ~torch.isfinite(values[-1]) & (self._first_bad < 0)
        self._first_bad = torch.where(bad, float(self.iteration), self._first_bad)

    def _close(self, window: StepWindow) -> None:
        """Shares what the ranks must agree on; raises on all of them if a loss was not finite on any of them."""
        self.activity.enter("report")
        stop = torch.tensor([float(list(STOP_REASONS).index(self._request()))], device=self.device)
        shared = torch.cat([self._loss_sums / len(window.step_seconds), self._first_bad.reshape(1), stop])
        # A NaN would spread over the sums; it has its own entry, the iteration at which it came up.
        shared[:-2] = torch.nan_to_num(shared[:-2], posinf=0.0, neginf=0.0)
        if self.plan.world_size > 1:
            everyone = [torch.empty_like(shared) for _ in range(self.plan.world_size)]
            dist.all_gather(everyone, shared)
        else:
            everyone = [shared]
        rows = torch.stack(everyone).tolist()
        self._loss_sums.zero_()
        self._raise_if_not_finite({rank: int(row[-2]) for rank, row in enumerate(rows) if row[-2] >= 0})
        means = [sum(column) / len(rows) for column in zip(*(row[:-2] for row in rows), strict=True)]
        window.losses = dict(zip(self._passes.loss_names, means, strict=True))
        if self.iteration == self.plan.solver.max_iter:
            self.stop_reason = "max_iter"
        else:
            self.stop_reason = list(STOP_REASONS.values())[int(max(row[-1] for row in rows))]
        self.storage.put_scalars(**window.losses, smoothing_hint=False)

    def _raise_if_not_finite(self, first_bad: dict[int, int]) -> None:
        """Raises where there is a first iteration with a loss that was not finite, by rank."""
        if not first_bad:
            return
        first = min(first_bad.values())
        ranks = ", ".join(str(rank) for rank, iteration in first_bad.items() if iteration == first)
        files = list(self._recent_files)
        known = first_bad.get(self.rank) == first and self.iteration - first <= len(files)
        # The failure is reported where it happened, not where it was found.
        self.activity.image_files = files[first - self.iteration] if known else ()
        self.activity.section, self.activity.iteration = "step", first
        raise NotFiniteError(f"the loss became NaN or infinite at iteration {first} (first on rank {ranks})")
