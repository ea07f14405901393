"""The hook that evaluates, while training waits or concurrently, and ends training by what has been found."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from trainers.contract import clock
from trainers.contract.events import Evaluated, EvaluationLost, StopReason
from trainers.contract.patience import Patience
from trainers.contract.plan import TrialPlan
from trainers.contract.targets import all_met, metric_rating
from trainers.evaluation import Evaluator, Scores
from trainers.evaluation_server import EvaluatorLostError
from trainers.hooks import Send, share_buffers, unwrapped
from trainers.loop import TrainingLoop
from trainers.overlap import Overlap
from trainers.pulse import Activity

logger = logging.getLogger(__name__)

EVALUATION_PENDING_KEY = "evaluation_owed"
"""Key of a checkpoint's state; the name that the first version wrote, so that its runs can still be resumed."""

EVALUATIONS_KEY = "evaluations_in_progress"
"""Key of a checkpoint's state: evaluations of older iterations, with their weights; absent where there were none."""

PATIENCE_KEY = "patience"
"""Key of a checkpoint's state: of `Patience`; absent without `protocol.patience`."""

ENDS: tuple[StopReason | None, ...] = (None, "patience", "target")
"""Why evaluations end training, by the number that rank 0 tells the others."""


class EvaluationHook:
    """Evaluates at the plan's period and at the end, and ends training at the target or without improvement.

    Where the plan evaluates concurrently, rank 0 hands snapshots to another process, and all go on training; the scores
    come later, and `rate` is called with their iteration and rating. The last evaluation is made by all ranks in any
    case, since there is nothing left to train meanwhile.

    Args:
        plan: The trial.
        models: What each evaluation evaluates, not wrapped for several workers: one, or the average of the weights and
            then the weights, by whose figures everything goes.
        evaluator: Evaluates while training waits.
        num_train_images: Those of an epoch.
        send: Sends an event.
        rate: Called with the iteration and the rating of an evaluation that is known after its checkpoint was taken.
        activity: Where a failure happened, if it did not in the training loop.
        prepare: Called with the iteration before each evaluation, one after the other.
    """

    every_window = False

    def __init__(
        self,
        plan: TrialPlan,
        models: Sequence[nn.Module],
        evaluator: Evaluator,
        num_train_images: int,
        send: Send,
        rate: Callable[[int, float], None],
        activity: Activity,
        prepare: Sequence[Callable[[int], None]] = (),
    ) -> None:
        self.plan, self.models, self.evaluator, self.num_train_images = plan, models, evaluator, num_train_images
        self.send, self.rate, self.activity, self.prepare = send, rate, activity, prepare
        self.last_scores: Scores | None = None
        """Scores of the last evaluation (rank 0), that of `last_iteration`."""
        self.last_iteration = 0
        self.overlap: Overlap | None = None
        """Evaluates concurrently; None on other ranks, and where training waits for evaluations."""
        self.patience = Patience(plan.patience, plan.min_improvement)
        """Knows what has been evaluated (rank 0)."""
        self._skipped = self._reached = False

    def due(self, iteration: int, ending: bool) -> bool:  # noqa: ARG002 - a hook's interface
        """At multiples of the period, and after the last iteration where the plan asks for it."""
        solver = self.plan.solver
        periodic = solver.eval_period > 0 and iteration % solver.eval_period == 0
        return periodic or (solver.evaluate_at_end and iteration == solver.max_iter)

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state that `CheckpointHook` saved."""
        if PATIENCE_KEY in state:
            self.patience.restore(state[PATIENCE_KEY])

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
        for prepare in self.prepare:
            prepare(loop.iteration)
            loop.activity.enter("evaluation")  # it has a time-out of its own
        prepared = time.perf_counter() - started
        for model in dict.fromkeys((unwrapped(loop.model), *self.models)):
            share_buffers(model, self.plan.world_size)
        if not waits:
            if self.overlap:
                self.overlap.begin(loop.iteration, self.models, since=started)
            return
        scores = _merged([self.evaluator.run(model, loop.iteration) for model in self.models])
        parts = ({"precise_bn": prepared} if self.prepare else {}) | scores.part_seconds
        if loop.rank == 0:
            self._emit(loop.iteration, scores, clock.now(), time.perf_counter() - started, parts)
        self._end_all(loop)

    def make_up(self, loop: TrainingLoop) -> None:
        """Makes the evaluation that was left out when the checkpoint was taken from which training goes on."""
        self.run(loop)
        if self.last_scores and self.last_iteration == loop.iteration:
            self._rate(loop.iteration, self.last_scores)

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

    def wanted_end(self) -> Literal["patience", "target"] | None:
        """Why training is to end by what has been found, as far as this rank knows; does not wait."""
        self._fetch()
        return self._end

    def take_found(self, loop: TrainingLoop, *, wait: bool = False) -> None:
        """Takes what concurrent evaluations have found, and ends training on all ranks where that is to end it.

        All ranks call it together: before a checkpoint, which must know of the end, and before an evaluation.

        Args:
            loop: The loop.
            wait: Whether to wait for the evaluations in progress.
        """
        loop.activity.enter("evaluation")
        started = time.perf_counter()
        # Each evaluation is a section of its own, on all ranks: the time-out is that of one.
        while wait and self._from_rank_0(loop, float(self.overlap is not None and self.overlap.wait())):
            loop.activity.enter("evaluation")
        self._fetch(time.perf_counter() - started)
        self._end_all(loop)

    def _fetch(self, waited: float = 0.0) -> None:
        """Emits what has been found since the last call, for which training was stalled for `waited` seconds.

        One whose processes were lost is left out where the workers will make the last one: patience and a target have
        a figure then. Elsewhere training ends with it, as with what an evaluation itself raised.

        Raises:
            Exception: Whatever ended an evaluation.
        """
        jobs = self.overlap.fetch() if self.overlap else []
        for job in jobs:
            stall = job.stall_seconds + (waited if job is jobs[-1] else 0.0)
            if isinstance(job.error, EvaluatorLostError) and self.due(self.plan.solver.max_iter, ending=True):
                message = f"{job.error}; it is left out"
                fields = {"iteration": job.iteration, "message": message, "left_out": job.left_out}
                self.send(EvaluationLost, **fields, stall_seconds=stall)
                logger.warning("%s", message)
                continue
            if job.error:
                # The failure is reported where it happened, not where it was found.
                self.activity.section, self.activity.iteration = "evaluation", job.iteration
                raise job.error
            scores = _merged(job.scores)
            parts = {**scores.part_seconds, "stall": stall}
            self._emit(job.iteration, scores, scores.scored, job.seconds, parts, job.left_out, job.num_lost)
            self._rate(job.iteration, scores)

    def _rate(self, iteration: int, scores: Scores) -> None:
        if (rating := metric_rating(scores, self.plan.metric)) is not None:
            self.rate(iteration, rating)

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
        self.patience.add(iteration, metric_rating(scores, plan.metric))

    @property
    def _end(self) -> Literal["patience", "target"] | None:
        return "target" if self._reached else "patience" if self.patience.exhausted else None

    def _end_all(self, loop: TrainingLoop) -> None:
        """Ends training on all ranks where rank 0 knows a reason."""
        reason = ENDS[int(self._from_rank_0(loop, float(ENDS.index(self._end))))]
        if reason == "target" or (reason and loop.stop_reason != "max_iter"):  # at the end, nothing is left out
            loop.stop_reason = reason

    def _from_rank_0(self, loop: TrainingLoop, number: float) -> float:
        """Rank 0's number, on all ranks, which call it together."""
        shared = torch.tensor([number], device=loop.device)
        if self.plan.world_size > 1:
            dist.broadcast(shared, src=0)
        return float(shared.item())


def _merged(scores: Sequence[Scores]) -> Scores:
    """The scores of the last model, with the figures of those before it under `ema_…`."""
    *averages, own = scores
    figures = {f"ema_{name}": value for each in averages for name, value in each.figures.items()}
    parts = {name: sum(each.part_seconds.get(name, 0.0) for each in scores) for name in own.part_seconds}
    return dataclasses.replace(own, figures=own.figures | figures, part_seconds=parts)
