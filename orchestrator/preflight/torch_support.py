"""Whether the torch of each node can use the node's GPUs, as far as NVIDIA's driver and torch's build say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from orchestrator.execution.nodes import Node, torch_builds
from orchestrator.findings import Finding, FindingList, root_cause
from orchestrator.gpus import Gpu
from orchestrator.preflight.node import NodeReport
from trainers.contract.torch_build import TorchBuild

TIMEOUT_SECONDS = 120.0
"""For nodes to start a process that imports torch; it takes seconds, unless their storage is slow."""

ARCHITECTURE = re.compile(r"(?P<kind>sm|compute)_(?P<major>\d+)(?P<minor>\d)(?P<suffix>[af]?)")


def check_torch(reports: Mapping[Node, NodeReport]) -> list[Finding]:
    """Asks the nodes that have GPUs what their torch is built for, and compares it with what they reported."""
    nodes = [node for node, report in reports.items() if node.num_gpus and report.gpus]
    findings = FindingList()
    for node, build in torch_builds(nodes, TIMEOUT_SECONDS).items():
        place = f"host {node.host}"
        if isinstance(build, Exception):
            what = f"whether it can use the GPUs there is not known: {root_cause(build).splitlines()[-1]}"
            findings.warning("torch_unknown", "torch", place, what, "See what `python -c 'import torch'` says there")
        else:
            _judge(reports[node], build, place, findings)
    return findings.to_list()


def _judge(report: NodeReport, build: TorchBuild, place: str, findings: FindingList) -> None:
    torch, driver = f"torch {build.version}", report.cuda_driver
    if build.cuda is None:
        hint = "Install a torch that is built for CUDA there, or set resources.device: cpu"
        findings.error("torch_without_cuda", "torch", place, f"{torch} is built without CUDA", hint)
        return
    major = int(build.cuda.partition(".")[0])
    # Since CUDA 11, a driver runs what is built with any CUDA of its major version, or with an older one
    # (docs.nvidia.com/deploy/cuda-compatibility).
    if driver is not None and driver[0] < major:
        what = f"NVIDIA's driver is for CUDA {driver[0]}.{driver[1]}, {torch} is built with {build.cuda}"
        hint = f"Update the driver to one for CUDA {major}, or install a torch that is built with CUDA {driver[0]}"
        findings.error("driver_too_old", "torch", place, what, hint)
    _judge_architectures(report.gpus, build, place, findings)


def _judge_architectures(gpus: Sequence[Gpu], build: TorchBuild, place: str, findings: FindingList) -> None:
    unfit = [gpu for gpu in gpus if gpu.capability and not runs_on(build.architectures, gpu.capability)]
    # Workers that leave it alone are fine with a GPU that only draws the screen.
    report = findings.error if len(unfit) == len(gpus) else findings.warning
    for name, capability in dict.fromkeys((gpu.name, gpu.capability) for gpu in unfit):
        major, minor = capability or (0, 0)
        wanted = f"sm_{major}{minor}"
        indices = ", ".join(str(gpu.number) for gpu in unfit if (gpu.name, gpu.capability) == (name, capability))
        what = f"torch {build.version} has no code for GPU {indices} ({name}, {wanted}), but for"
        what += f" {', '.join(build.architectures)}"
        hint = f"Install a torch that is built for {wanted}: builds with an older CUDA have older architectures, newer"
        hint += " ones newer; or hide that GPU (CUDA_VISIBLE_DEVICES)"
        report("gpu_architecture", "torch", place, what, hint)


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU of a compute capability runs code that is built for some architectures.

    Machine code (`sm_80`) runs on GPUs of the same major version and a minor one that is as high; PTX (`compute_80`) is
    compiled for any GPU that is as high. With the suffix `a`, both are for that architecture alone, with `f` for its
    family (CUDA C++ Programming Guide, "Compute Capabilities"). True also where a name is not known, or none is.

    Args:
        architectures: By nvcc's names.
        capability: Major and minor version, such as (8, 6).
    """
    return not architectures or any(_runs(name, capability) for name in architectures)


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    found = ARCHITECTURE.fullmatch(architecture)
    if found is None:
        return True
    lowest = (int(found["major"]), int(found["minor"]))
    if found["suffix"] == "a":
        return capability == lowest
    same_major = found["kind"] == "sm" or found["suffix"] == "f"
    return capability >= lowest and (capability[0] == lowest[0] or not same_major)
