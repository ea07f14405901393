"""The GPUs of this machine, as NVIDIA's driver lists them."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

VISIBLE = "CUDA_VISIBLE_DEVICES"


class Gpu(NamedTuple):
    """One GPU, or a slice of one (MIG)."""

    name: str
    number: int
    """By which `nvidia-smi` names it; that of its GPU for a slice."""
    total_bytes: int | None = None
    """Its memory; None where the driver does not say, as of a GPU that shares the machine's."""
    free_bytes: int | None = None
    """What nobody uses of it; None where the driver does not say."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability, such as (9, 0); None where the driver does not say."""
    is_divided: bool = False
    """Whether it is divided into slices (MIG), none of which is named: CUDA gives a process the first one."""


def list_gpus() -> list[Gpu]:
    """The GPUs of this machine that `CUDA_VISIBLE_DEVICES` leaves to CUDA; none where there is no driver.

    Numbers in the variable are taken in the driver's order, as Ray takes them.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_describe(handle) for handle in _visible_handles(os.environ.get(VISIBLE))]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def cuda_of_driver() -> tuple[int, int] | None:
    """The newest CUDA that NVIDIA's driver, with its compatibility packages, is for; None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    version = _ask(pynvml.nvmlSystemGetCudaDriverVersion_v2)
    pynvml.nvmlShutdown()
    return (version // 1000, version % 1000 // 10) if version else None


def _describe(handle: Any) -> Gpu:
    import pynvml

    parent = _ask(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle)
    whole = handle if parent is None else parent
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    known = memory is not None and memory.total > 0
    mig = _ask(pynvml.nvmlDeviceGetMigMode, handle) if parent is None else None
    return Gpu(
        name=str(pynvml.nvmlDeviceGetName(handle)),
        number=int(pynvml.nvmlDeviceGetIndex(whole)),
        total_bytes=int(memory.total) if known else None,
        free_bytes=int(memory.free) if known else None,
        capability=_ask(pynvml.nvmlDeviceGetCudaComputeCapability, whole),
        is_divided=mig is not None and mig[0] == pynvml.NVML_DEVICE_MIG_ENABLE,
    )


def _visible_handles(visible: str | None) -> list[Any]:
    """The driver's handles of what a value of `CUDA_VISIBLE_DEVICES` names, in its order, as CUDA reads it.

    The list ends at the first entry that names nothing, and is empty where one comes twice.
    """
    import pynvml

    found = (_ask(pynvml.nvmlDeviceGetHandleByIndex, index) for index in range(pynvml.nvmlDeviceGetCount()))
    handles = [handle for handle in found if handle is not None]  # CUDA has no others either
    if visible is None:
        return handles
    uuids = [str(_ask(pynvml.nvmlDeviceGetUUID, handle)) for handle in handles]
    chosen: dict[str, Any] = {}
    for entry in map(str.strip, visible.split(",")):
        key = entry
        if entry.startswith("MIG-"):
            handle = _ask(pynvml.nvmlDeviceGetHandleByUUID, entry)
        else:
            number = re.match(r"\+?\d+", entry)  # what follows it is not read
            same = [each for each, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
            index = int(number.group()) if number else same[0] if len(same) == 1 else len(handles)
            handle, key = (handles[index], str(index)) if index < len(handles) else (None, "")
        if handle is None:
            break
        if key in chosen:
            return []
        chosen[key] = handle
    return list(chosen.values())


def _ask(function: Any, *arguments: Any) -> Any:
    """What the driver answers; None where it refuses."""
    import pynvml

    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None
