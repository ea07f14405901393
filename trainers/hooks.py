"""What the loop does between windows of steps: report progress, evaluate; and the state that checkpoints hold."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils.events import CommonMetricPrinter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainers.batching import ShapesMet
from trainers.contract import clock
from trainers.contract.events import Evaluated, StepsDone
from trainers.contract.plan import TrialPlan
from trainers.contract.targets import all_met, metric_rating
from trainers.evaluation import Evaluator, Scores
from trainers.evaluation_server import restore_values
from trainers.loop import TrainingLoop
from trainers.machine import peak_memory_gib
from trainers.overlap import Overlap
from trainers.pulse import Activity

logger = logging.getLogger(__name__)

Send = Callable[..., None]
"""Sends an event of the given class with the given fields, without waiting."""

EVALUATION_PENDING_KEY = "evaluation_owed"
"""Key of a checkpoint's state; the name that the first version wrote, so that its runs can still be resumed."""

EVALUATIONS_KEY = "evaluations_in_progress"
"""Key of a checkpoint's state: evaluations of older iterations, with their weights; absent where there were none."""


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

    Where the plan evaluates concurrently, rank 0 hands snapshots to another process, and all go on training; the scores
    come later, and `rate` is called with their iteration and rating. The last evaluation is made by all ranks in any
    case, since there is nothing left to train meanwhile.

    Args:
        plan: The trial.
        evaluator: Evaluates while training waits.
        num_train_images: Those of an epoch.
        send: Sends an event.
        rate: Called with the iteration and the rating of a concurrent evaluation.
        activity: Where a failure happened, if it did not in the training loop.
        prepare: Called with the iteration before the model is evaluated.
    """

    every_window = False

    def __init__(
        self,
        plan: TrialPlan,
        evaluator: Evaluator,
        num_train_images: int,
        send: Send,
        rate: Callable[[int, float], None],
        activity: Activity,
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        self.plan, self.evaluator, self.num_train_images = plan, evaluator, num_train_images
        self.send, self.rate, self.activity, self.prepare = send, rate, activity, prepare
        self.last_scores: Scores | None = None
        """Scores of the last evaluation (rank 0), that of `last_iteration`."""
        self.last_iteration = 0
        self.overlap: Overlap | None = None
        """Evaluates concurrently; None on other ranks, and where training waits for evaluations."""
        self._skipped = self._reached = False

    def due(self, iteration: int, ending: bool) -> bool:  # noqa: ARG002 - a hook's interface
        """At multiples of the period, and after the last iteration where the plan asks for it."""
        solver = self.plan.solver
        periodic = solver.eval_period > 0 and iteration % solver.eval_period == 0
        return periodic or (solver.evaluate_at_end and iteration == solver.max_iter)

    def run(self, loop: TrainingLoop) -> None:
        """Evaluates, or begins a concurrent evaluation."""
        self._skipped = loop.stop_reason in ("interrupted", "preempted")
        if self._skipped:
            return
        last = loop.iteration == self.plan.solver.max_iter
        waits = last or not self.plan.evaluates_concurrently
        self.take_found(loop, wait=waits)
        if loop.stop_reason and not last:
            return
        loop.activity.enter("evaluation")
        started = time.perf_counter()
        if self.prepare:
            self.prepare(loop.iteration)
            loop.activity.enter("evaluation")  # it has a time-out of its own
        prepared = time.perf_counter() - started
        share_buffers(loop.model, self.plan.world_size)
        models = evaluated_models(loop)
        if not waits:
            if self.overlap:
                self.overlap.begin(loop.iteration, models, since=started)
            return
        scores = self.evaluator.run(models[0], loop.iteration)
        parts = ({"precise_bn": prepared} if self.prepare else {}) | scores.part_seconds
        if loop.rank == 0:
            self._emit(loop.iteration, scores, clock.now(), time.perf_counter() - started, parts)
        self._stop_all_at_target(loop)

    def pending(self, iteration: int) -> bool:
        """Whether an evaluation of this iteration is missing (rank 0): a stop left it out, or it is still in progress.

        The next start from this iteration's checkpoint makes it first.
        """
        return self._skipped or (self.overlap is not None and iteration in self.overlap.in_progress())

    def awaited(self) -> set[int]:
        """Iterations whose checkpoints are to be rated later (rank 0)."""
        return self.overlap.in_progress() if self.overlap else set()

    def saved(self, loop: TrainingLoop) -> list[dict[str, Any]]:
        """Evaluations of older iterations in progress (rank 0), for `Overlap.begin_again` after a start from here."""
        if self.overlap is None or loop.stop_reason not in (None, "interrupted", "preempted"):
            return []
        return self.overlap.saved(loop.iteration)

    def target_reached(self) -> bool:
        """Whether training has reached the target and is to stop there, as far as this rank knows; does not wait."""
        self._fetch()
        return self._reached

    def take_found(self, loop: TrainingLoop, *, wait: bool = False) -> None:
        """Takes what concurrent evaluations have found, and ends training on all ranks where it meets the target.

        All ranks call it together: before a checkpoint, which must know of the end, and before an evaluation.

        Args:
            loop: The loop.
            wait: Whether to wait for the evaluations in progress.
        """
        loop.activity.enter("evaluation")
        started = time.perf_counter()
        if self.overlap and wait:
            self.overlap.wait()
        self._fetch(time.perf_counter() - started)
        self._stop_all_at_target(loop)

    def _fetch(self, waited: float = 0.0) -> None:
        """Emits what has been found since the last call, for which training was stalled for `waited` seconds.

        Raises:
            Exception: Whatever ended an evaluation.
        """
        jobs = self.overlap.fetch() if self.overlap else []
        for job in jobs:
            if job.error:
                # The failure is reported where it happened, not where it was found.
                self.activity.section, self.activity.iteration = "evaluation", job.iteration
                raise job.error
            stall = job.stall_seconds + (waited if job is jobs[-1] else 0.0)
            scores = job.scores[0]
            parts = {**scores.part_seconds, "stall": stall}
            self._emit(job.iteration, scores, scores.scored, job.seconds, parts, job.left_out, job.num_lost)
            if (rating := metric_rating(scores, self.plan.metric)) is not None:
                self.rate(job.iteration, rating)

    def _emit(
        self,
        iteration: int,
        scores: Scores,
        known: float,
        seconds: float,
        part_seconds: dict[str, float],
        left_out: tuple[int, ...] = (),
        num_lost: int = 0,
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
            left_out=left_out,
            num_lost=num_lost,
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


def evaluated_models(loop: TrainingLoop) -> list[nn.Module]:
    """What an evaluation evaluates, not wrapped for several workers."""
    return [unwrapped(loop.model)]


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


def restore(loop: TrainingLoop, state: dict[str, Any]) -> None:
    """Restores a state that `CheckpointHook` saved."""
    unwrapped(loop.model).load_state_dict(state["model"])
    # There may be more or fewer ranks than when it was saved.
    restore_values(unwrapped(loop.model), state["ranks"][loop.rank % len(state["ranks"])])
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.scheduler.load_state_dict(state["scheduler"])
    loop.scaler.load_state_dict(state["scaler"])
    # A run that had been stopped goes on; one that had finished has nothing left to do.
    loop.stop_reason = state["stop_reason"] if state["stop_reason"] in ("target", "max_iter") else None
