"""Measures a host's GPUs: matrix products by precision, memory, copies, clocks, and what NVML says of their health.

None of this has run on a GPU yet: the tests use CPU devices and a stand-in for NVML.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from trainers.contract.acceptance import Measured
from trainers.matmul_precision import restored_matmul_precision

PRECISIONS = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "fp16": (torch.float16, False),
    "bf16": (torch.bfloat16, False),
}
"""Type of the matrices, and whether their products may be computed in TF32."""

MATRIX_SIZE = 8192
"""Side of the matrices: some milliseconds of tensor cores, three times 256 MiB in fp32."""

COPY_BYTES = 2**30
"""What is copied within a GPU's memory: far more than its caches hold."""

HOST_COPY_BYTES = 2**28
"""What is copied between host and GPU, and between GPUs."""

COPIES = 5
"""Copies between devices, of which the fastest counts."""

CLOCK_INTERVAL_SECONDS = 0.05
"""Time between two looks at the clocks."""

SLOWED_DOWN = {
    "HwSlowdown": "the hardware slows it down",
    "HwThermalSlowdown": "it is too hot: the hardware slows it down",
    "SwThermalSlowdown": "it is too hot: the driver slows it down",
    "HwPowerBrakeSlowdown": "its power supply slows it down",
}
"""Reasons of NVML for a low clock (nvmlClocksEventReasons) that a healthy GPU under load does not have."""

HARDWARE_XIDS = {48, 64, 74, 79, 92, 94, 95, 119}
"""Errors of the driver that come from the hardware (docs.nvidia.com/deploy/xid-errors): uncorrectable memory errors,
rows that could not be remapped, NVLink, a GPU that has fallen off the bus, a firmware that does not answer."""


def cuda_devices() -> list[torch.device]:
    """The GPUs that this process sees."""
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def measure_gpus(devices: Sequence[torch.device], keys: tuple[str, ...], seconds: float) -> Iterator[Measured]:
    """Measures devices: rates of all at once, as in training, copies one after the other.

    Args:
        devices: Named `GPU 0`, `GPU 1`, … by their order.
        keys: The quantities.
        seconds: How long each rate is measured.
    """
    handles = [_handle(device) for device in devices]
    yield from _matrix_rates(devices, keys, seconds, handles)
    if "gpu_memory" in keys:
        rates, _ = _at_once(devices, lambda device: memory_rate(device, seconds, COPY_BYTES), [])
        yield from (Measured("gpu_memory", rate / 1e9, f"GPU {index}") for index, rate in enumerate(rates))
    buffers = [torch.empty(HOST_COPY_BYTES, dtype=torch.uint8, device=device) for device in devices]
    if "host_to_gpu" in keys:
        for index, on_gpu in enumerate(buffers):
            host = torch.empty(HOST_COPY_BYTES, dtype=torch.uint8, pin_memory=on_gpu.is_cuda)
            yield Measured("host_to_gpu", copy_rate(host, on_gpu) / 1e9, f"GPU {index}")
            yield Measured("gpu_to_host", copy_rate(on_gpu, host) / 1e9, f"GPU {index}")
    if "gpu_to_gpu" in keys and len(devices) > 1:
        for index, source in enumerate(buffers):
            slowest = min(copy_rate(source, other) for other in buffers if other is not source)
            yield Measured("gpu_to_gpu", slowest / 1e9, f"GPU {index}")
    for index, handle in enumerate(handles):
        yield from (Measured("gpu_fault", 1.0, f"GPU {index}", fault) for fault in _faults(handle))
    yield from (Measured("gpu_fault", 1.0, "", f"the kernel's log has {line}") for line in _hardware_xids())


def _matrix_rates(
    devices: Sequence[torch.device], keys: tuple[str, ...], seconds: float, handles: Sequence[Any]
) -> Iterator[Measured]:
    """Products in each precision that the devices have, and the clocks of the last one."""
    clocks: list[tuple[float, int] | None] = []
    for precision, (kind, with_tf32) in PRECISIONS.items():
        needs_ampere = with_tf32 or kind == torch.bfloat16
        old = [each for each in devices if each.type == "cuda" and torch.cuda.get_device_capability(each) < (8, 0)]
        if f"gpu_matrix_{precision}" not in keys or (needs_ampere and old):
            continue
        measure = partial(matrix_rate, kind=kind, seconds=seconds, size=MATRIX_SIZE)
        with restored_matmul_precision():
            torch.backends.cuda.matmul.allow_tf32 = with_tf32
            rates, clocks = _at_once(devices, measure, handles)
        for index, rate in enumerate(rates):
            yield Measured(f"gpu_matrix_{precision}", rate / 1e12, f"GPU {index}")
    for index, clock in enumerate(clocks):
        if clock is not None:
            yield Measured("gpu_clock", clock[0], f"GPU {index}")
            yield from (Measured("gpu_fault", 1.0, f"GPU {index}", meaning) for meaning in _slow_downs(clock[1]))


def matrix_rate(device: torch.device, kind: torch.dtype, seconds: float, size: int) -> float:
    """Floating-point operations per second of products of square matrices, the median over the time."""
    left, right = (torch.rand(size, size, device=device).to(kind) for _ in range(2))
    return _median_rate(device, lambda: torch.mm(left, right), 2.0 * size**3, seconds)


def memory_rate(device: torch.device, seconds: float, num_bytes: int) -> float:
    """Bytes per second that a device reads and writes while it copies within its memory, the median over the time."""
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return _median_rate(device, lambda: target.copy_(source), 2.0 * num_bytes, seconds)


def copy_rate(source: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes per second of copying one tensor to another, the fastest of a few."""
    target.copy_(source)
    return max(source.nbytes / _seconds(target.device, lambda: target.copy_(source), source) for _ in range(COPIES))


def _median_rate(device: torch.device, work: Callable[[], Any], amount: float, seconds: float) -> float:
    """Amount of work per second; the first third of the time, in which clocks rise, does not count."""
    once = _seconds(device, work)
    once = min(once, _seconds(device, work))
    number = max(1, int(seconds / 10 / once))  # a tenth of the time without a wait for the device

    def many() -> None:
        for _ in range(number):
            work()

    timed: list[float] = []
    began = time.perf_counter()
    while (now := time.perf_counter() - began) < seconds or not timed:
        duration = _seconds(device, many)
        if now > seconds / 3 or now + duration > seconds:
            timed.append(duration)
    return amount * number / statistics.median(timed)


def _seconds(device: torch.device, work: Callable[[], Any], *others: torch.Tensor) -> float:
    def wait() -> None:
        for each in (device, *(other.device for other in others)):
            if each.type == "cuda":
                torch.cuda.synchronize(each)

    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def _at_once(
    devices: Sequence[torch.device], measure: Callable[[torch.device], float], handles: Sequence[Any]
) -> tuple[list[float], list[tuple[float, int] | None]]:
    """What is measured on all devices at once; and clock (MHz) and reasons for it (bits) of each meanwhile."""
    clocks: list[tuple[float, int] | None] = [None] * len(handles)
    with ThreadPoolExecutor(max(1, len(devices))) as pool:
        calls = [pool.submit(measure, device) for device in devices]
        while not all(call.done() for call in calls):
            for index, (call, handle) in enumerate(zip(calls, handles, strict=False)):
                now = _clock(handle)
                if now is not None and not call.done():
                    # The last clock counts: by then it is under load.
                    before = clocks[index]
                    clocks[index] = (now[0], now[1] | (before[1] if before else 0))
            time.sleep(CLOCK_INTERVAL_SECONDS)
        return [call.result() for call in calls], clocks


def _slow_downs(reasons: int) -> list[str]:
    import pynvml

    bits = {meaning: getattr(pynvml, f"nvmlClocksEventReason{name}") for name, meaning in SLOWED_DOWN.items()}
    return [meaning for meaning, bit in bits.items() if reasons & bit]


def _handle(device: torch.device) -> Any:
    """NVML's handle of a GPU; None where it does not answer."""
    import pynvml

    if device.type == "cuda":
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return None


def _clock(handle: Any) -> tuple[float, int] | None:
    import pynvml

    if handle is None:
        return None
    try:
        clock = float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
        return clock, int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
    except pynvml.NVMLError:
        return None


def _faults(handle: Any) -> Iterator[str]:
    """What NVML counts of defects in a GPU's memory; a GPU without such a counter has none to report."""
    import pynvml

    if handle is None:
        return
    with suppress(pynvml.NVMLError):
        kind, since = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        if errors := pynvml.nvmlDeviceGetTotalEccErrors(handle, kind, since):
            yield f"{errors} uncorrected memory errors (ECC) since the driver was loaded"
    with suppress(pynvml.NVMLError):
        _, _, pending, failed = pynvml.nvmlDeviceGetRemappedRows(handle)
        if failed:
            yield "a row of its memory could not be remapped: replace it"
        elif pending:
            yield "a row of its memory is to be remapped: reset it"
    with suppress(pynvml.NVMLError):
        if pynvml.nvmlDeviceGetRetiredPagesPendingStatus(handle):
            yield "a page of its memory is to be retired: reset it"


def _hardware_xids() -> list[str]:
    """The different errors of the hardware in the kernel's log, where this process may read it."""
    found: dict[str, None] = {}
    with suppress(OSError):
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        try:
            while record := os.read(log, 8192):
                match = re.search(r"NVRM: (Xid \([^)]*\): (\d+))", record.decode(errors="replace"))
                if match and int(match[2]) in HARDWARE_XIDS:
                    found[match[1]] = None
        finally:
            os.close(log)
    return list(found)
