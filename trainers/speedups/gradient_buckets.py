"""Keeps gradients at fixed places in a few flat tensors, and averages these over the workers.

A CUDA graph writes gradients to the addresses at which they were when it was captured. So under graphs they are kept
from step to step, and are zeroed in place: in the graph of a step's one batch, or before those of several. Averaging
is not captured: NCCL demands that all workers launch graphs of one and the same capture ("Using NCCL with CUDA
Graphs"), while here each worker has the graph of its own batch's shape, or none. Instead a graph records an event when
a bucket is complete; a second stream waits for the last one of a step and averages the bucket while the rest of the
backward pass goes on. It is the same for a pass that is not replayed, so workers meet whatever their batches are.
`DistributedDataParallel` would do the averaging within its backward hooks, which a replay does not run; hence there is
none around a model under graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20
"""From this size on a bucket is full; that of torch's DistributedDataParallel."""

ALIGNMENT = 128
"""Elements; each gradient begins at a multiple of it, as far apart as torch's allocator would place it."""


class GradientBuckets:
    """The gradients of a model's trained parameters, which lie in buckets from now on.

    In each backward pass every parameter must get a gradient.

    Args:
        parameters: In the model's order; those that are not trained are left out. Gradients come in the reverse order.
        world_size: Workers to average over, all of the default process group.
        bucket_bytes: From which size on a bucket is full.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world_size: int, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._world_size = world_size
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        overlapped = world_size > 1 and trained[0].device.type == "cuda"
        self._buckets = [_Bucket(group, overlapped) for group in _groups(trained[::-1], bucket_bytes)]
        self._stream = torch.cuda.Stream(trained[0].device) if overlapped else None

    def tensors(self) -> list[Tensor]:
        """The buckets."""
        return [bucket.flat for bucket in self._buckets]

    def zero(self) -> None:
        """Zeroes all gradients in place; to be called before the first backward pass of a step."""
        for bucket in self._buckets:
            bucket.flat.zero_()

    def expect_all(self) -> None:
        """To be called before each backward pass that is not a replay: all parameters must get a gradient in it."""
        for bucket in self._buckets:
            bucket.expect_all()

    def average(self) -> None:
        """Averages the gradients of a step over the workers, without waiting for them.

        Raises:
            RuntimeError: A parameter got no gradient.
        """
        missing = [name for bucket in self._buckets for name in bucket.missing()]
        if missing:
            raise RuntimeError(f"parameters of these shapes got no gradient, which CUDA graphs need: {missing}")
        if self._world_size == 1:
            return
        with torch.cuda.stream(self._stream):  # of none, does nothing
            works = [bucket.begin_average(self._world_size) for bucket in self._buckets]
        for work in works:
            work.wait()


class _Bucket:
    """Parameters whose gradients are views of one flat tensor."""

    def __init__(self, parameters: list[nn.Parameter], overlapped: bool) -> None:
        self._parameters = parameters
        starts, end = [], 0
        for parameter in parameters:
            starts.append(end)
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        self.flat = torch.zeros(end, dtype=parameters[0].dtype, device=parameters[0].device)
        self._arrived: set[nn.Parameter] = set(parameters)
        # External: recorded in a capture it is an event of the graph, which each replay records again.
        self._complete = torch.cuda.Event(external=True) if overlapped else None
        for parameter, start in zip(parameters, starts, strict=True):
            # In the parameter's memory order, as autograd would make it.
            parameter.grad = self.flat.as_strided(parameter.shape, parameter.stride(), start)
            parameter.register_post_accumulate_grad_hook(self._arrive)

    def expect_all(self) -> None:
        self._arrived.clear()

    def missing(self) -> Iterator[tuple[int, ...]]:
        return (tuple(parameter.shape) for parameter in self._parameters if parameter not in self._arrived)

    def begin_average(self, world_size: int) -> dist.Work:
        if self._complete is not None:
            self._complete.wait()
        # First divided, then added, as DistributedDataParallel does.
        self.flat.div_(world_size)
        work: dist.Work = dist.all_reduce(self.flat, async_op=True)
        return work

    def _arrive(self, parameter: Tensor) -> None:
        self._arrived.add(parameter)  # type: ignore[arg-type] # torch hands over the parameter itself
        if self._complete is not None and len(self._arrived) == len(self._parameters):
            self._complete.record()


def _groups(parameters: list[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one type, a bucket full at a time."""
    group: list[nn.Parameter] = []
    for parameter in parameters:
        size = sum(each.nbytes for each in group)
        if group and (size >= bucket_bytes or group[0].dtype != parameter.dtype):
            yield group
            group = []
        group.append(parameter)
    if group:
        yield group
