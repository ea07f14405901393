"""What the loop does between windows of steps: tell progress, evaluate, keep checkpoints."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainers.checkpoints import CheckpointStore
from trainers.contract.events import Evaluated, StepsDone
from trainers.contract.plan import TrialPlan
from trainers.evaluation import Evaluator, Scores
from trainers.loop import StepWindow, TrainingLoop, peak_memory_gib
from trainers.speedups.overlap import Overlap

logger = logging.getLogger(__name__)

Send = Callable[..., None]
"""Sends an event of the given class with the given fields, without waiting."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def share_buffers(model: nn.Module, world_size: int) -> None:
    """Gives every rank rank 0's buffers: running statistics of batch norm drift apart while ranks train."""
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

    def due(self, iteration: int, ending: bool) -> bool:
        """Every log period."""
        return iteration % self.plan.log_period == 0 or ending

    def run(self, loop: TrainingLoop, window: StepWindow) -> None:
        """Sends the window."""
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
            step_part_seconds={name: tuple(each) for name, each in window.part_seconds.items()},
            losses=window.losses if loop.rank == 0 else {},
            learning_rate=window.learning_rate,
            peak_memory_gib=peak_memory_gib(loop.device),
        )
        if loop.rank == 0:
            # The storage has moved on to the next iteration; detectron2 prints before it does.
            loop.storage.iter -= 1
            self.printer.write()
            loop.storage.iter += 1
        if loop.stop_reason and self._num_steps:
            self._log_speed()

    def _log_speed(self) -> None:
        """The closing line of detectron2's logs, warm-up and hooks left out, on this rank."""
        took = datetime.timedelta(seconds=int(self._seconds))
        per_iteration = self._seconds / self._num_steps
        logger.info("Overall training speed: %d iterations in %s (%.4f s / it)", self._num_steps, took, per_iteration)


class EvaluationHook:
    """Evaluates at the plan's period and at the end, and stops training at the target where the plan says so.

    With `overlapped_evaluation`, rank 0 hands the weights on and trains; what is found comes later. The last evaluation
    is made by all ranks in any case: there is nothing left to train beside it.

    Args:
        plan: The trial.
        evaluator: This rank's share.
        num_train_images: Images of an epoch.
        send: Sends an event.
        rate: Told the iteration and the box AP of an evaluation that was made beside training.

    Attributes:
        last_scores: What the last evaluation found (rank 0).
        last_iteration: When that was.
        beside: The process that evaluates beside training; None on other ranks, and where training stands still.
    """

    every_window = False

    def __init__(
        self,
        plan: TrialPlan,
        evaluator: Evaluator,
        num_train_images: int,
        send: Send,
        rate: Callable[[int, float], None],
    ) -> None:
        self.plan, self.evaluator, self.num_train_images, self.send = plan, evaluator, num_train_images, send
        self.rate = rate
        self.last_scores: Scores | None = None
        self.last_iteration = 0
        self.beside: Overlap | None = None
        self._left_out = self._reached = False
        self._begun = -1  # the iteration whose model was last handed on; all ranks know it
        self._stall = 0.0

    def due(self, iteration: int, ending: bool) -> bool:
        """At multiples of the period, and after the last iteration where the plan asks for it."""
        solver = self.plan.solver
        periodic = solver.eval_period > 0 and iteration % solver.eval_period == 0
        return periodic or (solver.evaluate_at_end and iteration == solver.max_iter)

    def run(self, loop: TrainingLoop, window: StepWindow) -> None:
        """Evaluates, or hands the model on to be evaluated."""
        self._left_out = loop.stop_reason in ("interrupted", "preempted")
        if self._left_out:
            return
        last = loop.iteration == self.plan.solver.max_iter
        self.settle(loop)
        if loop.stop_reason == "target" and not last:
            return
        loop.now.enter("evaluation")
        started = time.perf_counter()
        share_buffers(loop.model, self.plan.world_size)
        if self.plan.recipe.overlapped_evaluation and not last:
            self._begun = loop.iteration
            if self.beside:
                self.beside.begin(unwrapped(loop.model))
            self._stall = time.perf_counter() - started
            return
        scores = self.evaluator.run(unwrapped(loop.model))
        if loop.rank == 0:
            self._emit(loop.iteration, scores, time.time(), time.perf_counter() - started, scores.part_seconds)
        self._agree(loop)

    def owed(self, iteration: int) -> bool:
        """Whether an evaluation of this iteration is missing: training ends here, or it is still being made.

        The next start from a checkpoint of it makes it first.
        """
        return self._left_out or self._begun == iteration

    def settle(self, loop: TrainingLoop) -> None:
        """Waits for the evaluation of an older iteration that is still being made; all ranks call it together."""
        if not 0 <= self._begun < loop.iteration:
            return
        loop.now.enter("evaluation")
        started = time.perf_counter()
        if self.beside:
            self._fetch(started)
        self._begun = -1
        self._agree(loop)

    def target_reached(self) -> bool:
        """Whether training has reached the target and is to stop there, as far as this rank knows; does not wait."""
        if self.beside and self.beside.known():
            self._fetch(time.perf_counter())
        return self._reached

    def _fetch(self, waiting_since: float) -> None:
        found = self.beside.fetch() if self.beside else None
        if found:
            scores, seconds = found
            stall = self._stall + time.perf_counter() - waiting_since
            known = scores.mask_scored or scores.box_scored
            self._emit(self._begun, scores, known, seconds, {**scores.part_seconds, "stall": stall})
            if (box_ap := scores.figures.get("box_ap")) is not None:
                self.rate(self._begun, box_ap)

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
            seconds=seconds,
            part_seconds=part_seconds,
        )
        logger.info("Evaluation after %d iterations: %s", iteration, scores.figures)
        wanted = {"box_ap": plan.target_box_ap, "mask_ap": plan.target_mask_ap}
        targets = {name: target for name, target in wanted.items() if target is not None}
        met = bool(targets) and all((scores.figures.get(name) or 0.0) >= target for name, target in targets.items())
        self._reached = self._reached or (met and plan.stop_at_target)

    def _agree(self, loop: TrainingLoop) -> None:
        """Ends training on all ranks where rank 0 has seen the target reached."""
        reached = torch.tensor([float(self._reached)], device=loop.device)
        if self.plan.world_size > 1:
            dist.broadcast(reached, src=0)
        if reached.item():
            loop.stop_reason = "target"


class CheckpointHook:
    """Takes a checkpoint at the plan's period and whenever training ends.

    Args:
        plan: The trial.
        store: Where to.
        evaluation: Knows whether the model has just been scored.
        flush: Waits until this rank's events so far have left the process: no checkpoint is newer than what is told.
    """

    every_window = False

    def __init__(
        self, plan: TrialPlan, store: CheckpointStore, evaluation: EvaluationHook, flush: Callable[[], None]
    ) -> None:
        self.plan, self.store, self.evaluation, self.flush = plan, store, evaluation, flush

    def due(self, iteration: int, ending: bool) -> bool:
        """At multiples of the period, and at the end."""
        period = self.plan.solver.checkpoint_period
        return ending or (period > 0 and iteration % period == 0)

    def run(self, loop: TrainingLoop, window: StepWindow) -> None:
        """Takes it on rank 0, with what the other ranks alone know.

        An evaluation of an older iteration is waited for: a start from this checkpoint could not make it again.
        """
        self.evaluation.settle(loop)
        loop.now.enter("checkpoint")
        started = time.perf_counter()
        self.flush()
        share_buffers(loop.model, self.plan.world_size)
        ranks = comm.gather(rank_state(loop.model), dst=0)
        if loop.rank == 0:
            state = training_state(loop) | {"ranks": ranks, "evaluation_owed": self.evaluation.owed(loop.iteration)}
            scores = self.evaluation.last_scores if self.evaluation.last_iteration == loop.iteration else None
            score = scores.figures.get("box_ap") if scores else None
            self.store.save(loop.iteration, state, score, since=started)


def training_state(loop: TrainingLoop) -> dict[str, Any]:
    """All that a later start needs to go on as if nothing had happened.

    Positions in the data and random choices are functions of seed, rank and iteration, so the iteration stands for
    them.
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
    """What a rank's model keeps outside its state dict, by module.

    Dense detectors divide their losses by a running mean of the positive anchors that this rank has seen (detectron2,
    `DenseDetector._ema_update`).
    """
    return {
        name: module.loss_normalizer
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, DenseDetector) and hasattr(module, "loss_normalizer")
    }


def restore(loop: TrainingLoop, state: dict[str, Any]) -> None:
    """Puts back a state that the checkpoint hook saved."""
    unwrapped(loop.model).load_state_dict(state["model"])
    # There may be more or fewer ranks than there were.
    for name, normalizer in state["ranks"][loop.rank % len(state["ranks"])].items():
        unwrapped(loop.model).get_submodule(name).loss_normalizer = normalizer
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.scheduler.load_state_dict(state["scheduler"])
    loop.scaler.load_state_dict(state["scaler"])
    # A run that had been stopped goes on; one that had finished has nothing left to do.
    loop.stop_reason = state["stop_reason"] if state["stop_reason"] in ("target", "max_iter") else None
