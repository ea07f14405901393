"""The training loop: the step, and hooks for everything that is not the step.

Every decision that all workers must take together (stop, evaluate, give up on a loss of NaN) is taken at the end of a
window of steps, from figures that all of them have: nothing in between waits for another rank but the gradients.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from detectron2.utils.events import EventStorage
from torch import nn

from trainers.activity import Activity
from trainers.contract.channel import Command
from trainers.contract.events import StopReason
from trainers.contract.plan import TrialPlan
from trainers.speedups.apply import resolve_precision
from trainers.step_clock import StepClock

logger = logging.getLogger(__name__)


class NotFiniteError(ArithmeticError):
    """A loss became NaN or infinite; raised on all ranks together."""


Asked = Command | Literal["target"]
"""What a rank may ask of all: what the driver wants of it, or to end because the target is reached."""

ENDS: dict[Asked, StopReason | None] = {
    "run": None, "preempt": "preempted", "stop": "interrupted", "target": "target"
}  # fmt: skip
"""What that means for training, the strongest last."""


@dataclass(slots=True)
class StepWindow:
    """Steps since the last hooks ran, on this rank.

    Attributes:
        first_iteration: First of them, counted from 0.
        num_images: Images trained on.
        step_seconds: Wall time of each.
        data_seconds: Waiting for data, of each.
        part_seconds: Seconds by part, of each; `data` is in `data_seconds`.
        losses: Mean over the steps and the ranks, by name; filled when the window closes.
        learning_rate: At the last step.
        complete: Whether the window has had its last step.
    """

    first_iteration: int
    num_images: int = 0
    step_seconds: list[float] = field(default_factory=list)
    data_seconds: list[float] = field(default_factory=list)
    part_seconds: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    learning_rate: float = 0.0
    complete: bool = False


class Hook(Protocol):
    """Something done between windows of steps, on all ranks.

    Attributes:
        every_window: Whether it also runs when another hook closed the window.
    """

    every_window: bool

    def due(self, iteration: int, ending: bool) -> bool:
        """Whether it must run after this many iterations; the same answer on all ranks.

        Args:
            iteration: Iterations done.
            ending: Whether training ends here, by a request to stop or a hook's decision.
        """

    def run(self, loop: TrainingLoop, window: StepWindow) -> None:
        """Does it; may set `loop.stop_reason`, the same on all ranks."""


class TrainingLoop:
    """Trains one rank from an iteration to the end of the schedule.

    Args:
        plan: The trial.
        model: The model, wrapped for several workers.
        optimizer: Its optimizer.
        scheduler: Its learning rate schedule, stepped once per iteration.
        batches: This worker's endless batches, from `start_iteration` on.
        hooks: Run in this order whenever a window closes; a window closes when one is due.
        device: Where the model is.
        rank: This worker.
        start_iteration: Iterations done already.
        now: Where the loop says what it is doing.
        asked: Says what this rank asks of all.
    """

    def __init__(
        self,
        plan: TrialPlan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        batches: Iterator[list[dict[str, Any]]],
        hooks: list[Hook],
        device: torch.device,
        rank: int,
        start_iteration: int,
        now: Activity,
        asked: Callable[[], Asked],
    ) -> None:
        self.plan, self.model, self.optimizer, self.scheduler = plan, model, optimizer, scheduler
        self.batches, self.hooks, self.device, self.rank = batches, hooks, device, rank
        self.iteration, self.now, self._asked = start_iteration, now, asked
        self.stop_reason: StopReason | None = None
        self._precision = resolve_precision(plan.recipe.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self._precision == "amp")
        self._loss_sums: torch.Tensor | None = None
        self._loss_names: tuple[str, ...] = ()
        self._first_bad = torch.full((), -1.0, device=device)
        self._recent_files: deque[tuple[str, ...]] = deque(maxlen=plan.log_period)
        self.storage = EventStorage(start_iteration)
        self.clock = StepClock(device, model)

    def run(self) -> StopReason:
        """Trains until the schedule or a hook ends it.

        Raises:
            NotFiniteError: A loss was not finite.
            BadInputError: An image cannot be used.
        """
        with self.storage:
            while self.stop_reason is None:
                window = StepWindow(self.iteration)
                while not window.complete:
                    self._step(window)
                self._close(window)
                for hook in self.hooks:
                    if hook.every_window or hook.due(self.iteration, ending=self.stop_reason is not None):
                        hook.run(self, window)
        return self.stop_reason

    def _closes_window(self) -> bool:
        return self.iteration == self.plan.solver.max_iter or any(
            hook.due(self.iteration, ending=False) for hook in self.hooks
        )

    def _step(self, window: StepWindow) -> None:
        started = time.perf_counter()
        self.clock.begin()
        self.now.enter("step", "data")
        batch = next(self.batches)
        self.now.image_files = tuple(record["file_name"] for record in batch)
        self._recent_files.append(self.now.image_files)
        self.clock.mark("data")
        waited = time.perf_counter() - started

        # Random choices of the model (which anchors and proposals are sampled) are a function of seed, rank and
        # iteration: a resumed run needs no generator state to make them again.
        # Not `torch.manual_seed`, which looks for every kind of accelerator, each time.
        seed = hash((self.plan.seed, self.rank, self.iteration)) & 0x7FFF_FFFF_FFFF_FFFF
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        self.now.enter("step", "forward")
        with self._autocast():
            losses: dict[str, torch.Tensor] = self.model(batch)
            total = torch.stack(list(losses.values())).sum()
        self.clock.mark("forward")

        self.now.enter("step", "backward")
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        self.clock.mark("backward")

        self.now.enter("step", "optimizer")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        window.learning_rate = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        self._keep_losses(losses, total)
        self.iteration += 1
        self.now.iteration = self.iteration
        window.complete = self._closes_window()
        self.clock.mark("optimizer")
        if window.complete:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            window.step_seconds, window.part_seconds = self.clock.read()
            window.data_seconds = window.part_seconds.pop("data")

        window.num_images += len(batch)
        self.storage.put_scalars(time=time.perf_counter() - started, data_time=waited, smoothing_hint=False)
        self.storage.put_scalar("lr", window.learning_rate, smoothing_hint=False)
        self.storage.step()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.float16 if self._precision == "amp" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype)

    def _keep_losses(self, losses: dict[str, torch.Tensor], total: torch.Tensor) -> None:
        """Adds up the losses on the device; nothing is fetched to the host before the window closes."""
        values = torch.stack([*(loss.detach().float() for loss in losses.values()), total.detach().float()])
        if self._loss_sums is None:
            self._loss_names = (*losses, "total_loss")
            self._loss_sums = torch.zeros_like(values)
        self._loss_sums += values
        bad = ~torch.isfinite(values[-1]) & (self._first_bad < 0)
        self._first_bad = torch.where(bad, float(self.iteration), self._first_bad)

    def _close(self, window: StepWindow) -> None:
        """Shares what the ranks must agree on, and raises on all of them if any has seen a loss that is not finite."""
        self.now.enter("report")
        assert self._loss_sums is not None
        stop = torch.tensor([float(list(ENDS).index(self._asked()))], device=self.device)
        shared = torch.cat([self._loss_sums / len(window.step_seconds), self._first_bad.reshape(1), stop])
        # A NaN would spread over the sums; it is told by its own entry.
        shared[:-2] = torch.nan_to_num(shared[:-2], posinf=0.0, neginf=0.0)
        if self.plan.world_size > 1:
            everyone = [torch.empty_like(shared) for _ in range(self.plan.world_size)]
            dist.all_gather(everyone, shared)
        else:
            everyone = [shared]
        rows = torch.stack(everyone).tolist()
        self._loss_sums.zero_()
        bad = {rank: int(row[-2]) for rank, row in enumerate(rows) if row[-2] >= 0}
        if bad:
            first = min(bad.values())
            ranks = ", ".join(str(rank) for rank, iteration in bad.items() if iteration == first)
            files = list(self._recent_files)
            known = bad.get(self.rank) == first and self.iteration - first <= len(files)
            self.now.image_files = files[first - self.iteration] if known else ()
            self.now.section, self.now.iteration = "step", first  # where it happened, not where it was found
            raise NotFiniteError(f"the loss became NaN or infinite at iteration {first} (first on rank {ranks})")
        means = [sum(column) / len(rows) for column in zip(*(row[:-2] for row in rows), strict=True)]
        window.losses = dict(zip(self._loss_names, means, strict=True))
        if self.iteration == self.plan.solver.max_iter:
            self.stop_reason = "max_iter"
        else:
            self.stop_reason = list(ENDS.values())[int(max(row[-1] for row in rows))]
        self.storage.put_scalars(**window.losses, smoothing_hint=False)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far in GiB: of the GPU by torch, or of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
