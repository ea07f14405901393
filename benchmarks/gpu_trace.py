"""Reads torch.profiler's trace of a few training steps: launches, how busy the device was, and its longest kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch",
            "cudaLaunchCooperativeKernel")  # fmt: skip
"""Calls of CUDA's API that put a kernel, or a graph of kernels, into a queue."""

SYNCHRONIZATIONS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuEventSynchronize")
"""Calls with which the host waits for the device, but those at the ends of a block (`cudaDeviceSynchronize`)."""

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace for what the device did."""

TOP_KERNELS = 10
NAME_LENGTH = 120
"""Characters of a kernel's name that are kept: template arguments go on for thousands."""


def read_trace(events: Iterable[dict[str, Any]], seconds: float, steps: int) -> dict[str, Any] | None:
    """What a step is made of.

    Args:
        events: `traceEvents` of a Chrome trace; times are microseconds.
        seconds: From the first step's begin to the last one's end, the device idle at both.
        steps: Number of steps.

    Returns:
        Per step: `launches`, `synchronizations`, `graph_launches`, `device_ms` (in which the device did anything);
        `busy`, the share of the time in which it did; `kernels`, the longest ones with `name`, `ms` and `calls` a step.
        None for a trace that has nothing of the device.
    """
    calls: Counter[str] = Counter()
    spans: list[tuple[float, float]] = []
    kernels: Counter[str] = Counter()
    kernel_calls: Counter[str] = Counter()
    for event in events:
        if event.get("ph") != "X":
            continue
        category, name = event.get("cat"), str(event.get("name"))
        if category in ("cuda_runtime", "cuda_driver"):
            calls[name] += 1
        elif category in ON_DEVICE:
            spans.append((event["ts"], event["ts"] + event["dur"]))
            kernels[name] += event["dur"]
            kernel_calls[name] += 1
    if not spans:
        return None
    busy = covered(spans) / 1e6
    return {
        "launches": sum(calls[name] for name in LAUNCHES) / steps,
        "graph_launches": calls["cudaGraphLaunch"] / steps,
        "synchronizations": sum(calls[name] for name in SYNCHRONIZATIONS) / steps,
        "device_ms": 1000 * busy / steps,
        "busy": busy / seconds,
        "kernels": [
            {"name": name[:NAME_LENGTH], "ms": length / 1000 / steps, "calls": kernel_calls[name] / steps}
            for name, length in kernels.most_common(TOP_KERNELS)
        ],
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans: streams run kernels at the same time."""
    total, end = 0.0, float("-inf")
    for begin, until in sorted(spans):
        total += max(0.0, until - max(begin, end))
        end = max(end, until)
    return total
