"""What the speed recipes promise: the reference changes nothing, and each switch does what it says."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.ours import write_plan
from tests.builders.ranks import spawn_ranks
from tests.builders.recipes import plan_of, train
from tests.builders.training import last
from trainers import machine, mask_rcnn
from trainers.contract.channel import Channel, Placement
from trainers.contract.events import Event, LoopFinished, WorkerFailed, event_from_json
from trainers.contract.plan import TrialPlan
from trainers.contract.problems import ConfigurationError
from trainers.loading import batches_of_a_size
from trainers.rank import Rank
from trainers.recipes import FAST, PLAIN, RECIPES, REFERENCE, Recipe
from trainers.speedups.apply import agree_on_precision, process_settings, resolve_precision
from trainers.speedups.roi_pooling import SparsePooler


@pytest.fixture(autouse=True)
def local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.train
def test_the_reference_recipe_trains_the_same_weights_as_detectron2s_parts_bit_for_bit(tmp_path: Path) -> None:
    plain_hash, plain_figures = train(plan_of(tmp_path, PLAIN, "plain"))
    reference_hash, reference_figures = train(plan_of(tmp_path, REFERENCE, "reference"))
    assert reference_hash == plain_hash
    assert reference_figures == pytest.approx(plain_figures, abs=1e-6)


@pytest.mark.train
def test_plain_trained_after_fast_in_one_process_is_plain_trained_alone_bit_for_bit(tmp_path: Path) -> None:
    alone = plan_of(tmp_path, PLAIN, "alone")
    write_plan(alone, tmp_path / "plan.json")
    command = [sys.executable, "-m", "benchmarks.ours", str(tmp_path / "plan.json"), str(tmp_path / "events.jsonl")]
    subprocess.run(command, check=True, timeout=600)
    lines = (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    expected = [event.state_sha256 for event in map(event_from_json, lines) if isinstance(event, LoopFinished)]
    for precision in ("auto", "fp32"):  # Winograd's convolutions are of fp32 alone
        fast = dataclasses.replace(FAST, precision=precision)
        _, figures = train(plan_of(tmp_path, fast, f"fast_{precision}"))
        assert figures["box_ap"] is not None
    plain_hash, _ = train(plan_of(tmp_path, PLAIN, "plain"))
    assert [plain_hash] == expected


def test_the_ladder_only_ever_turns_switches_on() -> None:
    assert list(RECIPES) == ["plain", "reference", "pooling", "layout", "fast"]
    assert RECIPES["plain"] == Recipe()
    for lower, upper in itertools.pairwise(RECIPES.values()):
        changed = {f.name for f in dataclasses.fields(Recipe) if getattr(lower, f.name) != getattr(upper, f.name)}
        assert changed and all(getattr(lower, name) == getattr(Recipe(), name) for name in changed - {"mapper"})
    assert [recipe.mapper for recipe in RECIPES.values()] == ["detectron2", *["exact"] * 3, "fast"]


def test_auto_precision_is_what_the_device_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for capabilities, precision in (({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_tile": True}, "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities)
        assert resolve_precision("auto", cpu) == precision
    assert resolve_precision("auto", cuda) == "amp", "on a machine without the GPU that a plan is for"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, precision in (((7, 0), "amp"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, capability=capability: capability)
        assert resolve_precision("auto", cuda) == precision
    assert resolve_precision("bf16", cpu) == "bf16"


def _rank_starts(rank: int, store: str, plan: TrialPlan) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    bf16, host, events = rank == 1, f"host{rank}", list[Event]()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
        agree_on_precision("bf16", torch.device("cpu"), host)
        with pytest.raises(ConfigurationError) as caught:
            Rank(plan, 0, Placement(rank, 2, 0, 1, host), Channel(events.append, lambda _: "run")).train(0.0)
        found = "auto is not the same precision for all workers: it is bf16 on host1, fp32 on host0"
        assert str(caught.value).startswith(f"trials.switches.precision: {found}. Set it to ")
        assert last(events, WorkerFailed).failure == "configuration"
        bf16 = True
        agree_on_precision("auto", torch.device("cpu"), host)
    dist.destroy_process_group()


def test_workers_whose_auto_precisions_differ_do_not_start(tmp_path: Path) -> None:
    plan = dataclasses.replace(plan_of(tmp_path, dataclasses.replace(PLAIN, precision="auto"), "auto"), world_size=2)
    spawn_ranks(_rank_starts, str(tmp_path / "store"), plan)


def test_a_recipes_settings_of_the_process_end_with_it() -> None:
    before = machine.numerics(), cv2.getNumThreads()
    for tf32 in (True, False, None):
        for benchmark in (True, False):
            with process_settings(dataclasses.replace(FAST, tf32=tf32), torch.device("cuda"), benchmark):
                cv2.setNumThreads(0)  # as the fast mapper does
                found = machine.numerics()
                assert found["cudnn.benchmark"] == benchmark
                for name in ("cuda.matmul.allow_tf32", "cudnn.allow_tf32"):
                    assert found[name] == (before[0][name] if tf32 is None else tf32)
            assert (machine.numerics(), cv2.getNumThreads()) == before
    assert FAST.tf32 is True and PLAIN.tf32 is REFERENCE.tf32 is None


def test_the_fast_recipe_exchanges_the_poolers_and_keeps_the_names_of_weights(tmp_path: Path) -> None:
    models = []
    for recipe in (PLAIN, FAST):
        plan = plan_of(tmp_path, recipe, "x")
        models.append(mask_rcnn.build_detector(mask_rcnn.build_config(plan), plan))
    plain, fast = models
    assert [type(module) for module in fast.modules()].count(SparsePooler) == 2
    assert list(fast.state_dict()) == list(plain.state_dict())
    weight = fast.get_submodule("backbone.bottom_up.res2.0.conv2").weight
    assert isinstance(weight, torch.Tensor) and weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("most", [1, 3])
def test_only_images_of_one_size_are_detected_on_together_and_none_is_lost(most: int) -> None:
    kinds: np.ndarray[Any, Any] = np.array([(4, 6), (6, 4), (5, 5)], dtype=np.int32)
    sizes = kinds[np.random.default_rng(0).integers(0, 3, 20)]
    batches = batches_of_a_size(range(3, 20), sizes, most)
    assert sorted(index for batch in batches for index in batch) == list(range(3, 20))
    assert all(len(batch) <= most and len({tuple(sizes[i]) for i in batch}) == 1 for batch in batches)
    if most == 1:
        assert batches == [[index] for index in range(3, 20)]
