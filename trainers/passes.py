"""Makes the gradients of a step: forward and backward passes over its batches, eager or replayed, and their average.

A step has one batch, or with `trials.accumulate` several, whose gradients add up: the loss of each is divided by their
number. So they are what as many workers with one batch each would average, and what one large batch would give as far
as the model divides its losses by a number of images or of samples that is the same in each (docs/measurement.md says
where it does not). Where a trial runs with fewer workers than planned, each also trains the batches of those it stands
for, one after the other and with their random choices. Workers meet once in a step, in its last backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainers.contract.plan import TrialPlan
from trainers.pulse import Activity
from trainers.speedups.apply import resolve_precision
from trainers.speedups.gradient_buckets import GradientBuckets
from trainers.speedups.graphs import Capture, Graphs, GraphUse
from trainers.step_clock import StepClock


def step_seed(seed: int, rank: int, iteration: int, part: int = 0) -> int:
    """Seed, 64 bits, of what the model draws on one planned rank in one of its batches of a step, counted from 0.

    It decides which anchors and proposals are sampled.
    """
    key = (seed, rank, iteration, part) if part else (seed, rank, iteration)
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


class Passes:
    """Both passes over the batches of one rank's steps.

    Args:
        plan: The trial.
        model: On `device`, wrapped for several workers.
        optimizer: Its optimizer, whose gradients are made.
        device: Where the model is.
        rank: This worker.
        activity: Where is recorded which part of a step is done.
        clock: Times the parts.
        capture: How the passes of padded batches are captured in graphs; None: they are not. With one, the model is
            not wrapped for several workers.
    """

    def __init__(
        self,
        plan: TrialPlan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        rank: int,
        activity: Activity,
        clock: StepClock,
        capture: Capture | None,
    ) -> None:
        self._plan, self._model, self._optimizer = plan, model, optimizer
        self._device, self._rank, self._activity, self._clock = device, rank, activity, clock
        self._precision = resolve_precision(plan.recipe.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self._precision == "amp")
        self.loss_names: tuple[str, ...] = ()
        """Names of the losses, known after the first pass."""
        self._losses = torch.zeros((), device=device)  # of the last batch
        self._buckets = GradientBuckets(model.parameters(), plan.world_size) if capture else None
        self._graphs = Graphs(capture, self._forward_and_backward, self._lasting_tensors, device) if capture else None

    def begin_window(self) -> None:
        """To be called before each window of steps: a hook may have replaced what graphs use."""
        if self._graphs:
            self._graphs.forget_replaced()

    def take_graph_use(self) -> GraphUse | None:
        """What graphs did since the last call; None without them."""
        return self._graphs.take_use() if self._graphs else None

    def train_on(self, inputs: Any, iteration: int, part: int = 0) -> Tensor:
        """Adds a batch's gradients to those of the step's earlier ones; after the last they are the workers' average.

        Args:
            inputs: What the model is called with.
            iteration: Steps done before this one.
            part: Which of the step's batches it is, counted from 0.

        Returns:
            Its losses and their sum, divided by the number of batches in a step; valid until the next call.
        """
        self._activity.enter("step", "forward")
        last = part + 1 == self._plan.batches_per_step
        graph = self._graphs.graph_of(inputs, self._losses) if self._graphs else None
        # Random choices of the model (which anchors and proposals are sampled) are a function of seed, planned rank and
        # iteration, so that a resumed run repeats them without a saved generator state.
        # `torch.manual_seed` would look for every kind of accelerator in each step.
        place, own_part = divmod(part, self._plan.accumulate)
        seed = step_seed(self._plan.seed, self._rank * self._plan.stands_for + place, iteration, own_part)
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)
        if self._plan.batches_per_step > 1 and part == 0:
            self._zero_gradients()
        if graph:
            self._losses = graph.run(inputs)
            self._clock.mark("graph")  # a replay does not say where in it the backward pass began
        else:
            side_stream = self._graphs.side_stream() if self._graphs else contextlib.nullcontext()
            with side_stream, contextlib.nullcontext() if last else self._alone():
                self._losses = self._forward_and_backward(inputs, self._end_part)
        if self._buckets and last:
            self._buckets.average()
            if self._plan.world_size > 1:
                self._clock.mark("communication")
        num_batches = self._plan.batches_per_step
        return self._losses / num_batches if num_batches > 1 else self._losses

    def _alone(self) -> contextlib.AbstractContextManager[Any]:
        """Where gradients are not shared with other workers."""
        return self._model.no_sync() if isinstance(self._model, DistributedDataParallel) else contextlib.nullcontext()

    def _zero_gradients(self) -> None:
        if self._buckets:
            self._buckets.zero()
        else:
            self._optimizer.zero_grad()

    def _end_part(self, part: str) -> None:
        self._clock.mark(part)
        if part == "forward":
            self._activity.enter("step", "backward")

    def _forward_and_backward(self, inputs: Any, end_part: Callable[[str], None] = lambda _: None) -> Tensor:
        """Both passes, as a graph captures them; nothing in them waits for the device.

        With several batches in a step, a graph must not zero gradients: it is the same for each of them.
        """
        num_batches = self._plan.batches_per_step
        with self._autocast():
            losses: dict[str, Tensor] = self._model(inputs)
            total = torch.stack(list(losses.values())).sum()
        self.loss_names = self.loss_names or (*losses, "total_loss")
        end_part("forward")
        if num_batches == 1:
            self._zero_gradients()
        if self._buckets:
            self._buckets.expect_all()
        self.scaler.scale(total / num_batches if num_batches > 1 else total).backward()
        end_part("backward")
        return torch.stack([*(loss.detach().float() for loss in losses.values()), total.detach().float()])

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.float16 if self._precision == "amp" else torch.bfloat16
        return torch.autocast(self._device.type, dtype=dtype)

    def _lasting_tensors(self) -> Iterator[Tensor]:
        """What both passes use of the model: weights, their gradients, buffers."""
        for weight in self._model.parameters():
            yield weight
            if weight.grad is not None:
                yield weight.grad
        yield from self._model.buffers()
