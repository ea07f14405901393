"""A mode that fails on every operation for which a host waits for a GPU, on a machine without one.

On a CPU it sees what is asked of tensors by name. On the meta device, where tensors have no values, it also sees copies
to the host and back, and torch refuses what needs a value. What a custom operation does inside is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "allclose"),  # a value for the host
    *("nonzero", "argwhere", "masked_select", "bincount"),  # as many results as the values say
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "tensor_split", "to_sparse"),
    *("lift_fresh", "_pin_memory"),  # a tensor of values that the host has
}
"""Operations of torch after which the host has what only the device knew, or the reverse."""

INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operations that wait where an index is a boolean mask."""


class WaitError(AssertionError):
    """An operation would wait for the device."""


class NoWaits(TorchDispatchMode):
    """Raises WaitError from the operation that would wait, forward or backward."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, name = func.name().split(".")[0].split("::")
        given = list(_tensors((*args, *kwargs.values())))
        indices = args[1] if name in INDEXED else ()
        uncounted = name == "repeat_interleave" and kwargs.get("output_size") is None
        if (
            (namespace == "aten" and name in WAITS)
            or (namespace == "torchvision" and name == "nms")
            or any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
            or uncounted
        ):
            raise WaitError(f"{func.name()} waits for the device")
        target = kwargs.get("device")
        if target is not None and any(each.device.type != torch.device(target).type for each in given):
            raise WaitError(f"{func.name()} copies to {target}")
        result = func(*args, **kwargs)
        if len({each.device.type for each in (*given, *_tensors(result))}) > 1:
            raise WaitError(f"{func.name()} copies between devices")
        return result


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
