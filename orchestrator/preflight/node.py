"""What must be true on every node that workers run on: gathered there by `inspect_node`, judged by the driver."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.experiment.environment import CREDENTIALS, package_versions
from orchestrator.files import existing_parent
from orchestrator.findings import Finding, FindingList
from orchestrator.gpus import Gpu, cuda_of_driver, list_gpus

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where torch's loaders put their batches

BUSY_SHARE = 0.9
"""Share of a GPU's memory that must be free; the driver itself takes a few hundred MiB."""


@dataclass(frozen=True)
class NodeRequest:
    """What a node is asked to check."""

    paths: dict[str, str]
    """Files and folders that workers read, by what they are."""
    folders: dict[str, str]
    """Absolute path of each folder that workers write to a file that the driver wrote in or above it; "" for none."""
    checkpoints: str = ""
    """The folder that checkpoints go to; "" where they go to an address."""
    probe_text: str = ""
    """Content of the driver's files."""


@dataclass(frozen=True)
class FolderState:
    """A folder that workers write, as one node sees it."""

    free: int | None
    """Free bytes; None where it cannot be written."""
    problem: str = ""
    """Why it cannot be written."""
    probe_seen: bool | None = None
    """Whether the node reads the driver's file in it; None where the driver wrote none."""


@dataclass(frozen=True)
class NodeReport:
    """What a node reports."""

    host: str
    versions: dict[str, str]
    """Package to version, with `python`; packages that are not installed are left out."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Requested paths that cannot be read: what they are, to the reason."""
    folders: dict[str, FolderState] = field(default_factory=dict)
    shared_memory_free: int | None = None
    """Free bytes of /dev/shm; None where there is none."""
    gpus: list[Gpu] = field(default_factory=list)
    cuda_driver: tuple[int, int] | None = None
    """The newest CUDA that its driver is for; None where there is none, or it does not say."""
    credentials: tuple[str, ...] = ()
    """Names of the environment variables there that give access to the tracking server."""
    cannot_compile: str = ""
    """What Triton lacks there to compile C for Python; "" where nothing."""


def inspect_node(request: NodeRequest) -> NodeReport:
    """Inspects the node this runs on; leaves no file behind and raises nothing."""
    return NodeReport(
        host=socket.gethostname(),
        versions={"python": platform.python_version(), **package_versions()},
        unreadable={what: reason for what, path in request.paths.items() if (reason := _unreadable(path))},
        folders={folder: _try_folder(folder, probe, request.probe_text) for folder, probe in request.folders.items()},
        shared_memory_free=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None,
        gpus=list_gpus(),
        cuda_driver=cuda_of_driver(),
        credentials=tuple(name for name in CREDENTIALS if name in os.environ),
        cannot_compile=_cannot_compile(),
    )


def _cannot_compile() -> str:
    """What Triton looks for when a process starts its first kernel (`triton.runtime.build`), and does not find."""
    if not os.environ.get("CC") and not shutil.which("gcc") and not shutil.which("clang"):
        return "a C compiler (gcc, clang, or what CC names)"
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    header = Path(include, "Python.h")
    return "" if header.is_file() else f"Python's headers ({header})"


def _try_folder(name: str, probe: str, probe_text: str) -> FolderState:
    folder, seen = existing_parent(Path(name)), None
    if probe:
        try:
            seen = Path(probe).read_text(encoding="utf-8") == probe_text
        except (OSError, ValueError):
            seen = False
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"x" * 4096)
            stream.flush()
            os.fsync(stream.fileno())
        return FolderState(shutil.disk_usage(folder).free, "", seen)
    except OSError as error:
        return FolderState(None, f"{folder} cannot be written: {error.strerror}", seen)


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


def judge_nodes(
    reports: list[NodeReport],
    request: NodeRequest,
    *,
    versions: dict[str, str],
    storage_bytes: float,
    shared_memory_bytes: Mapping[str, float],
    needs_gpus: bool,
    compiles: bool = False,
    survives_storage: bool = False,
) -> list[Finding]:
    """Finds what is wrong on which node.

    Args:
        reports: One per node.
        request: What the nodes were asked.
        versions: The driver's packages, which all nodes must have.
        storage_bytes: Space that the run's checkpoints need.
        shared_memory_bytes: Host to the most that the loaders of its workers hold in /dev/shm; others have no workers.
        needs_gpus: Whether workers run on GPUs.
        compiles: Whether they compile kernels for them.
        survives_storage: Too little space is a warning: the run goes on where a checkpoint cannot be written.
    """
    findings = FindingList()
    for report in reports:
        node = f"host {report.host}"
        for what, reason in report.unreadable.items():
            hint = "Put it on storage that all nodes share, at the same path, or copy it to each node"
            findings.error("node_data", request.paths[what], node, f"{what} cannot be read there: {reason}", hint)
        for folder, state in report.folders.items():
            needed = storage_bytes if folder == request.checkpoints else 0
            _judge_folder(folder, state, node, needed, findings, survives=survives_storage)
        free, wanted = report.shared_memory_free, shared_memory_bytes.get(report.host, 0.0)
        if free is not None and free < wanted:
            what = f"{SHARED_MEMORY} has {_size(free)} free; the loaders hold up to {_size(wanted)} in it"
            hint = "Start the container with --shm-size (or --ipc=host), or set resources.loader_workers lower"
            findings.error("shared_memory", str(SHARED_MEMORY), node, what, hint)
        other = [
            f"{package} {report.versions.get(package, 'none')} (driver: {version})"
            for package, version in versions.items()
            if report.versions.get(package) != version
        ]
        if other:
            what = f"other versions there: {', '.join(other)}"
            findings.error("node_versions", "packages", node, what, "Use one image on all nodes")
        if compiles and report.gpus and report.cannot_compile:
            what = f"the recipe's kernels cannot be compiled there: {report.cannot_compile} not found"
            hint = (
                "Install gcc and this Python's headers (Debian, Ubuntu: apt install gcc python3-dev, or python3.12-dev "
                "and the like), or take the recipe reference"
            )
            findings.error("no_compiler", "trials.recipes", node, what, hint)
        divided = [str(gpu.number) for gpu in report.gpus if gpu.is_divided and needs_gpus]
        if divided:
            what = f"GPU {', '.join(divided)}: divided into slices (MIG), of which CUDA gives a process the first alone"
            hint = "Name slices in CUDA_VISIBLE_DEVICES where Ray is started (see `nvidia-smi -L`), or turn MIG off"
            add = findings.error if len(divided) > 1 else findings.warning
            add("gpu_divided", f"GPU {divided[0]}", node, what, hint)
        for gpu in report.gpus if needs_gpus else []:
            total, unused = gpu.total_bytes, gpu.free_bytes
            if total is not None and unused is not None and unused < BUSY_SHARE * total:
                what = (
                    f"GPU {gpu.number} ({gpu.name}) has {_size(unused)} of {_size(total)} free: something else uses it"
                )
                hint = "End that process (`nvidia-smi` shows it), or expect less"
                findings.warning("gpu_busy", f"GPU {gpu.number}", node, what, hint)
    kinds = {gpu.name for report in reports for gpu in report.gpus}
    if needs_gpus and len(kinds) > 1:
        what = f"GPUs of several kinds: {', '.join(sorted(kinds))}; every step waits for the slowest"
        findings.warning("gpu_kinds", "GPUs", "", what, "Use nodes of one kind for meaningful figures")
    return findings.to_list()


def _judge_folder(
    folder: str, state: FolderState, node: str, needed: float, findings: FindingList, *, survives: bool
) -> None:
    if state.problem:
        hint = "Set storage.path or storage.checkpoints (or --output) to a folder that the run may write"
        findings.error("storage_unwritable", folder, node, state.problem, hint)
    elif state.free is not None and state.free < needed:
        what = f"{_size(state.free)} free; the checkpoints of all trials take about {_size(needed)}"
        hint = "Free some, set storage.keep_checkpoints lower or, in a new run, storage.checkpoints to another place"
        report = findings.warning if survives else findings.error
        report("storage_small", folder, node, what, hint)
    if state.probe_seen is False:
        what = "not shared: this host does not see a file that the driver wrote there"
        hint = "Set storage.path and storage.checkpoints to folders that all hosts mount at the same path"
        findings.error("storage_not_shared", folder, node, what, hint)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
