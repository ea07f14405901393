"""Measures a host's GPUs: matrix products by precision, memory, copies, clocks, and what NVML says of their health.

Nothing here has run on a GPU yet; on CPUs, the rates of this module are tested with a processor as the device.
"""

from __future__ import annotations

import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch

from trainers.contract.acceptance import Measured

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

SLOWED_DOWN = {
    "HwSlowdown": "the hardware slows it down",
    "HwThermalSlowdown": "it is too hot: the hardware slows it down",
    "SwThermalSlowdown": "it is too hot: the driver slows it down",
    "HwPowerBrakeSlowdown": "its power supply slows it down",
}
"""Reasons of NVML for a low clock (nvmlClocksEventReasons) that a healthy GPU under load does not have."""

GRAVE_XIDS = {48, 64, 74, 79, 92, 94, 95, 119}
"""Errors of the driver that come from the hardware (docs.nvidia.com/deploy/xid-errors): uncorrectable memory errors,
rows that could not be remapped, NVLink, a GPU that has fallen off the bus, a firmware that does not answer."""


def measure_gpus(keys: tuple[str, ...], seconds: float) -> Iterator[Measured]:
    """Measures all GPUs that this process sees: rates of all at once, as in training, copies one after the other."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    names = {device: f"GPU {device.index}" for device in devices}
    handles = _handles(devices)
    for precision, (kind, with_tf32) in PRECISIONS.items():
        if f"gpu_matrix_{precision}" in keys:
            if kind == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
                continue
            torch.backends.cuda.matmul.allow_tf32 = with_tf32
            rates, clocks = _at_once(devices, lambda device, kind=kind: matrix_rate(device, kind, seconds), handles)
            for device, rate in rates.items():
                yield Measured(f"gpu_matrix_{precision}", rate / 1e12, names[device])
            if precision == "bf16" or "gpu_matrix_bf16" not in keys:
                yield from _clock_values(clocks, names)
    if "gpu_memory" in keys:
        rates, _ = _at_once(devices, lambda device: memory_rate(device, seconds, COPY_BYTES), {})
        yield from (Measured("gpu_memory", rate / 1e9, names[device]) for device, rate in rates.items())
    if "host_to_gpu" in keys:
        for device in devices:
            host = torch.empty(HOST_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
            on_gpu = torch.empty(HOST_COPY_BYTES, dtype=torch.uint8, device=device)
            yield Measured("host_to_gpu", copy_rate(host, on_gpu) / 1e9, names[device])
            yield Measured("gpu_to_host", copy_rate(on_gpu, host) / 1e9, names[device])
    if "gpu_to_gpu" in keys and len(devices) > 1:
        buffers = [torch.empty(HOST_COPY_BYTES, dtype=torch.uint8, device=device) for device in devices]
        for device, source in zip(devices, buffers, strict=True):
            slowest = min(copy_rate(source, other) for other in buffers if other is not source)
            yield Measured("gpu_to_gpu", slowest / 1e9, names[device])
    for device, handle in handles.items():
        yield from (Measured("gpu_fault", 1.0, names[device], fault) for fault in _faults(handle))
    yield from (Measured("gpu_fault", 1.0, "", f"the kernel's log has {line}") for line in _grave_xids())


def matrix_rate(device: torch.device, kind: torch.dtype, seconds: float, size: int = MATRIX_SIZE) -> float:
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

    began, timed = time.perf_counter(), []
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
    devices: list[torch.device], measure: Callable[[torch.device], float], handles: dict[torch.device, Any]
) -> tuple[dict[torch.device, float], dict[torch.device, tuple[float, int]]]:
    """What is measured on all devices at once; and clock (MHz) and reasons for it (bits) of each meanwhile."""
    rates: dict[torch.device, float] = {}
    errors: list[Exception] = []
    clocks: dict[torch.device, tuple[float, int]] = {}

    def run(device: torch.device) -> None:
        try:
            rates[device] = measure(device)
        except Exception as error:  # noqa: BLE001 - raised again below, in the thread that asked
            errors.append(error)

    threads = [threading.Thread(target=run, args=[device], daemon=True) for device in devices]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for device, handle in handles.items():
            now = _clock(handle)
            if now is not None and device not in rates:
                # The last one counts: by then it is under load.
                clocks[device] = (now[0], clocks.get(device, (0.0, 0))[1] | now[1])
        time.sleep(0.05)
    if errors:
        raise errors[0]
    return {device: rates[device] for device in devices}, clocks


def _clock_values(clocks: dict[torch.device, tuple[float, int]], names: dict[torch.device, str]) -> Iterator[Measured]:
    import pynvml

    for device, (clock, reasons) in clocks.items():
        yield Measured("gpu_clock", clock, names[device])
        for name, meaning in SLOWED_DOWN.items():
            if reasons & getattr(pynvml, f"nvmlClocksEventReason{name}"):
                yield Measured("gpu_fault", 1.0, names[device], meaning)


def _handles(devices: list[torch.device]) -> dict[torch.device, Any]:
    """NVML's handles of the GPUs; none where it does not answer."""
    import pynvml

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        ids = {device: f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in devices}
        return {device: pynvml.nvmlDeviceGetHandleByUUID(id) for device, id in ids.items()}
    return {}


def _clock(handle: Any) -> tuple[float, int] | None:
    import pynvml

    try:
        clock = float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
        return clock, int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
    except pynvml.NVMLError:
        return None


def _faults(handle: Any) -> Iterator[str]:
    """What NVML counts of defects in a GPU's memory; a GPU without such a counter has none to report."""
    import pynvml

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


def _grave_xids() -> list[str]:
    """The different errors of the hardware in the kernel's log, where this process may read it."""
    found: dict[str, None] = {}
    with suppress(OSError):
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        try:
            while record := os.read(log, 8192):
                match = re.search(r"NVRM: (Xid \([^)]*\): (\d+))", record.decode(errors="replace"))
                if match and int(match[2]) in GRAVE_XIDS:
                    found[match[1]] = None
        finally:
            os.close(log)
    return list(found)
