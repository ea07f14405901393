"""What must be true on every node that workers run on: looked at from that node, judged by the driver.

`inspect_node` runs as a short Ray task (or in this process, where this machine is the only node) and only gathers;
`judge_nodes` compares. What a node is asked and what it answers are values, so that both are tested without Ray.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.findings import Finding, FindingList

PACKAGES = ("ray", "torch", "torchvision", "numpy", "sal-detectron2", "detectron2", "pycocotools", "mlflow")
"""Packages whose versions must be the same on all nodes."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the place torch's loaders use, not a choice of ours

BUSY_SHARE = 0.9
"""Share of a GPU's memory that must be free; drivers take a few hundred MiB for themselves."""


@dataclass(frozen=True)
class NodeRequest:
    """What a node is asked.

    Attributes:
        paths: Files and folders that workers read, by what they are.
        storage: Folder that checkpoints go to, absolute; "" where storage is no folder.
        probe: File that the driver wrote where storage is, "" for none.
        probe_text: What it holds.
    """

    paths: dict[str, str]
    storage: str
    probe: str = ""
    probe_text: str = ""


@dataclass(frozen=True)
class NodeReport:
    """What a node answered; sizes in bytes.

    Attributes:
        host: Its host name.
        versions: Package to version, with `python`; packages that are not installed are left out.
        unreadable: Of the paths asked for: what they are, to the reason.
        storage_free: Free bytes where storage is; None where it could not be looked at.
        storage_problem: Why storage cannot be written, or "".
        probe_seen: Whether the driver's file was there with its text; None where there was none to look for.
        shared_memory_free: Free bytes of /dev/shm; None without one.
        gpus: Name, memory and free memory of each GPU.
    """

    host: str
    versions: dict[str, str]
    unreadable: dict[str, str] = field(default_factory=dict)
    storage_free: int | None = None
    storage_problem: str = ""
    probe_seen: bool | None = None
    shared_memory_free: int | None = None
    gpus: list[tuple[str, int, int]] = field(default_factory=list)


def inspect_node(request: NodeRequest) -> NodeReport:
    """Looks at the node this runs on; leaves nothing behind and raises nothing."""
    free, problem = _try_storage(request.storage) if request.storage else (None, "")
    return NodeReport(
        host=socket.gethostname(),
        versions=_read_versions(),
        unreadable={what: reason for what, path in request.paths.items() if (reason := _unreadable(path))},
        storage_free=free,
        storage_problem=problem,
        probe_seen=_sees_probe(request) if request.probe else None,
        shared_memory_free=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None,
        gpus=_list_gpus(),
    )


def existing_parent(path: Path) -> Path:
    """Gives the path itself, or the nearest folder above it that is there."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _try_storage(storage: str) -> tuple[int | None, str]:
    folder = existing_parent(Path(storage))
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"x" * 4096)
            stream.flush()
            os.fsync(stream.fileno())
        return shutil.disk_usage(folder).free, ""
    except OSError as error:
        return None, f"{folder} cannot be written: {error.strerror}"


def _unreadable(path: str) -> str:
    try:
        if Path(path).is_dir():
            with os.scandir(path) as entries:
                next(entries, None)
        else:
            with Path(path).open("rb") as stream:
                stream.read(1)
    except OSError as error:
        return str(error.strerror)
    return ""


def _sees_probe(request: NodeRequest) -> bool:
    try:
        return Path(request.probe).read_text(encoding="utf-8") == request.probe_text
    except (OSError, ValueError):
        return False


def _read_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _list_gpus() -> list[tuple[str, int, int]]:
    import pynvml

    gpus = []
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            gpus.append((str(pynvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free)))
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        pass  # no driver, no GPU
    return gpus


def judge_nodes(
    reports: list[NodeReport],
    request: NodeRequest,
    *,
    versions: dict[str, str],
    storage_bytes: float,
    shared_memory_bytes: float,
    needs_gpus: bool,
) -> list[Finding]:
    """Tells what is wrong on which node.

    Args:
        reports: One per node.
        request: What they were asked.
        versions: The driver's packages, which all nodes must have.
        storage_bytes: Room that the run's checkpoints take.
        shared_memory_bytes: What the loaders of one node's workers hold in /dev/shm at most.
        needs_gpus: Whether workers run on GPUs.
    """
    findings = FindingList()
    for report in reports:
        node = f"host {report.host}"
        for what, reason in report.unreadable.items():
            mend = "Put it on storage that all nodes share, at the same path, or copy it to each"
            findings.error("node_data", request.paths[what], node, f"{what} cannot be read there: {reason}", mend)
        _judge_storage(report, request, storage_bytes, findings)
        free = report.shared_memory_free
        if free is not None and free < shared_memory_bytes:
            what = f"{SHARED_MEMORY} has {_size(free)} free; the loaders hold up to {_size(shared_memory_bytes)} in it"
            mend = "Start the container with --shm-size (or --ipc=host), or set resources.loader_workers lower"
            findings.error("shared_memory", str(SHARED_MEMORY), node, what, mend)
        other = {
            package: (report.versions.get(package, "none"), version)
            for package, version in versions.items()
            if report.versions.get(package) != version
        }
        if other:
            shown = ", ".join(f"{package} {there} (driver: {here})" for package, (there, here) in other.items())
            findings.error("node_versions", "packages", node, f"other versions there: {shown}", "Use one image on all")
        for index, (name, total, unused) in enumerate(report.gpus if needs_gpus else []):
            if unused < BUSY_SHARE * total:
                what = f"GPU {index} ({name}) has {_size(unused)} of {_size(total)} free: something else uses it"
                findings.warning(
                    "gpu_busy", f"GPU {index}", node, what, "End it (`nvidia-smi` shows it), or expect less"
                )
    kinds = {name for report in reports for name, _, _ in report.gpus}
    if needs_gpus and len(kinds) > 1:
        what = f"GPUs of several kinds: {', '.join(sorted(kinds))}; every step waits for the slowest"
        findings.warning("gpu_kinds", "GPUs", "", what, "Use nodes of one kind for figures that mean something")
    return findings.to_list()


def _judge_storage(report: NodeReport, request: NodeRequest, storage_bytes: float, findings: FindingList) -> None:
    node = f"host {report.host}"
    if report.storage_problem:
        mend = "Set storage.path (or --output) to a folder that the run may write"
        findings.error("storage_unwritable", request.storage, node, report.storage_problem, mend)
    elif report.storage_free is not None and report.storage_free < storage_bytes:
        what = f"{_size(report.storage_free)} free; the checkpoints of all trials take about {_size(storage_bytes)}"
        mend = "Make room, set storage.path elsewhere, or storage.keep_checkpoints lower"
        findings.error("storage_small", request.storage, node, what, mend)
    if report.probe_seen is False:
        what = "not shared: a file that the driver wrote there is not seen from this host"
        mend = "Set storage.path to a folder that all hosts mount at the same path"
        findings.error("storage_not_shared", request.storage, node, what, mend)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
