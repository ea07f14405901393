"""Which GPUs there are, by a stand-in for NVIDIA's driver: those that CUDA would see, whatever it refuses to say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from orchestrator import gpus
from orchestrator.data.init import Machine
from orchestrator.experiment.plan import Hardware
from orchestrator.findings import Finding
from orchestrator.preflight.node import NodeReport, NodeRequest, judge_nodes

GIB = 2**30
UUIDS = ["GPU-aa11", "GPU-aa22", "GPU-bb33"]
SLICE = "MIG-cc44"
"""A slice of the second GPU."""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine of three GPUs, the first of which is in use; attributes say what the driver answers."""
    made = SimpleNamespace(memory=dict.fromkeys((*UUIDS, SLICE), (80 * GIB, 79 * GIB)), hidden=set(), divided=set())
    made.memory[UUIDS[0]] = (80 * GIB, 10 * GIB)

    def handle(index: int) -> str:
        if index in made.hidden:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        return UUIDS[index]

    def by_uuid(uuid: str) -> str:
        if uuid != SLICE:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def parent(name: str) -> str:
        if name != SLICE:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return UUIDS[1]

    def memory(name: str) -> Any:
        if name not in made.memory:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        total, free = made.memory[name]
        return SimpleNamespace(total=total, free=free)

    def mig_mode(name: str) -> list[int]:
        if name == UUIDS[2]:  # older than slices are
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(name in made.divided), 0]

    answers: dict[str, Any] = {
        "nvmlDeviceGetMigMode": mig_mode,
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: len(UUIDS),
        "nvmlDeviceGetHandleByIndex": handle, "nvmlDeviceGetHandleByUUID": by_uuid, "nvmlDeviceGetUUID": str,
        "nvmlDeviceGetIndex": UUIDS.index, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": parent,
        "nvmlDeviceGetName": lambda name: "H100 MIG 1g.10gb" if name == SLICE else "H100",
        "nvmlDeviceGetMemoryInfo": memory, "nvmlDeviceGetCudaComputeCapability": lambda _: (9, 0),
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return made


def findings_of(found: list[gpus.Gpu]) -> list[Finding]:
    report = NodeReport("a", {}, gpus=found)
    return judge_nodes(
        [report], NodeRequest({}, {}), versions={}, storage_bytes=0, shared_memory_bytes={}, needs_gpus=True
    )


def judge(found: list[gpus.Gpu]) -> list[tuple[str, str]]:
    return [(finding.code, finding.file) for finding in findings_of(found)]


def levels_of(found: list[gpus.Gpu]) -> list[str]:
    return [finding.level for finding in findings_of(found)]


def test_gpus_are_listed_with_their_memory(driver: SimpleNamespace) -> None:
    assert gpus.list_gpus()[1:] == [gpus.Gpu("H100", index, 80 * GIB, 79 * GIB, (9, 0)) for index in (1, 2)]
    assert judge(gpus.list_gpus()) == [("gpu_busy", "GPU 0")]


def test_a_gpu_whose_slices_are_not_named_is_reported(driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    del driver.memory[UUIDS[0]]
    driver.divided = {UUIDS[1]}
    assert [gpu.is_divided for gpu in gpus.list_gpus()] == [False, True, False]
    assert judge(gpus.list_gpus()) == [("gpu_divided", "GPU 1")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", SLICE)
    assert judge(gpus.list_gpus()) == []
    one, two = (gpus.Gpu("H100", index, is_divided=True) for index in (0, 1))
    levels = [levels_of([one]), levels_of([one, two])]
    assert levels == [["warning"], ["error"]], "the second worker of a host would find none"


@pytest.mark.parametrize("answer", [None, (0, 0)])
def test_memory_that_is_not_known_hides_no_gpu_and_is_no_finding(
    driver: SimpleNamespace, answer: tuple[int, int] | None
) -> None:
    del driver.memory[UUIDS[0]]
    if answer:
        driver.memory[UUIDS[0]] = answer
    found = gpus.list_gpus()
    assert [(gpu.number, gpu.total_bytes) for gpu in found] == [(0, None), (1, 80 * GIB), (2, 80 * GIB)]
    assert judge(found) == []
    assert Machine.local()[:2] == (3, 80.0)
    driver.memory.clear()
    assert Machine.local()[:2] == (3, 0.0)


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("1", [1]),
        ("2, 0", [2, 0]),
        ("", []),
        ("-1", []),
        ("1,-1,2", [1]),
        ("0,7,1", [0]),
        ("1,1", []),
        ("NoDevFiles", []),
        ("GPU-bb33,GPU-aa1", [2, 0]),
        ("GPU-aa", []),  # two have such a UUID
        ("GPU-ff", []),
        ("MIG-cc44", [1]),
        ("MIG-dd55", []),
    ],
)
def test_only_gpus_that_cuda_sees_count(
    driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, visible: str, indices: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.number for gpu in gpus.list_gpus()] == indices
    assert Hardware.local().num_gpus == len(indices)


def test_a_slice_of_a_gpu_is_listed_by_its_own_name(driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", SLICE)
    assert gpus.list_gpus() == [gpus.Gpu("H100 MIG 1g.10gb", 1, 80 * GIB, 79 * GIB, (9, 0))]


def test_a_busy_gpu_that_the_run_does_not_see_is_no_finding(
    driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    assert judge(gpus.list_gpus()) == []


def test_numbers_skip_gpus_that_this_user_may_not_open(
    driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.hidden.add(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert [gpu.number for gpu in gpus.list_gpus()] == [1]


def test_without_a_driver_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert gpus.list_gpus() == []
