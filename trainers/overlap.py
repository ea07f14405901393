"""Evaluates in a separate process while rank 0 trains on.

The process ends itself when the other end of a pipe is closed, so that it cannot outlive its training, not even one
that is killed. The weights are copied, so that training cannot change them during an evaluation. On a GPU training does
not wait for these copies, but from then on it shares the GPU with the evaluation.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn

from trainers import mask_rcnn
from trainers.contract.plan import TrialPlan
from trainers.evaluation import Evaluator, Scores
from trainers.speedups.apply import process_settings

_ALIGNMENT = 16  # bytes: a tensor of any type may begin there

_serving: tuple[nn.Module, list[Tensor], Evaluator]
"""In the evaluating process: its model, the weights it was sent, and its evaluator."""
_settings = ExitStack()
"""Of the same process: what its recipe sets, to its end."""


class Overlap:
    """The process that evaluates a model, not wrapped for several workers; it begins to set itself up at once."""

    def __init__(self, plan: TrialPlan, model: nn.Module) -> None:
        # One block of memory: a file descriptor for each tensor could be more than a process may have.
        size = sum(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in model.state_dict().values())
        self._shared = torch.zeros(size, dtype=torch.uint8).share_memory_()
        device = next(model.parameters()).device
        # Page-locked memory, which a GPU's copies reach without anybody waiting for them, cannot be shared.
        on_gpu = device.type == "cuda"
        self._staging = torch.empty(size, dtype=torch.uint8, pin_memory=True) if on_gpu else self._shared
        self._weights = _views(self._staging, model)
        self._sender = ThreadPoolExecutor(1)
        context = multiprocessing.get_context("spawn")
        training_ended, self._end_process = context.Pipe(duplex=False)
        self._process = ProcessPoolExecutor(1, context, initializer=_end_with, initargs=(training_ended,))
        # The weights that training starts from are not needed there.
        self._ready = self._process.submit(_set_up, dataclasses.replace(plan, weights=""), self._shared, device)
        self._found: Future[tuple[Scores, float]] | None = None

    def begin(self, model: nn.Module, iteration: int) -> None:
        """Begins to evaluate a model as it is after an iteration; the previous evaluation must have been fetched."""
        with torch.no_grad():
            for copy, tensor in zip(self._weights, model.state_dict().values(), strict=True):
                copy.copy_(tensor, non_blocking=True)  # on a GPU, training's next steps follow in the same stream
        done = None
        if self._staging is not self._shared:
            done = torch.cuda.Event(blocking=True)
            done.record()
        self._found = self._sender.submit(self._send, done, iteration)

    def _send(self, copied: torch.cuda.Event | None, iteration: int) -> tuple[Scores, float]:
        if copied:
            copied.synchronize()
            self._shared.copy_(self._staging)
        return self._process.submit(_evaluate, iteration).result()

    def known(self) -> bool:
        """Whether there is the result or the failure of an evaluation to fetch."""
        return self._found is not None and self._found.done()

    def fetch(self) -> tuple[Scores, float] | None:
        """Waits for the evaluation that was begun; its scores and seconds, None where they have been fetched.

        Raises:
            BrokenProcessPool: The process died.
            Exception: Whatever ended the evaluation or the process's set-up.
        """
        if self._found is None:
            return None
        self._ready.result()
        found, self._found = self._found.result(), None
        return found

    def close(self) -> None:
        """Ends the process, in the middle of its work where there is any."""
        if not self._ready.done() or (self._found is not None and not self._found.done()):
            self._end_process.send_bytes(b"")
        self._process.shutdown()
        self._sender.shutdown()
        self._end_process.close()


@contextmanager
def process(plan: TrialPlan, model: nn.Module, rank: int) -> Iterator[Overlap | None]:
    """The process, where rank 0 has something to evaluate before the end, until the block's end; else None."""
    periodic = 0 < plan.solver.eval_period < plan.solver.max_iter
    if rank != 0 or not (plan.recipe.overlapped_evaluation and periodic):
        yield None
        return
    overlap = Overlap(plan, model)
    try:
        yield overlap
    finally:
        overlap.close()


def _views(shared: Tensor, model: nn.Module) -> list[Tensor]:
    """Views of a block of memory with the shapes and types of a model's state dict, in its order."""
    views, start = [], 0
    for tensor in model.state_dict().values():
        views.append(shared[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return views


def _end_with(training: Connection) -> None:
    """Ends this process at once when training sends a message or is gone."""

    def wait() -> None:
        training.poll(None)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in a terminal reaches all; training decides


def _set_up(plan: TrialPlan, shared: Tensor, device: torch.device) -> None:
    global _serving
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(plan.cpus_per_worker)
    cfg = mask_rcnn.build_config(plan)
    _settings.enter_context(process_settings(plan.recipe, device, cfg.CUDNN_BENCHMARK))
    mask_rcnn.register(cfg, plan.val)
    model = mask_rcnn.build_detector(cfg, plan)
    _serving = model, _views(shared, model), Evaluator(cfg, plan)


@torch.no_grad()
def _evaluate(iteration: int) -> tuple[Scores, float]:
    model, weights, evaluator = _serving
    started = time.perf_counter()
    for tensor, sent in zip(model.state_dict().values(), weights, strict=True):
        tensor.copy_(sent)
    return evaluator.run(model, iteration), time.perf_counter() - started
