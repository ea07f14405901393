"""Measures the links between hosts: the time of all-reduces by the size of the message, by gloo or NCCL."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Public, but not to a type checker: torch.distributed gets them from its library at run time.
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from trainers.contract.acceptance import Measured, Meeting

LATENCY_BYTES = 4
"""One number: what takes time is the way, not the message."""

MIN_REPETITIONS, MAX_REPETITIONS = 3, 500

MAX_SHARE = 0.1
"""Share of the time-out that a message may be expected to take; larger ones are left out on a link that slow."""

OPEN_TIMEOUT = timedelta(seconds=60)


def open_store(address: str) -> Any:
    """What groups meet by whose rank 0 is on this host, at a port that was free; it ends with its process.

    Args:
        address: This host's, as others reach it.
    """
    return TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=OPEN_TIMEOUT)


def measure_links(meeting: Meeting, store: Any, device: str) -> list[Measured]:
    """Meets the other hosts of a group, and measures all-reduces between them.

    An all-reduce is timed many times, and the fastest counts: it is the one that nothing else was in the way of. A
    limit on a link is in the way of all, as messages are larger than what a switch or a token bucket lets through.

    Args:
        meeting: Who meets, and with which messages.
        store: This host's own; used on rank 0.
        device: `cuda` (NCCL) or `cpu` (gloo).

    Returns:
        `latency` (microseconds of the smallest message) and `all_reduce` for each larger one: GB/s by NCCL's definition
        of bus bandwidth (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md), which does not depend on the group's size.

    Raises:
        RuntimeError: The hosts do not reach each other in time, or a sum is wrong. Where NCCL hangs, its watchdog ends
            the process after the time-out instead, or this does not return.
    """
    timeout = timedelta(seconds=meeting.timeout_seconds)
    if meeting.rank:
        store = TCPStore(meeting.address, meeting.port, is_master=False, wait_for_workers=False, timeout=timeout)
    if device == "cuda":
        torch.cuda.set_device(meeting.gpu)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=PrefixStore(meeting.name, store),
        rank=meeting.rank,
        world_size=meeting.size,
        timeout=timeout,
    )
    try:
        found: list[Measured] = []
        slowest_byte = 0.0
        for num_bytes in (LATENCY_BYTES, *meeting.message_bytes):
            if slowest_byte * num_bytes > MAX_SHARE * meeting.timeout_seconds:
                found.append(Measured("all_reduce", None, size_name(num_bytes), "smaller messages take too long"))
                continue
            seconds, usual = _fastest(num_bytes, meeting, device)
            slowest_byte = usual / num_bytes if num_bytes != LATENCY_BYTES else 0.0
            if num_bytes == LATENCY_BYTES:
                found.append(Measured("latency", seconds * 1e6))
            else:
                bus_bytes = num_bytes * 2 * (meeting.size - 1) / meeting.size
                found.append(Measured("all_reduce", bus_bytes / seconds / 1e9, size_name(num_bytes)))
        return found
    finally:
        dist.destroy_process_group()


def _fastest(num_bytes: int, meeting: Meeting, device: str) -> tuple[float, float]:
    """Seconds of the fastest of many all-reduces, and of one on its slowest rank, which all ranks know alike."""
    values = torch.ones(num_bytes // 4, device=device)
    _timed(values)  # sets up connections
    if (total := float(values[-1])) != meeting.size:
        raise RuntimeError(f"the sum over {meeting.size} hosts is {total}")
    values.zero_()  # sums of ones would grow
    first = torch.tensor([_timed(values)], device=device)
    dist.all_reduce(first, dist.ReduceOp.MAX)
    usual = float(first)
    repetitions = min(max(int(meeting.seconds / usual), MIN_REPETITIONS), MAX_REPETITIONS)
    return min(_timed(values) for _ in range(repetitions)), usual


def _timed(values: torch.Tensor) -> float:
    began = time.perf_counter()
    dist.all_reduce(values)
    values[-1].item()  # waits for the device
    return time.perf_counter() - began


def size_name(num_bytes: int) -> str:
    """`64 KiB`, `16 MiB`."""
    return f"{num_bytes // 2**20} MiB" if num_bytes >= 2**20 else f"{num_bytes // 2**10} KiB"
