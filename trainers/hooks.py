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
from trainers.contract import Evaluated, StepsDone, TrialPlan
from trainers.evaluation import Evaluator, Scores
from trainers.loop import StepWindow, TrainingLoop, peak_memory_gib

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

    Attributes:
        last_scores: What the last evaluation found (rank 0).
        last_iteration: When that was.
        owed: Whether an evaluation was left out because training had to end there; the next start makes it.
    """

    every_window = False

    def __init__(self, plan: TrialPlan, evaluator: Evaluator, num_train_images: int, send: Send) -> None:
        self.plan, self.evaluator, self.num_train_images, self.send = plan, evaluator, num_train_images, send
        self.last_scores: Scores | None = None
        self.last_iteration = 0
        self.owed = False

    def due(self, iteration: int, ending: bool) -> bool:
        """At multiples of the period, and after the last iteration where the plan asks for it."""
        solver = self.plan.solver
        periodic = solver.eval_period > 0 and iteration % solver.eval_period == 0
        return periodic or (solver.evaluate_at_end and iteration == solver.max_iter)

    def run(self, loop: TrainingLoop, window: StepWindow) -> None:
        """Evaluates on all ranks; rank 0 scores, and all learn whether to stop."""
        self.owed = loop.stop_reason in ("interrupted", "preempted")
        if self.owed:
            return
        loop.now.enter("evaluation")
        started = time.perf_counter()
        share_buffers(loop.model, self.plan.world_size)
        scores = self.evaluator.run(unwrapped(loop.model))
        reached = torch.tensor([float(self._reached(scores))], device=loop.device)
        if self.plan.world_size > 1:
            dist.broadcast(reached, src=0)
        if loop.rank == 0:
            self.last_scores, self.last_iteration = scores, loop.iteration
            self.send(
                Evaluated,
                iteration=loop.iteration,
                epoch=loop.iteration * self.plan.solver.global_batch_size / self.num_train_images,
                figures=scores.figures,
                box_scored=scores.box_scored,
                mask_scored=scores.mask_scored,
                seconds=time.perf_counter() - started,
                part_seconds=scores.part_seconds,
            )
            logger.info("Evaluation after %d iterations: %s", loop.iteration, scores.figures)
        if reached.item() and self.plan.stop_at_target:
            loop.stop_reason = "target"

    def _reached(self, scores: Scores) -> bool:
        plan = self.plan
        wanted = {"box_ap": plan.target_box_ap, "mask_ap": plan.target_mask_ap}
        targets = {name: target for name, target in wanted.items() if target is not None}
        found = scores.figures
        return bool(targets) and all((found.get(name) or 0.0) >= target for name, target in targets.items())


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
        """Takes it on rank 0, with what the other ranks alone know."""
        loop.now.enter("checkpoint")
        started = time.perf_counter()
        self.flush()
        share_buffers(loop.model, self.plan.world_size)
        ranks = comm.gather(rank_state(loop.model), dst=0)
        if loop.rank == 0:
            state = training_state(loop) | {"ranks": ranks, "evaluation_owed": self.evaluation.owed}
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
    for name, normalizer in state["ranks"][loop.rank].items():
        unwrapped(loop.model).get_submodule(name).loss_normalizer = normalizer
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.scheduler.load_state_dict(state["scheduler"])
    loop.scaler.load_state_dict(state["scaler"])
    # A run that had been stopped goes on; one that had finished has nothing left to do.
    loop.stop_reason = state["stop_reason"] if state["stop_reason"] in ("target", "max_iter") else None
