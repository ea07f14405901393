"""What the loop does between windows of steps: report progress, evaluate; and the state that checkpoints hold."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils.events import CommonMetricPrinter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainers.batching import ShapesMet
from trainers.contract import clock
from trainers.contract.events import Evaluated, StepsDone
from trainers.contract.plan import TrialPlan
from trainers.contract.targets import all_met, metric_rating
from trainers.evaluation import Evaluator, Scores
from trainers.loop import TrainingLoop
from trainers.machine import peak_memory_gib
from trainers.overlap import Overlap

logger = logging.getLogger(__name__)

Send = Callable[..., None]
"""Sends an event of the given class with the given fields, without waiting."""

EVALUATION_PENDING_KEY = "evaluation_owed"
"""Key of a checkpoint's state; the name that the first version wrote, so that its runs can still be resumed."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def share_buffers(model: nn.Module, world_size: int) -> None:
    """Copies rank 0's buffers to every rank: running statistics of batch norm drift apart while ranks train."""
    if world_size > 1:
        for buffer in unwrapped(model).buffers():
            dist.broadcast(buffer, src=0)


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


class EvaluationHook:
    """Evaluates at the plan's period and at the end, and stops training at the target where the plan says so.

    With `overlapped_evaluation`, rank 0 copies the weights to another process and trains on; the scores come later, and
    `rate` is called with their iteration and rating. The last evaluation is made by all ranks in any case, since there
    is nothing left to train meanwhile. `num_train_images` are those of an epoch; `prepare` is called with the iteration
    before the model is evaluated.
    """

    every_window = False

    def __init__(
        self,
        plan: TrialPlan,
        evaluator: Evaluator,
        num_train_images: int,
        send: Send,
        rate: Callable[[int, float], None],
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        self.plan, self.evaluator, self.num_train_images = plan, evaluator, num_train_images
        self.send, self.rate, self.prepare = send, rate, prepare
        self.last_scores: Scores | None = None
        """Scores of the last evaluation (rank 0), that of `last_iteration`."""
        self.last_iteration = 0
        self.overlap: Overlap | None = None
        """The process that evaluates concurrently; None on other ranks, and where training waits for evaluations."""
        self._skipped = self._reached = False
        self._begun: int | None = None  # iteration of the evaluation in progress; the same on all ranks
        self._stall_seconds = 0.0

    def due(self, iteration: int, ending: bool) -> bool:  # noqa: ARG002 - a hook's interface
        """At multiples of the period, and after the last iteration where the plan asks for it."""
        solver = self.plan.solver
        periodic = solver.eval_period > 0 and iteration % solver.eval_period == 0
        return periodic or (solver.evaluate_at_end and iteration == solver.max_iter)

    def run(self, loop: TrainingLoop) -> None:
        """Evaluates, or starts a concurrent evaluation."""
        self._skipped = loop.stop_reason in ("interrupted", "preempted")
        if self._skipped:
            return
        last = loop.iteration == self.plan.solver.max_iter
        self.wait_for_pending(loop)
        if loop.stop_reason == "target" and not last:
            return
        loop.activity.enter("evaluation")
        started = time.perf_counter()
        if self.prepare:
            self.prepare(loop.iteration)
            loop.activity.enter("evaluation")  # it has a time-out of its own
        prepared = time.perf_counter() - started
        share_buffers(loop.model, self.plan.world_size)
        if self.plan.recipe.overlapped_evaluation and not last:
            self._begun = loop.iteration
            if self.overlap:
                self.overlap.begin(unwrapped(loop.model), loop.iteration)
            self._stall_seconds = time.perf_counter() - started
            return
        scores = self.evaluator.run(unwrapped(loop.model), loop.iteration)
        parts = ({"precise_bn": prepared} if self.prepare else {}) | scores.part_seconds
        if loop.rank == 0:
            self._emit(loop.iteration, scores, clock.now(), time.perf_counter() - started, parts)
        self._stop_all_at_target(loop)

    def pending(self, iteration: int) -> bool:
        """Whether an evaluation of this iteration is missing: a stop left it out, or it is still in progress.

        The next start from this iteration's checkpoint makes it first.
        """
        return self._skipped or self._begun == iteration

    def wait_for_pending(self, loop: TrainingLoop) -> None:
        """Waits for the concurrent evaluation of an older iteration, if there is one; all ranks call it together."""
        if self._begun is None or self._begun >= loop.iteration:
            return
        loop.activity.enter("evaluation")
        self._fetch(time.perf_counter())
        self._begun = None
        self._stop_all_at_target(loop)

    def target_reached(self) -> bool:
        """Whether training has reached the target and is to stop there, as far as this rank knows; does not wait."""
        if self.overlap and self.overlap.known():
            self._fetch(time.perf_counter())
        return self._reached

    def _fetch(self, waiting_since: float) -> None:
        found = self.overlap.fetch() if self.overlap else None
        if found is None or self._begun is None:
            return
        scores, seconds = found
        stall = self._stall_seconds + time.perf_counter() - waiting_since
        self._emit(self._begun, scores, scores.scored, seconds, {**scores.part_seconds, "stall": stall})
        if (rating := metric_rating(scores, self.plan.metric)) is not None:
            self.rate(self._begun, rating)

    def _emit(
        self, iteration: int, scores: Scores, known: float, seconds: float, part_seconds: dict[str, float]
    ) -> None:
        plan = self.plan
        self.last_scores, self.last_iteration = scores, iteration
        self.send(
            Evaluated,
            time=known,
            iteration=iteration,
            epoch=iteration * plan.solver.global_batch_size / self.num_train_images,
            figures=scores.figures,
            box_scored=scores.box_scored,
            mask_scored=scores.mask_scored,
            keypoint_scored=scores.keypoint_scored,
            seconds=seconds,
            part_seconds=part_seconds,
            class_ap=scores.class_ap,
            validation_losses=scores.validation_losses,
            details_file=scores.details_file,
        )
        logger.info("Evaluation after %d iterations: %s", iteration, scores.figures)
        if plan.stop_at_target and all_met(scores, plan):
            self._reached = True

    def _stop_all_at_target(self, loop: TrainingLoop) -> None:
        """Ends training on all ranks where rank 0 knows that the target is reached."""
        reached = torch.tensor([float(self._reached)], device=loop.device)
        if self.plan.world_size > 1:
            dist.broadcast(reached, src=0)
        if reached.item():
            loop.stop_reason = "target"


def training_state(loop: TrainingLoop) -> dict[str, Any]:
    """All that a later start needs to go on as if nothing had happened.

    Positions in the data and random choices are functions of seed, rank and iteration, and need no state.
    """
    return {
        "model": unwrapped(loop.model).state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "scheduler": loop.scheduler.state_dict(),
        "scaler": loop.scaler.state_dict(),
        "iteration": loop.iteration,
        "stop_reason": loop.stop_reason,
    }


def rank_state(model: nn.Module) -> dict[str, float]:
    """Values of a rank's model that are not in its state dict, by module.

    Dense detectors divide their losses by a running mean of the positive anchors that this rank has seen (detectron2,
    `DenseDetector._ema_update`).
    """
    return {
        name: module.loss_normalizer
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, DenseDetector) and hasattr(module, "loss_normalizer")
    }


def restore(loop: TrainingLoop, state: dict[str, Any]) -> None:
    """Restores a state that `CheckpointHook` saved."""
    unwrapped(loop.model).load_state_dict(state["model"])
    # There may be more or fewer ranks than when it was saved.
    for name, normalizer in state["ranks"][loop.rank % len(state["ranks"])].items():
        unwrapped(loop.model).get_submodule(name).loss_normalizer = normalizer
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.scheduler.load_state_dict(state["scheduler"])
    loop.scaler.load_state_dict(state["scaler"])
    # A run that had been stopped goes on; one that had finished has nothing left to do.
    loop.stop_reason = state["stop_reason"] if state["stop_reason"] in ("target", "max_iter") else None
