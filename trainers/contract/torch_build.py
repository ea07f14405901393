"""What a host's torch is built for, as preflight asks it."""

from __future__ import annotations

from typing import NamedTuple


class TorchBuild(NamedTuple):
    """A build of torch."""

    version: str
    """Its version, such as `2.14.1+cu130`."""
    cuda: str | None
    """The CUDA it is built with, such as `13.0`; None where it is built without."""
    architectures: tuple[str, ...]
    """Those it has code for, by nvcc's names: `sm_90`, or `compute_90` for PTX."""
