"""The GPUs of this machine, as NVIDIA's driver lists them."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """One GPU."""

    name: str
    total_bytes: int
    free_bytes: int


def list_gpus() -> list[Gpu]:
    """The GPUs of this machine with their memory; none where there is no driver."""
    import pynvml

    gpus = []
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            gpus.append(Gpu(str(pynvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free)))
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return []
    return gpus
