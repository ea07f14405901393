"""What shows in seconds whether workers would reach each other or hang, and what their torch is built for."""

from __future__ import annotations

import socket
import time
from datetime import timedelta

from trainers.contract.torch_build import TorchBuild

CANARY_FLOATS = 4 * 2**20
"""16 MiB: more than the path for small messages takes, little enough for a slow network."""


def torch_build() -> TorchBuild:
    """What this host's torch is built for; no GPU is asked, or touched."""
    import torch

    return TorchBuild(str(torch.__version__), torch.version.cuda, tuple(torch.cuda.get_arch_list()))


def find_port() -> int:
    """A TCP port of this host that is free now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
    return port


def time_all_reduce(rank: int, world_size: int, address: str, port: int, device: str, timeout_seconds: float) -> float:
    """Joins the other hosts, adds up 16 MiB over all of them, and leaves.

    Args:
        rank: Of this host, 0 on the one at `address`.
        world_size: Number of hosts.
        address: Host of rank 0.
        port: Free port there.
        device: `cuda` (NCCL) or `cpu` (gloo).
        timeout_seconds: For joining and for each all-reduce.

    Returns:
        Seconds of the second all-reduce; the first one sets up connections.

    Raises:
        RuntimeError: The hosts do not reach each other in time, or the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        seconds = 0.0
        for _ in range(2):
            values = torch.ones(CANARY_FLOATS, device=device)
            started = time.perf_counter()
            dist.all_reduce(values)
            result = float(values[-1])  # waits for the device
            seconds = time.perf_counter() - started
            if result != world_size:
                raise RuntimeError(f"the sum over {world_size} hosts is {result}")
        return seconds
    finally:
        dist.destroy_process_group()
