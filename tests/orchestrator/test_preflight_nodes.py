"""What is wrong on one node is found there, and judged by the driver."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.execution.nodes import Node
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from orchestrator.gpus import Gpu
from orchestrator.preflight import cluster as preflight
from orchestrator.preflight.fit import most_workers
from orchestrator.preflight.local import compiles_kernels
from orchestrator.preflight.node import FolderState, NodeReport, NodeRequest, inspect_node, judge_nodes
from tests.builders.bad_input import base_experiment
from trainers.recipes import RECIPES

GIB = 2**30


def trials(*world_sizes: int, device: str = "cuda", num_nodes: int | None = None) -> list[Any]:
    values = base_experiment(Path("/data"))
    values["trials"]["world_sizes"] = list(world_sizes)
    values["model"]["overrides"]["SOLVER.IMS_PER_BATCH"] = 48
    values["resources"] = {"device": device, "cpus_per_worker": 4, "num_nodes": num_nodes, "loader_workers": 0}
    return expand(parse_experiment(values, "test"), Hardware(), "/runs/x", Path("/data"))


def node(host: str, gpus: int, cpus: int) -> Node:
    return Node(id=host, host=host, address="127.0.0.1", num_gpus=gpus, num_cpus=cpus)


RUNS, CHECKPOINTS = "/shared/runs", "/shared/checkpoints"
REQUEST = NodeRequest({"the training images": "/data/train2017"}, {RUNS: "", CHECKPOINTS: ""}, CHECKPOINTS)
FINE = FolderState(100 * GIB, "", True)
GOOD = NodeReport(
    host="a", versions={"python": "3.11.9", "ray": "2.60.0"}, folders={RUNS: FINE, CHECKPOINTS: FINE},
    shared_memory_free=8 * GIB, gpus=[Gpu("H100", 0, 80 * GIB, 79 * GIB)],
)  # fmt: skip


def judge(*reports: NodeReport, needs_gpus: bool = True, compiles: bool = False) -> list[tuple[str, str, str]]:
    findings = judge_nodes(
        list(reports), REQUEST, versions=GOOD.versions, storage_bytes=10 * GIB, needs_gpus=needs_gpus,
        shared_memory_bytes={report.host: 2 * GIB for report in reports if report.host != "head"}, compiles=compiles,
    )  # fmt: skip
    return [(finding.code, finding.id, finding.what) for finding in findings]


def test_a_good_node_has_no_finding() -> None:
    assert judge(GOOD, replace(GOOD, host="b")) == []


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"unreadable": {"the training images": "No such file"}}, "node_data", "the training images cannot be read"),
        ({"folders": {CHECKPOINTS: FolderState(GIB)}}, "storage_small", "1.0 GiB free; the checkpoints of all trials"),
        ({"folders": {RUNS: FolderState(None, "Read-only")}}, "storage_unwritable", "Read-only"),
        ({"folders": {RUNS: FolderState(GIB, "", False)}}, "storage_not_shared", "does not see a file"),
        ({"shared_memory_free": 64 * 2**20}, "shared_memory", "64 MiB free"),
        ({"versions": {"python": "3.11.9", "ray": "2.59.0"}}, "node_versions", "ray 2.59.0 (driver: 2.60.0)"),
        ({"versions": {"python": "3.11.9"}}, "node_versions", "ray none (driver: 2.60.0)"),
        ({"gpus": [Gpu("H100", 5, 80 * GIB, 10 * GIB)]}, "gpu_busy", "GPU 5 (H100) has 10.0 GiB of 80.0 GiB free"),
    ],
)
def test_what_is_wrong_on_one_node_is_reported_with_its_name(change: dict[str, Any], code: str, words: str) -> None:
    ((found, place, what),) = judge(GOOD, replace(GOOD, host="b", **change))
    assert (found, place) == (code, "host b") and words in what


def test_a_head_without_workers_needs_no_shared_memory() -> None:
    assert judge(GOOD, replace(GOOD, host="head", shared_memory_free=64 * 2**20)) == []


def test_kernels_are_compiled_on_the_nodes_that_have_gpus() -> None:
    without = replace(GOOD, host="b", cannot_compile="a C compiler (gcc, clang, or what CC names)")
    ((code, place, what),) = judge(GOOD, without, replace(without, host="head", gpus=[]), compiles=True)
    assert (code, place) == ("no_compiler", "host b") and "a C compiler" in what
    assert judge(GOOD, without) == []


@pytest.mark.parametrize(
    ("recipe", "device", "compiles"),
    [("fast", "cuda", True), ("reference", "cuda", False), ("fast", "cpu", False)],
)
def test_the_fast_recipe_compiles_kernels_for_gpus(recipe: str, device: str, *, compiles: bool) -> None:
    planned = [replace(trial, recipe=RECIPES[recipe]) for trial in trials(1, device=device)]
    assert compiles_kernels(planned) is compiles


def test_what_compiling_needs_is_looked_for_where_triton_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/opt/compiler")
    (tmp_path / "Python.h").touch()
    for folder, missing in ((tmp_path, ""), (tmp_path / "none", "Python's headers")):
        monkeypatch.setattr(sysconfig, "get_paths", lambda _, folder=folder: {"include": str(folder)})
        found = inspect_node(NodeRequest({}, {})).cannot_compile
        assert found.startswith(missing) and bool(found) == bool(missing)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "a C compiler" in inspect_node(NodeRequest({}, {})).cannot_compile


@pytest.mark.parametrize(
    ("driver", "num_gpus", "levels"),
    [((13, 0), 8, []), ((13, 0), 7, ["error"]), ((13, 0), 0, ["error"]), (None, 0, ["warning"])],
)
def test_gpus_that_ray_counts_but_the_driver_does_not_are_reported(
    monkeypatch: pytest.MonkeyPatch, driver: tuple[int, int] | None, num_gpus: int, levels: list[str]
) -> None:
    gpus = [Gpu("H100", index, 80 * GIB, 79 * GIB) for index in range(num_gpus)]
    report = replace(inspect_node(NodeRequest({}, {})), gpus=gpus, cuda_driver=driver)
    monkeypatch.setattr(preflight, "call_on_nodes", lambda _, asked, __: dict.fromkeys(asked, report))
    monkeypatch.setattr(preflight, "check_torch", lambda _: [])
    planned = trials(8)
    experiment = parse_experiment(base_experiment(Path("/data")), "test")
    found = preflight.check_every_node(experiment, planned, [node("a", 8, 64)])
    assert [each.level for each in found if each.code == "gpus_missing"] == levels


def test_workers_are_expected_where_they_are_placed() -> None:
    """Eight workers go to one host of eight GPUs, also where a head and a second such host are there."""
    head, *hosts = node("head", 0, 8), node("a", 8, 64), node("b", 8, 64)
    (eight,), (sixteen,) = trials(8), trials(16)
    for each in hosts:
        assert most_workers(eight, each, [head, *hosts]) == most_workers(sixteen, each, [head, *hosts]) == 8
    assert most_workers(sixteen, head, [head, *hosts]) == 0
    (spread,) = trials(8, num_nodes=2)
    assert most_workers(spread, hosts[0], [head, *hosts]) == 4


def test_gpus_of_several_kinds_are_reported_unless_none_is_used() -> None:
    other = replace(GOOD, host="b", gpus=[Gpu("V100", 0, 16 * GIB, 16 * GIB)])
    assert [code for code, _, _ in judge(GOOD, other)] == ["gpu_kinds"]
    assert judge(GOOD, other, needs_gpus=False) == []


def test_a_node_is_inspected_without_leaving_anything(tmp_path: Path) -> None:
    (tmp_path / "probe").write_text("hello")
    before = sorted(tmp_path.iterdir())
    request = NodeRequest(
        {"this": str(tmp_path), "that": str(tmp_path / "none")},
        {str(tmp_path / "a" / "b"): str(tmp_path / "probe")}, probe_text="hello",
    )  # fmt: skip
    report = inspect_node(request)
    assert list(report.unreadable) == ["that"]
    (state,) = report.folders.values()
    assert state.probe_seen and state.free and not state.problem
    assert report.versions["python"] and report.versions["ray"]
    assert sorted(tmp_path.iterdir()) == before
    (state,) = inspect_node(replace(request, probe_text="other")).folders.values()
    assert state.probe_seen is False


def test_little_room_is_no_error_where_the_run_goes_on_without_checkpoints() -> None:
    tight = replace(GOOD, folders={CHECKPOINTS: FolderState(GIB)})
    for survives, level in ((True, "warning"), (False, "error")):
        (finding,) = judge_nodes(
            [tight], REQUEST, versions=GOOD.versions, storage_bytes=10 * GIB, shared_memory_bytes={}, needs_gpus=False,
            survives_storage=survives,
        )  # fmt: skip
        assert finding.level == level
