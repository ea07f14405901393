"""Evaluates snapshots of the weights while training goes on: one at a time, each exactly once, in other processes.

One evaluation is in progress and at most one waits for it. Where another is due before that, its snapshot takes the
place of the waiting one, which is left out: training never waits for a slow evaluation. A process that is lost is
replaced, and evaluates the same snapshot again. Snapshots whose scores are not known yet are part of a checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainers.contract.memory import is_out_of_memory
from trainers.contract.plan import TrialPlan
from trainers.evaluation import Scores
from trainers.evaluation_server import (
    Evaluating,
    EvaluatingProcess,
    EvaluatorLostError,
    Outcome,
    Values,
    num_bytes,
    rank_state,
    views,
)

logger = logging.getLogger(__name__)

MAX_STARTS = 3
"""How often one evaluation is begun where its process is lost, or its memory is exhausted, before it is given up."""

Start = Callable[[TrialPlan], Evaluating]
"""Starts a process that evaluates, without waiting for it."""


@dataclass(slots=True)
class Job:
    """One evaluation."""

    iteration: int
    values: list[Values]
    """Of each model, besides the weights."""
    block: int
    """Which block of memory has its weights, until it is done."""
    copied: torch.cuda.Event | None
    """After which they are there; None for now."""
    left_out: tuple[int, ...] = ()
    """Iterations of the evaluations that were left out for it."""
    stall_seconds: float = 0.0
    """How long training was stalled for it and for those."""
    num_lost: int = 0
    """How often its process was lost."""
    seconds: float = 0.0
    scores: list[Scores] = field(default_factory=list)
    """Of each model."""
    error: Exception | None = None
    """What ended it for good; then there are no scores."""


class Overlap:
    """Rank 0's end: takes snapshots, and has their scores later. Its methods are for one thread.

    Args:
        plan: The trial.
        models: What each evaluation evaluates: models of one kind, not wrapped for several workers.
        start: Starts the process; called again whenever one is lost.
    """

    def __init__(self, plan: TrialPlan, models: Sequence[nn.Module], start: Start) -> None:
        tensors = _tensors(models)
        self._device = tensors[0].device
        self._on_gpu = self._device.type == "cuda"
        # Page-locked memory is reached by a GPU's copies without anybody waiting for them. Written once, so that the
        # first snapshot does not wait for the system to provide it.
        size = num_bytes(tensors)
        self._blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=self._on_gpu).zero_() for _ in range(2)]
        self._views = [views(block, tensors) for block in self._blocks]
        self._plan, self._start = plan, start
        self._changed = threading.Condition()
        self._current: Job | None = None
        self._waiting: Job | None = None
        self._done: list[Job] = []
        self._closed = False
        self._process: Evaluating | None = start(plan)  # sets itself up while training begins
        self._thread = threading.Thread(target=self._run, name="evaluation", daemon=True)
        self._thread.start()

    def begin(self, iteration: int, models: Sequence[nn.Module], since: float) -> None:
        """Takes a snapshot and begins to evaluate it, or has it wait for the one in progress.

        Args:
            iteration: Iterations trained.
            models: As before.
            since: When training began to be stalled for it (`time.perf_counter`).
        """
        with self._changed:
            job = self._new(iteration, [rank_state(model) for model in models])
            if replaced := self._waiting:
                job.left_out, job.stall_seconds = (*replaced.left_out, replaced.iteration), replaced.stall_seconds
                logger.warning(
                    "The evaluation after %d iterations is left out: an older one is still in progress.",
                    replaced.iteration,
                )
            with torch.no_grad():
                for copy, tensor in zip(self._views[job.block], _tensors(models), strict=True):
                    copy.copy_(tensor, non_blocking=True)  # on a GPU, training's next steps follow in the same stream
            if self._on_gpu:
                job.copied = torch.cuda.Event(blocking=True)
                job.copied.record()
            job.stall_seconds += time.perf_counter() - since
            self._submit(job)

    def begin_again(self, saved: Sequence[dict[str, Any]]) -> None:
        """Begins the evaluations that `saved` returned when a checkpoint was taken."""
        with self._changed:
            for fields in saved:
                values = dict(fields)
                weights = values.pop("weights")
                job = self._new(values.pop("iteration"), values.pop("values"))
                job.left_out, job.stall_seconds = tuple(values["left_out"]), values["stall_seconds"]
                self._blocks[job.block].copy_(weights)
                self._submit(job)

    def saved(self, iteration: int) -> list[dict[str, Any]]:
        """Evaluations of older iterations than this whose scores are not known yet, for a checkpoint.

        What has been done has to be fetched before. The weights are not copied.
        """
        with self._changed:
            jobs = [job for job in (*self._done, self._current, self._waiting) if job and job.iteration < iteration]
        for job in jobs:
            if job.copied:
                job.copied.synchronize()
        names = ("iteration", "values", "left_out", "stall_seconds")
        return [{name: getattr(job, name) for name in names} | {"weights": self._blocks[job.block]} for job in jobs]

    def in_progress(self) -> set[int]:
        """Iterations of all evaluations that have not been fetched."""
        with self._changed:
            return {job.iteration for job in (*self._done, self._current, self._waiting) if job}

    def fetch(self) -> list[Job]:
        """Evaluations that have ended since the last call, in their order; does not wait."""
        with self._changed:
            done, self._done = self._done, []
        return done

    def wait(self) -> bool:
        """Waits until the evaluation in progress has ended or is begun again, which `timeouts.evaluation` bounds.

        Returns:
            Whether one is in progress then.
        """
        with self._changed:
            job, num_lost = self._current, self._current.num_lost if self._current else 0
            self._changed.wait_for(lambda: job is None or self._current is not job or job.num_lost > num_lost)
            return self._current is not None

    def close(self) -> None:
        """Ends the process, in the middle of its work where there is any."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._end_process()
        self._thread.join()

    def _new(self, iteration: int, values: list[Values]) -> Job:
        return Job(iteration, values, block=1 - self._current.block if self._current else 0, copied=None)

    def _submit(self, job: Job) -> None:
        if self._current:
            self._waiting = job
        else:
            self._current = job
            self._changed.notify_all()

    def _run(self) -> None:
        if self._on_gpu:
            torch.cuda.set_device(self._device)  # each thread has a current one: lost processes are replaced here
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._current is not None)
                job = self._current
            if self._closed or job is None:
                return
            try:
                job.scores, job.seconds = self._evaluate(job)
            except Exception as error:  # noqa: BLE001 - whoever fetches it raises it
                job.error = error
            with self._changed:
                self._done.append(job)
                self._current, self._waiting = self._waiting, None
                self._changed.notify_all()

    def _evaluate(self, job: Job) -> Outcome:
        if job.copied:
            job.copied.synchronize()
        while True:
            try:
                return self._living_process().evaluate(job.iteration, job.values, self._blocks[job.block].numpy())
            except Exception as error:
                self._end_process()
                lost = isinstance(error, EvaluatorLostError)
                if self._closed or not (lost or is_out_of_memory(error)):
                    raise
                with self._changed:
                    job.num_lost += 1
                    self._changed.notify_all()
                what = f"the evaluation after {job.iteration} iterations was lost: {error}"
                if job.num_lost == MAX_STARTS:
                    if not lost:
                        raise
                    raise EvaluatorLostError(f"{what}; {MAX_STARTS} times in all") from error
                logger.warning("%s; it is begun again in a new process", what)

    def _living_process(self) -> Evaluating:
        with self._changed:
            if self._closed:
                raise EvaluatorLostError("training has ended")
            if self._process is None:
                self._process = self._start(self._plan)
            return self._process

    def _end_process(self) -> None:
        with self._changed:
            process, self._process = self._process, None
        if process:
            process.end()


def _tensors(models: Sequence[nn.Module]) -> list[Tensor]:
    return [tensor for model in models for tensor in model.state_dict().values()]


def process_here(plan: TrialPlan) -> Evaluating:
    """A process on this host that shares this one's device."""
    return EvaluatingProcess(plan, f"cuda:{torch.cuda.current_device()}" if plan.device == "cuda" else "cpu")


@contextmanager
def overlap(
    plan: TrialPlan, models: Sequence[nn.Module], rank: int, start: Start, saved: Sequence[dict[str, Any]]
) -> Iterator[Overlap | None]:
    """Evaluates concurrently until the block's end, where rank 0 has something to evaluate before training ends.

    Args:
        plan: The trial.
        models: What each evaluation evaluates, not wrapped for several workers.
        rank: This worker.
        start: Starts the process.
        saved: Evaluations that a checkpoint has.
    """
    periodic = 0 < plan.solver.eval_period < plan.solver.max_iter
    if rank != 0 or not (saved or (plan.evaluates_concurrently and periodic)):
        yield None
        return
    running = Overlap(plan, models, start)
    try:
        running.begin_again(saved)
        yield running
    finally:
        running.close()
