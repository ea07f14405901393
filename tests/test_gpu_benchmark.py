"""`make bench-gpu` without a GPU: its arithmetic, and all of it on a tiny model, with what needs a GPU not measured."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from benchmarks import gpu, gpu_plans, ours
from benchmarks.coco_shaped import JPEG_QUALITY, OBJECTS, SIZES, coco_shaped, photograph
from benchmarks.gpu_plans import CONTENDERS, LADDER, NOT_IN_THE_LADDER, TINY, Settings, ladder
from benchmarks.gpu_probe import count_waits
from benchmarks.gpu_report import Results, file_stem, page
from benchmarks.gpu_rows import TARGETS, GpuRow
from benchmarks.gpu_side import Side, SideError, shapes_met, shapes_of_events
from benchmarks.gpu_trace import read_trace
from trainers import rank
from trainers.contract.events import Event, StepsDone
from trainers.contract.plan import TrialPlan
from trainers.recipes import FAST, REFERENCE, Recipe


def block(seconds: float, steps: int = 4, joules: float | None = None) -> dict[str, Any]:
    return {
        "seconds": seconds, "steps": steps, "joules": joules, "step_seconds": [seconds / steps] * steps,
        "peak_allocated_gib": 2.5, "peak_reserved_gib": 3.0, "first_step": 0,
    }  # fmt: skip


def results(*rows: GpuRow) -> Results:
    machine = {"time": "2026-01-02 03:04:05 UTC", "processor": "Xeon", "cpus": 16, "system": "Linux",
               "python": "3.12.3", "versions": {"torch": "2.11.0"}}  # fmt: skip
    return Results(machine, "512 images", {}, rows=list(rows))


def test_a_trace_gives_launches_and_the_time_in_which_the_device_was_busy() -> None:
    def event(cat: str, name: str, ts: float, dur: float) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    found = read_trace(
        [
            event("cuda_runtime", "cudaLaunchKernel", 0, 5),
            event("cuda_driver", "cuLaunchKernelEx", 5, 5),
            event("cuda_runtime", "cudaGraphLaunch", 10, 5),
            event("cuda_runtime", "cudaStreamSynchronize", 15, 100),
            event("kernel", "gemm", 100, 400),
            event("kernel", "add", 300, 400),  # on another stream, half of it at the same time
            event("gpu_memcpy", "Memcpy HtoD", 1000, 100),
            {"ph": "M", "name": "process_name"},
        ],
        seconds=0.002,
        steps=2,
    )
    assert found and (found["launches"], found["graph_launches"], found["synchronizations"]) == (1.5, 0.5, 0.5)
    assert found["device_ms"] == pytest.approx(0.35) and found["busy"] == pytest.approx(0.35)
    assert found["kernels"][0] == {"name": "gemm", "ms": 0.2, "calls": 0.5}
    assert read_trace([event("cuda_runtime", "cudaLaunchKernel", 0, 5)], seconds=1.0, steps=1) is None


def test_the_ladder_turns_on_every_switch_of_the_fast_recipe_once() -> None:
    changed = {name for name in dataclasses.asdict(FAST) if getattr(FAST, name) != getattr(REFERENCE, name)}
    assert not set(LADDER) & set(NOT_IN_THE_LADDER)
    rungs = ladder()
    names = [name.partition(":")[0] for name in rungs][1:]
    assert sorted(names) == sorted(changed - set(NOT_IN_THE_LADDER))
    top = list(rungs.values())[-1]
    assert top == dataclasses.replace(FAST, **{name: getattr(REFERENCE, name) for name in NOT_IN_THE_LADDER})
    assert set(LADDER) | set(NOT_IN_THE_LADDER) <= {field.name for field in dataclasses.fields(Recipe)}


def test_every_row_has_all_its_loader_processes_from_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = dict.fromkeys(TrialPlan.__dataclass_fields__, 1) | {"loader_workers": 4, "most_loader_workers": 13}
    plan: Any = TrialPlan(**fields)  # type: ignore[arg-type]
    monkeypatch.setattr(gpu_plans, "training_plan", lambda *_: plan)
    bench = gpu.Bench(TINY, {}, results(), deadline=0.0, folder=tmp_path)  # no time is left: nothing is started
    bench.batches()
    bench.ladder()
    assert len(bench.entries) == len(CONTENDERS) + len(ladder())
    assert {entry.plan.loader_workers for entry in bench.entries} == {13}


@pytest.mark.parametrize(
    ("usable", "gpus", "cpus"),
    [(16, 1, 14), (224, 8, 14), (32, 4, 6), (4, 1, 2), (2, 2, 1), (1, 1, 1), (8, 0, 6)],
)
def test_a_row_has_its_gpus_share_of_the_usable_cpus_but_two(
    usable: int, gpus: int, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_plans, "num_usable_cpus", lambda: usable)
    monkeypatch.setattr(gpu_plans, "list_gpus", lambda: ["H100"] * gpus)
    train, _ = coco_shaped(tmp_path / "set", 2, 0.1)
    files = {"annotations": str(train.annotations), "images": str(train.images)}
    data = {f"{split}_{name}": path for split in ("train", "val") for name, path in files.items()}
    plan = gpu_plans.training_plan(Settings(), {"coco": {"name": "gpu", **data}}, FAST, 2, tmp_path)
    assert (plan.cpus_per_worker, plan.most_loader_workers) == (cpus, cpus - 1)


def test_a_row_is_rated_by_its_blocks_and_its_neighbours() -> None:
    row = GpuRow("fast", 16, TARGETS["fast", 16], device={"device": "NVIDIA H100 80GB HBM3"}, flops_per_image=1e12)
    row.blocks, row.ratios = [block(0.5, joules=320.0), block(0.8, joules=640.0)], [3.2, 2.0]
    assert row.rates == [128.0, 80.0] and row.images_per_second == 104.0 and row.ratio == 2.6
    assert row.joules_per_image == 7.5
    assert row.peak_gib == 3.0, "a replayed graph's tensors are reserved, not allocated"
    assert row.tflops == 104.0 and row.peak_share == pytest.approx(104 / 989)
    assert row.quantile(0.5) == pytest.approx(200) and row.quantile(0.0) == pytest.approx(125)
    found = results(row)
    assert file_stem(found) == "2026-01-02_h100-bench-gpu"
    assert found.below == ["fast, batch 16: images_per_second"], "waits were not measured, which is not below"
    assert "| fast | 16 | images_per_second | 104 | ≥ 110 | 150 | **below** |" in page(found)
    assert "| fast | 16 | waits | – | ≤ 1 | 0 | not measured |" in page(found)


def test_targets_count_only_on_the_devices_that_they_are_for() -> None:
    row = GpuRow("fast", 2, TARGETS["fast", 2], device={"device": "NVIDIA A10"}, waits=5.0)
    assert results(row).below == [] and "(for an H100)" in page(results(row))


@pytest.mark.parametrize(
    ("device", "peak"),
    [("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA H200 NVL", None), ("NVIDIA H100 PCIe", 756.5),
     ("NVIDIA H100 NVL", 835.5)],
)  # fmt: skip
def test_a_slice_and_a_pcie_card_are_not_judged_by_the_full_chip(device: str, peak: float | None) -> None:
    row = GpuRow("fast", 2, TARGETS["fast", 2], device={"device": device}, waits=5.0, flops_per_image=1e12)
    row.blocks = [block(0.5)]
    found = results(row)
    assert row.tflops == 16.0 and row.peak_share == (16 / peak if peak else None) and found.below == []
    text = page(found)
    assert (f"16-bit peak {peak} TFLOP/s" if peak else "its 16-bit peak is not in the table") in text
    assert "(for an H100)" in text and "**below**" not in text
    assert file_stem(found) == f"2026-01-02_{re.sub('[ .]', '-', device.lower())}-bench-gpu"


def test_what_was_not_measured_is_none_in_json_and_a_dash_on_the_page() -> None:
    row = GpuRow("fast", 16, problem="RuntimeError: no memory")
    values = row.to_dict()
    assert values["images_per_second"] is values["peak_share"] is values["joules_per_image"] is values["waits"] is None
    text = page(results(row))
    assert "- Failed: fast, batch 16: RuntimeError: no memory\n" in text
    assert "| fast | 16 | – | – | – | –, – | – | – | – | – |\n" in text


def test_shapes_are_new_where_they_are_met_first() -> None:
    found = shapes_met({0, 2, 4}, [0.4, 0.1, 0.2, 0.1, 0.3, 0.1])
    assert found == pytest.approx({"distinct": 3, "steps": 6, "new": 1 / 3, "new_ms": 300, "other_ms": 100})
    nothing = {"distinct": 0, "steps": 0, "new": None, "new_ms": None, "other_ms": None}
    assert shapes_met(set(), []) == nothing


def test_what_our_worker_says_of_its_batches_is_added_up() -> None:
    def window(first: int, **fields: Any) -> StepsDone:
        return StepsDone(
            trial="", attempt=0, rank=0, time=0.0, first_iteration=first, iteration=first + 2, num_images=4,
            seconds=1.0, step_seconds=(0.5, 0.5), data_seconds=(0.0, 0.0), part_seconds={}, losses={},
            learning_rate=None, peak_memory_gib=None, **fields,
        )  # fmt: skip

    windows: list[Event] = [
        window(0, new_shapes={"2x8x8": 0, "2x8x4": 1}, pixels=60, wasted_pixels=6, eager_batches={"masks": 1}),
        window(2, new_shapes={"2x4x8": 1}, pixels=40, wasted_pixels=4, eager_batches={"masks": 1}, num_graphs=3,
               capture_seconds=1.5, eager_steps={"warming up": 1}),
    ]  # fmt: skip
    found = shapes_of_events(windows)
    assert found is not None and (found["distinct"], found["steps"], found["new"], found["waste"]) == (3, 4, 0.5, 0.1)
    assert found["eager_batches"] == {"masks": 2} and found["eager_steps"] == {"warming up": 1}
    assert found["graphs"] == 3 and found["capture_seconds"] == 1.5
    assert shapes_of_events([window(0)]) is None and shapes_of_events([]) is None


def test_the_images_have_the_sizes_objects_and_details_that_the_tables_say(tmp_path: Path) -> None:
    assert sum(SIZES.values()) == sum(OBJECTS.values()) == 100
    train, _ = coco_shaped(tmp_path / "set", 24)
    values = json.loads(train.annotations.read_text())
    assert {(image["width"], image["height"]) for image in values["images"]} <= set(SIZES)
    assert len({annotation["id"] for annotation in values["annotations"]}) == len(values["annotations"])
    pixels = sum(image["width"] * image["height"] for image in values["images"])
    bits = 8 * sum(file.stat().st_size for file in train.images.iterdir())
    assert 4.0 < bits / pixels < 5.0, "COCO's files have 4.5"
    assert photograph(64, 48, np.random.default_rng(0)).std() > 20 and JPEG_QUALITY == 95


def test_waits_are_counted_by_the_line_that_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def set_mode(mode: str) -> None:
        if not modes:  # as torch does, once in a process
            text = (
                "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
            )
            warnings.warn(text, stacklevel=1)
        modes.append(mode)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    found: dict[str, Any] = {"steps": 2}
    with count_waits(found, on_gpu=True):
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert found["waits"] == 1.5 and modes == ["warn", "default"]
    ((line, count),) = found["waiting_lines"].items()
    assert "tests/test_gpu_benchmark.py:" in line and count == 1.5


def test_each_rank_under_torchrun_takes_the_gpu_of_its_local_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    for name, number in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(number))
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(rank, "Rank", lambda *_: SimpleNamespace(train=lambda _: calls.append("trains")))
    plan: Any = SimpleNamespace(device="cuda", trial_dir=str(tmp_path))
    ours.train_in_process(plan, lambda _: None, lambda: None)
    assert calls == [1, "nccl", "trains"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_benchmark_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    found = gpu.measure(TINY, gpu.PARTS, minutes=-1, to=tmp_path)
    assert found.rows and found.ladder and found.demo
    assert found.cut == found.everything and found.failed == []
    (text,) = (file.read_text() for file in tmp_path.glob("*.md"))
    assert "- Not measured: fast, batch 2: cut: " in text


@pytest.mark.train
def test_all_of_it_runs_on_a_tiny_model_and_a_row_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = {name: recipe for name, recipe in gpu_plans.DEMO.items() if name == "fast"}
    monkeypatch.setattr(gpu, "DEMO", demo)
    monkeypatch.setattr(gpu.gpu_plans, "ladder", lambda: dict(list(ladder().items())[:2]))
    assert gpu.main(["--tiny", "--to", str(tmp_path)]) == 1
    (file,) = tmp_path.glob("*.json")
    values = json.loads(file.read_text())
    rows = {row["name"]: row for row in values["rows"]}
    assert "CUDA" in rows["detectron2, SOLVER.AMP"]["problem"], "detectron2 has no AMP on CPUs"
    assert values["failed"] == ["detectron2, SOLVER.AMP"] and values["cut"] == []
    for name in ("plain", "reference", "fast"):
        row = rows[name]
        assert row["problem"] == "" and len(row["ratios"]) == 2 and row["images_per_second"] > 0
        assert row["waits"] is row["trace"] is row["joules_per_image"] is row["peak_gib"] is row["peak_share"] is None
        assert row["flops_per_image"] > 1e7 and row["shapes"]["distinct"] >= 1
    assert [row["name"] for row in values["ladder"]] == list(ladder())[:2]
    assert all(row["images_per_second"] for row in values["ladder"])
    assert values["demo"][0]["figures"]["iterations"] == 2 and values["demo"][0]["figures"]["box_ap"] is not None
    text = file.with_suffix(".md").read_text()
    assert "- Failed: detectron2, SOLVER.AMP, batch 2: AssertionError" in text and "Energy was not measured" in text


@pytest.mark.train
def test_a_process_that_dies_or_does_not_answer_is_an_error_in_a_line(tmp_path: Path) -> None:
    _, data = gpu_plans.dataset(TINY)
    plan = gpu_plans.training_plan(TINY, data, FAST, 2, tmp_path)
    side = Side("ours", plan)
    with pytest.raises(SideError, match="no answer in 0 s"):
        side.receive(0)
    psutil.Process(side.pid).kill()
    with pytest.raises(SideError, match="the process ended with -9"):
        side.receive(60)
    side.kill()
    assert side.end() == {}
