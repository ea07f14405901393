"""The training loop: the step, and hooks for everything that is not the step.

    while no reason to stop:
        until a hook is due:
            before_step(); load a batch; forward and backward, or their CUDA graph; optimizer and schedule
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

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine.hooks import LRScheduler
from detectron2.utils.events import EventStorage
from torch import nn

from trainers.batching import Batch, BatchTally
from trainers.contract.channel import Command
from trainers.contract.events import StopReason
from trainers.contract.plan import TrialPlan
from trainers.pulse import Activity
from trainers.speedups.apply import resolve_precision
from trainers.speedups.gradient_buckets import GradientBuckets
from trainers.speedups.graphs import Capture, Graphs, GraphUse
from trainers.step_clock import StepClock

logger = logging.getLogger(__name__)


class NotFiniteError(ArithmeticError):
    """A loss became NaN or infinite; raised on all ranks together."""


Request = Command | Literal["target"]
"""What a rank requests of all ranks: the driver's command, or to end because the target is reached."""

STOP_REASONS: dict[Request, StopReason | None] = {
    "run": None, "preempt": "preempted", "stop": "interrupted", "target": "target"
}  # fmt: skip
"""Why training ends on a request; where ranks request different things, the last of them in this order counts."""


def step_seed(seed: int, rank: int, iteration: int) -> int:
    """Seed, 64 bits, of what the model draws in one step on one rank: which anchors and proposals are sampled."""
    return int(np.random.SeedSequence((seed, rank, iteration)).generate_state(1, np.uint64)[0])


@dataclass(slots=True)
class StepWindow:
    """Steps since the last hooks ran, on this rank; fields have `StepsDone`'s names."""

    first_iteration: int
    num_images: int = 0
    batches: BatchTally = field(default_factory=BatchTally)
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
        capture: How the passes of padded batches are captured in graphs; None: they are not. With one, the model is
            not wrapped for several workers.
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
    ) -> None:
        self.plan, self.model, self.optimizer, self.scheduler = plan, model, optimizer, scheduler
        self.batches, self.hooks, self.device, self.rank = batches, hooks, device, rank
        self.iteration, self.activity = start_iteration, activity
        self._request, self._before_step = request, before_step
        self.stop_reason: StopReason | None = None
        self._precision = resolve_precision(plan.recipe.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self._precision == "amp")
        self._logged_group: int = LRScheduler.get_best_param_group_id(optimizer)  # biases may have another rate
        self._loss_sums = torch.zeros((), device=device)
        self._loss_names: tuple[str, ...] = ()
        self._first_bad = torch.full((), -1.0, device=device)
        self._recent_files: deque[tuple[str, ...]] = deque(maxlen=plan.log_period)
        self.window = StepWindow(start_iteration)
        """Steps since the last hooks ran."""
        self.storage = EventStorage(start_iteration)
        self.clock = StepClock(device, model)
        self._buckets = GradientBuckets(model.parameters(), plan.world_size) if capture else None
        self._graphs = Graphs(capture, self._forward_and_backward, self._lasting_tensors, device) if capture else None

    def run(self) -> StopReason:
        """Trains until the schedule or a hook ends it; raises NotFiniteError and BadInputError."""
        with self.storage:
            while self.stop_reason is None:
                self.window = StepWindow(self.iteration)
                if self._graphs:
                    self._graphs.forget_replaced()  # a hook may have replaced what they use
                while not self.window.complete:
                    self._before_step()
                    self._step(self.window)
                self._close(self.window)
                for hook in self.hooks:
                    if hook.every_window or hook.due(self.iteration, ending=self.stop_reason is not None):
                        hook.run(self)
        return self.stop_reason

    def _closes_window(self) -> bool:
        return self.iteration == self.plan.solver.max_iter or any(
            hook.due(self.iteration, ending=False) for hook in self.hooks
        )

    def _step(self, window: StepWindow) -> None:
        started = time.perf_counter()
        self.clock.begin()
        self.activity.enter("step", "data")
        batch = next(self.batches)
        self.activity.image_files = batch.image_files
        self._recent_files.append(self.activity.image_files)
        self.clock.mark("data")
        waited = time.perf_counter() - started

        values = self._train_on(batch.inputs)

        self.activity.enter("step", "optimizer")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        window.learning_rate = self.optimizer.param_groups[self._logged_group]["lr"]
        ends = self.iteration + 1 == self.plan.solver.max_iter
        with contextlib.suppress(IndexError) if ends else contextlib.nullcontext():
            self.scheduler.step()  # fvcore's step schedule has no rate after the last iteration, where none is needed
        self._add_losses(values)
        self.iteration += 1
        self.activity.iteration = self.iteration
        window.complete = self._closes_window()
        self.clock.mark("optimizer")
        if window.complete:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            window.step_seconds, window.part_seconds = self.clock.read()
            window.data_seconds = window.part_seconds.pop("data")
            window.graphs = self._graphs.take_use() if self._graphs else None

        window.num_images += len(batch)
        window.batches.add(batch)
        self.storage.put_scalars(time=time.perf_counter() - started, data_time=waited, smoothing_hint=False)
        self.storage.put_scalar("lr", window.learning_rate, smoothing_hint=False)
        self.storage.step()

    def _train_on(self, inputs: Any) -> torch.Tensor:
        """Makes the gradients of a batch, averaged over the workers; returns its losses and their sum."""
        self.activity.enter("step", "forward")
        graph = self._graphs.graph_of(inputs, self._loss_sums) if self._graphs else None
        # Random choices of the model (which anchors and proposals are sampled) are a function of seed, rank and
        # iteration, so that a resumed run repeats them without a saved generator state.
        # `torch.manual_seed` would look for every kind of accelerator in each step.
        seed = step_seed(self.plan.seed, self.rank, self.iteration)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        if graph:
            values = graph.run(inputs)
            self.clock.mark("graph")  # a replay does not say where in it the backward pass began
        else:
            with self._graphs.side_stream() if self._graphs else contextlib.nullcontext():
                values = self._forward_and_backward(inputs, self._end_part)
        if self._buckets:
            self._buckets.average()
            if self.plan.world_size > 1:
                self.clock.mark("communication")
        return values

    def _end_part(self, part: str) -> None:
        self.clock.mark(part)
        if part == "forward":
            self.activity.enter("step", "backward")

    def _forward_and_backward(self, inputs: Any, end_part: Callable[[str], None] = lambda _: None) -> torch.Tensor:
        """Both passes, as a graph captures them; nothing in them waits for the device."""
        with self._autocast():
            losses: dict[str, torch.Tensor] = self.model(inputs)
            total = torch.stack(list(losses.values())).sum()
        self._loss_names = self._loss_names or (*losses, "total_loss")
        end_part("forward")
        if self._buckets:
            self._buckets.zero()
        else:
            self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        end_part("backward")
        return torch.stack([*(loss.detach().float() for loss in losses.values()), total.detach().float()])

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.float16 if self._precision == "amp" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype)

    def _lasting_tensors(self) -> Iterator[torch.Tensor]:
        """What both passes use of the model: weights, their gradients, buffers."""
        for weight in self.model.parameters():
            yield weight
            if weight.grad is not None:
                yield weight.grad
        yield from self.model.buffers()

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
        window.losses = dict(zip(self._loss_names, means, strict=True))
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
