"""The hook that takes checkpoints, at a period that is given or, with `checkpoint_period: auto`, worth their cost."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.utils import comm

from trainers.checkpoints import CheckpointStore
from trainers.contract.checkpoint_interval import advised_checkpoint_seconds, default_mtbf_seconds
from trainers.contract.plan import TrialPlan
from trainers.contract.targets import metric_rating
from trainers.evaluation_hook import EVALUATION_PENDING_KEY, EVALUATIONS_KEY, PATIENCE_KEY, EvaluationHook
from trainers.evaluation_server import rank_state
from trainers.hooks import share_buffers, training_state, unwrapped
from trainers.loop import TrainingLoop

logger = logging.getLogger(__name__)


class CheckpointHook:
    """Takes a checkpoint at the plan's period and whenever training ends.

    With `auto_checkpoints`, the plan's period is that of the first one, which shows what one costs; after each, rank 0
    sets the next for all ranks. What is trained does not depend on when checkpoints are taken.

    Args:
        plan: The trial.
        start: Iteration at which training starts.
        num_nodes: Hosts of the workers.
        store: Where to.
        evaluation: Knows whether the model has just been scored.
        flush: Waits until this rank's events so far have left the process: no checkpoint is newer than the events.
    """

    every_window = False

    def __init__(
        self,
        plan: TrialPlan,
        start: int,
        num_nodes: int,
        store: CheckpointStore,
        evaluation: EvaluationHook,
        flush: Callable[[], None],
    ) -> None:
        self.plan, self.store, self.evaluation, self.flush = plan, store, evaluation, flush
        self._mtbf_seconds = plan.mtbf_hours * 3600 if plan.mtbf_hours else default_mtbf_seconds(num_nodes)
        self._next = start + plan.solver.checkpoint_period
        self._stalls: list[float] = []  # of the checkpoints so far, in seconds; on rank 0

    def due(self, iteration: int, ending: bool) -> bool:
        """At multiples of the period or when the one that was set is over, at the end, and as planned for the best."""
        if self.plan.keep_best and self.evaluation.due(iteration, ending):
            return True
        if self.plan.solver.auto_checkpoints:
            return ending or iteration >= self._next
        period = self.plan.solver.checkpoint_period
        return ending or (period > 0 and iteration % period == 0)

    def run(self, loop: TrainingLoop) -> None:
        """Takes it on rank 0, with the local state of the other ranks.

        Evaluations of older iterations that are in progress are part of it: a start from it makes them again. At the
        end of the schedule they are waited for.
        """
        self.evaluation.take_found(loop, wait=loop.iteration == self.plan.solver.max_iter)
        loop.activity.enter("checkpoint")
        started = time.perf_counter()
        self.flush()
        share_buffers(loop.model, self.plan.world_size)
        ranks = comm.gather(rank_state(unwrapped(loop.model)), dst=0)
        if loop.rank == 0:
            pending = self.evaluation.pending(loop.iteration)
            state = training_state(loop) | {"ranks": ranks, EVALUATION_PENDING_KEY: pending}
            if evaluations := self.evaluation.saved(loop):
                state[EVALUATIONS_KEY] = evaluations
            if self.plan.patience:
                state[PATIENCE_KEY] = self.evaluation.patience.state()
            scores = self.evaluation.last_scores if self.evaluation.last_iteration == loop.iteration else None
            score = metric_rating(scores, self.plan.metric) if scores else None
            ending = loop.stop_reason is not None
            self.store.save(loop.iteration, state, score, started, self.evaluation.awaited(), ending=ending)
            self._stalls.append(time.perf_counter() - started)
        if self.plan.solver.auto_checkpoints:
            self._set_next(loop)

    def _set_next(self, loop: TrainingLoop) -> None:
        """Sets when the next is due: the same iteration on all ranks, from what rank 0 measured."""
        period = torch.zeros(1, dtype=torch.int64, device=loop.device)
        if loop.rank == 0:
            stall, steps = statistics.fmean(self._stalls), loop.window.step_seconds
            seconds = advised_checkpoint_seconds(stall, self._mtbf_seconds)
            period += max(1, round(seconds / statistics.fmean(steps)))
            logger.info(
                "A checkpoint stalls training for %.3f s, and %.3g h are expected between failures: the next one after "
                "%.3g s of training, %d iterations.", stall, self._mtbf_seconds / 3600, seconds, period.item(),
            )  # fmt: skip
        if self.plan.world_size > 1:
            dist.broadcast(period, src=0)
        self._next = loop.iteration + int(period.item())
