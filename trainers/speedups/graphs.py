"""Replays the whole forward and backward pass of padded batches as CUDA graphs, one for each shape of batch.

A graph is a recording of kernels with their arguments: a replay starts all of them at once, without the host's part of
each. What that demands, and where it is kept (torch, notes/cuda.html, "CUDA Graphs"):

- The same shapes and control flow in each replay: a graph is used for one `PaddedBatch.shape` alone; the model's part
  is `FixedRCNN`'s.
- The same addresses: batches are copied into tensors that stay (`Graph.inputs`); losses are copied out of the pass into
  one that stays, so no tensor of the shared pool outlives its replay, and replays may come in any order; gradients stay
  in `GradientBuckets`, where those of a step's batches add up, and are zeroed within the graph or, before several
  batches, outside; the optimizer, loading a checkpoint and `share_buffers` write weights and buffers in place, and so
  does `precise_bn`; `forget_replaced` compares the addresses before each window of steps and drops graphs of others.
- Nothing that waits for the device, nor any value that passes through the host: `tests/trainers/test_graphs.py` replays
  the operations alone, without the Python around them. Losses are read when a window of steps closes, as without
  graphs. Optimizer, gradient scaler, clipping, schedule and collectives are outside.
- A warm-up on a side stream before a capture (lazy initialisation, cuDNN's choice of kernels, compilation of Triton's):
  the first `WARMUP_STEPS` batches of a shape are trained eagerly, as is whatever no graph fits. All eager passes run on
  the stream of the captures, so that autograd never adds up gradients on the default stream in a capture.
- One capture at a time, and no other thread's calls in it: `thread_local`, because the loader's thread allocates
  page-locked memory at any time. NCCL's watchdog does without (torch 2.2 and later).
- Random numbers: torch takes the device's generator as it is when a replay begins; the loop seeds it before each.
- Autocast is entered and left within the capture, its cache of casts included, as in torch's own example; so a replay
  rounds as an eager pass does.
- The gradient scaler's scale is a tensor on the device, which `update` changes in place after an eager step made it.

Memory: all graphs share one pool, which is as large as the passes of the largest shape, and more where blocks of
different shapes fit badly. It is never given back, so an eager pass or an evaluation in between needs its own. Each
shape adds the memory of its batch.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from detectron2.layers import NaiveSyncBatchNorm
from torch import Tensor, nn

from trainers.recipes import Recipe
from trainers.speedups.fixed_rcnn import FixedRCNN
from trainers.speedups.padded_batch import PaddedBatch

logger = logging.getLogger(__name__)

WARMUP_STEPS = 3
"""Eager batches of a shape before its capture, as many as torch's own `make_graphed_callables` takes."""

MAX_GRAPHS = 16
"""Most shapes that get a graph; batches of further ones are trained eagerly."""

MIB = 2**20


class Capture(Protocol):
    """A way to record what a function does to tensors, and to do it again."""

    def side_stream(self) -> AbstractContextManager[None]:
        """Where eager passes run: after everything before, and before everything after the block."""

    def record(self, run: Callable[[], object]) -> Callable[[], None]:
        """Records a function's operations on tensors, without effect on any; what is returned carries them out.

        Raises:
            RuntimeError: They cannot be recorded.
        """


class CudaCapture:
    """Records CUDA graphs, which share one pool of memory; `refusal` says why a model's passes cannot be recorded."""

    def __init__(self, device: torch.device, refusal: str | None = None) -> None:
        self._device, self._refusal = device, refusal
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Runs a block's operations on the stream of the captures."""
        outer = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outer.wait_stream(self._stream)

    def record(self, run: Callable[[], object]) -> Callable[[], None]:
        """Captures a graph; what is returned replays it on the current stream."""
        if self._refusal:
            raise RuntimeError(self._refusal)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # what `torch.cuda.graph` begins with, here to compare memory
        allocated, reserved = torch.cuda.memory_allocated(self._device), torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context restores the stream also where the inner one fails to end a broken capture.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                run()
        except BaseException:
            graph.reset()
            raise
        outliving = torch.cuda.memory_allocated(self._device) - allocated
        if outliving > MIB:
            logger.warning("%.1f MiB of a capture are still in use: replays overwrite them.", outliving / MIB)
        grown = torch.cuda.memory_reserved(self._device) - reserved
        logger.info("The pool of the CUDA graphs has grown by %.0f MiB.", grown / MIB)
        return graph.replay


@dataclass(frozen=True, slots=True)
class Graph:
    """The recorded passes of one shape."""

    inputs: PaddedBatch
    """What they read."""
    losses: Tensor
    """What they write, apart from gradients and buffers of the model."""
    replay: Callable[[], None]

    def run(self, batch: PaddedBatch) -> Tensor:
        """The losses of a batch, valid until the next run of this graph; the gradients are in their buckets."""
        self.inputs.copy_(batch)
        self.replay()
        return self.losses


@dataclass(slots=True)
class GraphUse:
    """What graphs did in a window of steps."""

    num_graphs: int = 0
    """Held at its end."""
    capture_seconds: float = 0.0
    eager_steps: Counter[str] = field(default_factory=Counter)
    """Batches that no graph replayed, by the reason."""


class Graphs:
    """The graphs of one model, each captured when its shape has been warmed up.

    Args:
        capture: How passes are recorded.
        passes: Forward and backward pass of a padded batch; returns the losses.
        tensors: Returns all tensors that the passes use and that outlive them: weights, buffers, gradients.
        device: Where the model is.
    """

    def __init__(
        self,
        capture: Capture,
        passes: Callable[[PaddedBatch], Tensor],
        tensors: Callable[[], Iterable[Tensor]],
        device: torch.device,
    ) -> None:
        self._capture, self._passes, self._tensors, self._device = capture, passes, tensors, device
        self._graphs: dict[tuple[object, ...], Graph] = {}
        self._warmed: Counter[tuple[object, ...]] = Counter()
        self._reasons: dict[tuple[object, ...], str] = {}  # of shapes that get no graph
        self._addresses: list[int] = []
        self._use = GraphUse()
        self.side_stream = capture.side_stream

    def graph_of(self, inputs: object, losses: Tensor) -> Graph | None:
        """The graph for the inputs of a batch, captured now if it is time.

        Args:
            inputs: Of the model.
            losses: Any tensor of the losses' shape; read only after a warm-up.

        Returns:
            None where the batch must be eager, which is counted.
        """
        if not isinstance(inputs, PaddedBatch):
            self._use.eager_steps["batch not padded"] += 1
            return None
        key = (*inputs.shape, inputs.images.dtype)
        if key not in self._graphs:
            reason = self._not_yet(key) or self._record(key, inputs, losses)
            if reason:
                self._use.eager_steps[reason] += 1
                return None
        return self._graphs[key]

    def forget_replaced(self) -> None:
        """Forgets all graphs if a tensor that they use was replaced since; they are captured again."""
        if self._graphs and self._addresses != self._current_addresses():
            logger.warning("Weights or buffers were replaced by others: all CUDA graphs are captured again.")
            self._graphs.clear()

    def take_use(self) -> GraphUse:
        """What graphs did since the last call."""
        use, self._use = self._use, GraphUse()
        use.num_graphs = len(self._graphs)
        return use

    def _not_yet(self, key: tuple[object, ...]) -> str | None:
        if key in self._reasons:
            return self._reasons[key]
        if len(self._graphs) >= MAX_GRAPHS:
            logger.warning("Batches of shape %s are trained eagerly: there are %d CUDA graphs.", key, MAX_GRAPHS)
            self._reasons[key] = f"more than {MAX_GRAPHS} shapes"
            return self._reasons[key]
        self._warmed[key] += 1
        return "warm-up" if self._warmed[key] <= WARMUP_STEPS else None

    def _record(self, key: tuple[object, ...], batch: PaddedBatch, like: Tensor) -> str | None:
        """Captures a graph; returns why that failed."""
        started = time.perf_counter()
        try:
            inputs = PaddedBatch(*(torch.empty_like(tensor, device=self._device) for tensor in batch.tensors()))
            inputs.copy_(batch)
            losses = torch.empty_like(like)
            replay = self._capture.record(lambda: losses.copy_(self._passes(inputs)))
        except RuntimeError as error:
            logger.warning("No CUDA graph of batches of shape %s; they are trained eagerly:", key, exc_info=True)
            self._reasons[key] = f"capture failed: {_cause(error)}"
            return self._reasons[key]
        finally:
            self._use.capture_seconds += time.perf_counter() - started
        self._graphs[key] = Graph(inputs, losses, replay)
        self._addresses = self._current_addresses()
        logger.info("Captured CUDA graph %d, of batches of shape %s.", len(self._graphs), key)
        return None

    def _current_addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors()]


def capture_for(model: nn.Module, recipe: Recipe, device: torch.device, world_size: int) -> CudaCapture | None:
    """What captures the passes of a model; None without the recipe's switch, on CPUs, and for models that cannot."""
    if not recipe.cuda_graphs or device.type != "cuda":
        return None
    if not isinstance(model, FixedRCNN):
        logger.warning("cuda_graphs: has no effect, this model is not trained on batches of fixed shapes.")
        return None
    exchanges = (nn.SyncBatchNorm, NaiveSyncBatchNorm)
    in_passes = world_size > 1 and any(isinstance(module, exchanges) for module in model.modules())
    return CudaCapture(device, "SyncBN exchanges statistics within the passes" if in_passes else None)


def _cause(error: BaseException) -> str:
    """The first line of the first of a chain of errors: a capture that broke fails again when it is ended."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
