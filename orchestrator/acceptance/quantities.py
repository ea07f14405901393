"""What is measured of nodes and links: one row for each quantity, with how far apart healthy ones lie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Quantity:
    """A row of the table."""

    key: str
    """Name in `acceptance.json` and, below `acceptance/`, in MLflow."""
    heading: str
    unit: str
    spread: float
    """By which share of their median healthy devices of one kind may be worse: hardware's spread, and what is left of
    the noise of a busy machine. Fractions of less are no reason for an alarm, however much the others agree."""
    definition: str
    less_is_better: bool = False
    idle_from: float = 0.0
    """Median of the peers from which on it is judged at all; 0 for always."""
    in_preflight: bool = False
    """Whether it is part of the short form."""
    device: Literal["cuda", "cpu", ""] = ""
    """The device of the workers that it is for; "" for any."""

    @property
    def tolerance(self) -> float:
        """The spread as a distance between logarithms, which is the same in both directions."""
        return -math.log(1 - self.spread)


QUANTITIES = {
    row.key: row
    for row in (
        Quantity(
            "usable_cpus", "CPUs", "CPUs", 0.1,
            "CPUs of those that Ray offers which affinity and quota of its control group leave to a process",
            in_preflight=True,
        ),
        Quantity(
            "cpu_share", "CPU time", "%", 0.6,
            "Share of the time in which no other process was in the way of one thread per CPU; judged where the peers"
            " are idle",
            idle_from=70.0, in_preflight=True,
        ),
        Quantity(
            "decode", "JPEG decoding", "images/s", 0.35,
            "640 x 480 JPEGs decoded and enlarged to 1067 x 800, one thread per CPU; the time that other processes"
            " took is left out",
            in_preflight=True,
        ),
        Quantity(
            "cpu_matrix", "matrix product on CPUs", "GFLOP/s", 0.35,
            "Products of 512 x 512 matrices in fp32, one thread per CPU; less what other processes took",
            in_preflight=True, device="cpu",
        ),
        Quantity(
            "shm_size", "shared memory", "GiB", 0.5,
            "Size of /dev/shm, in which loaders keep batches",
        ),
        Quantity(
            "shm_write", "writing shared memory", "GB/s", 0.5,
            "A file written there",
        ),
        Quantity(
            "data_read", "reading data", "MB/s", 0.6,
            "Files of the training images, or one that was just written where there are none, read one after the other"
            " after the kernel was asked to forget them",
            in_preflight=True,
        ),
        Quantity(
            "checkpoint_write", "writing checkpoints", "MB/s", 0.6,
            "A file written to the storage of checkpoints until `fsync` has returned",
            in_preflight=True,
        ),
        Quantity(
            "gpu_matrix_fp32", "matrix product in fp32", "TFLOP/s", 0.08,
            "Products of 8192 x 8192 matrices, all GPUs of the node at once, median over the time",
            device="cuda",
        ),
        Quantity(
            "gpu_matrix_tf32", "matrix product in TF32", "TFLOP/s", 0.08,
            "As in fp32",
            device="cuda",
        ),
        Quantity(
            "gpu_matrix_fp16", "matrix product in fp16", "TFLOP/s", 0.08,
            "As in fp32",
            device="cuda",
        ),
        Quantity(
            "gpu_matrix_bf16", "matrix product in bf16", "TFLOP/s", 0.08,
            "As in fp32",
            in_preflight=True, device="cuda",
        ),
        Quantity(
            "gpu_memory", "GPU memory", "GB/s", 0.06,
            "1 GiB copied within the memory: bytes read and written",
            in_preflight=True, device="cuda",
        ),
        Quantity(
            "gpu_clock", "GPU clock under load", "MHz", 0.12,
            "Last clock of the multiprocessors while matrices are multiplied (NVML)",
            in_preflight=True, device="cuda",
        ),
        Quantity(
            "host_to_gpu", "host to GPU", "GB/s", 0.25,
            "256 MiB of pinned memory copied to a GPU, the fastest of five",
            device="cuda",
        ),
        Quantity(
            "gpu_to_host", "GPU to host", "GB/s", 0.25,
            "As host to GPU, the other way",
            device="cuda",
        ),
        Quantity(
            "gpu_to_gpu", "GPU to GPU", "GB/s", 0.25,
            "256 MiB copied from a GPU to another of its node: the slowest of these ways",
            device="cuda",
        ),
        Quantity(
            "latency", "latency", "µs", 0.75,
            "All-reduce of one number between two nodes, the fastest of many",
            less_is_better=True, in_preflight=True,
        ),
        Quantity(
            "all_reduce", "all-reduce", "GB/s", 0.5,
            "All-reduce between two nodes: bus bandwidth of the fastest of many",
            in_preflight=True,
        ),
    )
}  # fmt: skip
"""The rows, by key, in the order in which they are shown."""

LINK_KEYS = ("latency", "all_reduce")
"""Quantities of two nodes; all others are of one."""


def node_keys(device: Literal["cuda", "cpu"], *, short: bool) -> tuple[str, ...]:
    """Keys of what is measured of a node whose workers compute on a device."""
    return tuple(
        row.key
        for row in QUANTITIES.values()
        if row.key not in LINK_KEYS and row.device in ("", device) and (row.in_preflight or not short)
    )
