"""GPUs that a node's torch cannot use are a finding, by stand-ins for NVIDIA's driver and for builds of torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pynvml
import pytest
import torch

from orchestrator.execution import nodes
from orchestrator.execution.nodes import Node
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from orchestrator.findings import Finding
from orchestrator.gpus import Gpu
from orchestrator.preflight import cluster, torch_support
from orchestrator.preflight.node import NodeReport
from orchestrator.preflight.torch_support import check_torch, runs_on
from tests.builders.experiments import tiny_experiment
from trainers.canary import torch_build
from trainers.contract.torch_build import TorchBuild

WHEEL = TorchBuild("2.14.1+cu130", "13.0", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"))
H100, V100 = Gpu("H100", 0, capability=(9, 0)), Gpu("V100", 1, capability=(7, 0))


def node(host: str, num_gpus: int = 8) -> Node:
    return Node(id=host, host=host, address="127.0.0.1", num_gpus=num_gpus, num_cpus=64)


def check(
    monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, driver: tuple[int, int] | None = (13, 0), build: Any = WHEEL
) -> list[Finding]:
    monkeypatch.setattr(torch_support, "torch_builds", lambda asked, _: dict.fromkeys(asked, build))
    return check_torch({node("a"): NodeReport("a", {}, gpus=list(gpus), cuda_driver=driver)})


@pytest.mark.parametrize(
    ("driver", "built_with", "refused"),
    [
        ((13, 0), "13.0", False),
        ((13, 1), "13.0", False),
        ((13, 0), "13.2", False),  # of the same major version
        ((14, 0), "13.0", False),
        ((12, 8), "11.8", False),
        ((12, 4), "13.0", True),
        ((12, 9), "13.0", True),
        ((11, 8), "12.6", True),
        (None, "13.0", False),
    ],
)
def test_a_driver_of_an_older_major_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, driver: tuple[int, int] | None, built_with: str, refused: bool
) -> None:
    found = check(monkeypatch, H100, driver=driver, build=WHEEL._replace(cuda=built_with))
    assert [(finding.level, finding.code, finding.id) for finding in found] == [
        ("error", "driver_too_old", "host a")
    ] * refused


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 6), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_90", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_75 sm_80", (7, 0), False),
        ("sm_100", (10, 3), True),
        ("sm_120", (12, 1), True),
        ("sm_100", (12, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("sm_100f", (10, 3), True),
        ("sm_100f", (12, 0), False),
        ("sm_75 compute_75", (12, 0), True),
        ("compute_80", (7, 5), False),
        ("compute_90a", (10, 0), False),
        ("sm_future", (8, 0), True),
        ("", (8, 0), True),
    ],
)
def test_code_runs_where_nvidia_says_so(architectures: str, capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(architectures.split(), capability) is runs


def test_gpus_that_torch_has_no_code_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = check(monkeypatch, V100, V100._replace(number=4))
    assert (finding.level, finding.code, finding.id) == ("error", "gpu_architecture", "host a")
    assert "no code for GPU 1, 4 (V100, sm_70), but for sm_75, sm_80" in finding.what
    assert "built for sm_70" in finding.hint


def test_one_such_gpu_next_to_others_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = check(monkeypatch, H100, V100)
    assert (finding.level, finding.code) == ("warning", "gpu_architecture")


def test_a_capability_that_is_not_known_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(monkeypatch, V100._replace(capability=None)) == []


def test_torch_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = check(monkeypatch, H100, build=TorchBuild("2.14.1+cpu", None, ()))
    assert (finding.level, finding.code) == ("error", "torch_without_cuda") and "2.14.1+cpu" in finding.what


def test_a_node_that_does_not_answer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = check(monkeypatch, H100, build=TimeoutError("no answer within 120 s"))
    assert (finding.level, finding.code) == ("warning", "torch_unknown") and "no answer" in finding.what


def test_nodes_without_gpus_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Node] = []
    monkeypatch.setattr(torch_support, "torch_builds", lambda nodes, _: asked.extend(nodes) or {})
    screen = NodeReport("head", {}, gpus=[V100])  # a GPU that Ray is not to use
    check_torch({node("head", 0): screen, node("a"): NodeReport("a", {}), node("b"): NodeReport("b", {}, gpus=[H100])})
    assert [each.host for each in asked] == ["b"]


def test_the_build_is_read_without_a_gpu() -> None:
    build = torch_build()
    assert (build.version, build.cuda) == (str(torch.__version__), torch.version.cuda)
    assert bool(build.architectures) == (build.cuda is not None)


@pytest.mark.parametrize(
    ("version", "capability", "code"),
    [(12040, (9, 0), "driver_too_old"), (13000, (7, 0), "gpu_architecture"), (13000, (9, 0), None)],
)
def test_a_machine_whose_gpus_torch_cannot_use_is_refused_before_its_trials(
    monkeypatch: pytest.MonkeyPatch, version: int, capability: tuple[int, int], code: str | None
) -> None:
    answers: dict[str, Any] = {
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": str, "nvmlDeviceGetIndex": int, "nvmlDeviceGetName": lambda _: "GPU",
        "nvmlSystemGetCudaDriverVersion_v2": lambda: version,
        "nvmlDeviceGetCudaComputeCapability": lambda _: capability,
    }  # fmt: skip

    def refuse(_: str) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    for name in ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetDeviceHandleFromMigDeviceHandle"):
        answers[name] = refuse
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    for name in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", WHEEL.cuda)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(WHEEL.architectures))
    monkeypatch.setattr(nodes, "is_local", lambda: True, raising=False)
    monkeypatch.setattr(cluster, "list_nodes", lambda: [node("a", 1)])
    experiment = parse_experiment(tiny_experiment(resources={"device": "auto"}), "test")
    trials = expand(experiment, Hardware(num_gpus=1, num_cpus=64), "/runs/x", Path("/data"))
    assert [trial.device for trial in trials] == ["cuda"]
    found = cluster.preflight_cluster(experiment, trials)
    assert [(finding.level, finding.code) for finding in found] == [("error", code)] * (code is not None)


def test_each_node_of_a_joined_cluster_is_asked_for_its_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def call(function: Any, arguments: dict[Node, Any], *_: Any) -> dict[Node, Any]:
        if function is torch_build:
            return dict.fromkeys(arguments, WHEEL)
        report = cluster.inspect_node(cluster.NodeRequest({}, {}))
        return {each: replace(report, gpus=[H100], cuda_driver=drivers[each.host]) for each in arguments}

    drivers = {"a": (13, 0), "b": (12, 4), "c": (12, 4)}
    for module in (cluster, nodes):
        monkeypatch.setattr(module, "call_on_nodes", call)
    experiment = parse_experiment(tiny_experiment(resources={"device": "cuda"}), "test")
    trials = expand(experiment, Hardware(), str(tmp_path / "runs" / "x"), tmp_path)
    found = cluster.check_every_node(experiment, trials, [node(host, 1) for host in drivers])
    assert [(finding.level, finding.code, finding.id) for finding in found] == [
        ("error", "driver_too_old", "host b"), ("error", "driver_too_old", "host c")
    ]  # fmt: skip
