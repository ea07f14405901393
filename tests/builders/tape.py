"""Stands in for CUDA graphs on a CPU: records the operations of a function, and repeats these alone.

As in a replay, no Python runs but the operations' own: whatever a function took from a batch other than through its
tensors is as it was when it was recorded, and an operation goes on with the tensors that it was given then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.builders.waits import NoWaits, WaitError


class Tape(TorchDispatchMode):
    """Records operations, forward and backward, with the tensors that they read and made."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, _tensors(result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.operations:
            for old, new in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    old.copy_(new)


class TapeCapture:
    """A `Capture` that records on tapes.

    Args:
        lasting: Tensors that a function which is recorded may write to; recording has no effect on them.
    """

    def __init__(self, lasting: Callable[[], Iterable[Tensor]]) -> None:
        self.lasting = lasting
        self.num_captures = self.num_replays = 0

    def side_stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, run: Callable[[], object]) -> Callable[[], None]:
        tensors = list(self.lasting())
        before = [tensor.detach().clone() for tensor in tensors]
        try:
            with Tape() as tape, NoWaits():
                run()
        except WaitError as error:
            raise RuntimeError("operation not permitted when stream is capturing") from error
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
        self.num_captures += 1

        def replay() -> None:
            self.num_replays += 1
            tape.replay()

        return replay


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
