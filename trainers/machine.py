"""Describes what a worker runs on: device and package versions once, its memory and its node's load repeatedly."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import resource
from pathlib import Path
from typing import Any

import psutil
import torch

from trainers.contract.memory import Memory

PACKAGES = ("ray", "torch", "torchvision", "detectron2", "sal-detectron2", "pycocotools", "hotcoco", "numpy")


def device_name(device: torch.device) -> str:
    """Model name of the accelerator, or of the processor."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else processor_name()


def processor_name() -> str:
    """Model name of the host's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def device_memory_gib(device: torch.device) -> float:
    """Memory of the accelerator, or of the machine, in GiB."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory) / 2**30
    return psutil.virtual_memory().total / 2**30


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far in GiB: of the GPU by torch, or of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory(device: torch.device) -> Memory:
    """Memory of this process on its GPU, else on this machine, with the limit of the process or its container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return Memory(used, torch.cuda.max_memory_allocated(device), reserved + free)
    now, addresses = psutil.Process().memory_info(), resource.getrlimit(resource.RLIMIT_AS)[0]
    if addresses != resource.RLIM_INFINITY:
        return Memory(now.vms, now.vms, addresses)
    limit = min(_container_limit(), psutil.virtual_memory().total)
    return Memory(now.rss, peak_memory_gib(device) * 2**30, limit)


def _container_limit() -> float:
    try:
        return float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").replace("max", "inf"))
    except (OSError, ValueError):
        return math.inf


def host_description() -> dict[str, Any]:
    """The host's fields of `WorkerStarted`."""
    return {
        "host_processor": processor_name(),
        "host_cores": psutil.cpu_count(),
        "host_memory_gib": psutil.virtual_memory().total / 2**30,
        "operating_system": f"{platform.system()} {platform.release()}",
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that figures depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def numerics() -> dict[str, bool | str]:
    """The switches of this process that decide how its GPU computes, by torch's names.

    Those with a dot are under `torch.backends`.
    """
    return {
        "cuda.matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def system_metrics() -> dict[str, float]:
    """Load of this node under MLflow's names of system metrics, with GPU figures where NVML has them."""
    memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
    network = psutil.net_io_counters()
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "network_receive_megabytes": network.bytes_recv / 1e6,
        "network_transmit_megabytes": network.bytes_sent / 1e6,
    }
    if torch.cuda.is_available():
        values |= _gpu_metrics()
    return values


def _gpu_metrics() -> dict[str, float]:
    import pynvml

    values: dict[str, float] = {}
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            values[f"gpu_{index}_utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            values[f"gpu_{index}_memory_usage_megabytes"] = memory.used / 1e6
            values[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
            values[f"gpu_{index}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    except pynvml.NVMLError:
        return values
    return values
