"""`checkpoint_period: auto`: when checkpoints are taken follows from what they cost, and training does not notice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.builders.ranks import spawn_ranks
from tests.builders.training import last, plan_of, train
from tests.builders.trials import plan as plan_without_data
from trainers.checkpoint_hook import CheckpointHook
from trainers.contract.checkpoint_interval import advised_checkpoint_seconds, default_mtbf_seconds
from trainers.contract.events import CheckpointSaved, LoopFinished
from trainers.contract.plan import TrialPlan


def test_the_interval_is_young_and_dalys():
    assert advised_checkpoint_seconds(2.0, 3600.0) == pytest.approx(120.0)
    assert advised_checkpoint_seconds(0.0, 3600.0) == 0.0


def test_a_trial_on_two_hosts_fails_twice_as_often():
    assert default_mtbf_seconds(1) == pytest.approx(1000 / 6.5 * 86_400)
    assert default_mtbf_seconds(2) == pytest.approx(default_mtbf_seconds(1) / 2)


def _auto(plan: TrialPlan, folder: Path, mtbf_hours: float) -> TrialPlan:
    solver = dataclasses.replace(plan.solver, checkpoint_period=2, auto_checkpoints=True)
    return dataclasses.replace(plan, solver=solver, mtbf_hours=mtbf_hours, checkpoint_dir=str(folder))


@pytest.mark.train
def test_a_period_that_sets_itself_changes_no_weights_and_resumes_exactly(tmp_path: Path):
    fixed = plan_of(tmp_path, "mask_rcnn")
    expected = last(train(fixed), LoopFinished).state_sha256
    # Whatever a checkpoint costs here: with a failure every few nanoseconds, the best interval is shorter than a step;
    # with one in 10,000 years, longer than the run.
    often = train(_auto(fixed, tmp_path / "often", 1e-12))
    rarely = train(_auto(fixed, tmp_path / "rarely", 1e8))
    assert [event.iteration for event in often if isinstance(event, CheckpointSaved)] == list(range(2, 13))
    assert [event.iteration for event in rarely if isinstance(event, CheckpointSaved)] == [2, 12]
    broken = _auto(fixed, tmp_path / "broken", 1e-12)
    train(broken, die_at=7)
    resumed = train(broken, attempt=1)
    assert {last(events, LoopFinished).state_sha256 for events in (often, rarely, resumed)} == {expected}


class _Store:
    endings: list[bool]

    def save(self, *_: Any, ending: bool, **__: Any) -> None:
        self.endings = [ending]


def _loop(**fields: Any) -> Any:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return SimpleNamespace(
        model=model, optimizer=optimizer, scheduler=optimizer, scaler=optimizer, iteration=2, stop_reason=None,
        average=None, device=torch.device("cpu"), activity=SimpleNamespace(enter=lambda *_: None), **fields,
    )  # fmt: skip


def _evaluation(take_found: Callable[..., None] = lambda *_, **__: None) -> Any:
    return SimpleNamespace(
        take_found=take_found, pending=lambda _: False, saved=lambda _: [], awaited=set, last_scores=None,
        last_iteration=0,
    )  # fmt: skip


def _two_ranks(rank: int, folder: str, found: Any) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=600)
    )
    solver = {"checkpoint_period": 2, "auto_checkpoints": True, "max_iter": 10_000}
    # A rank that measures steps 100 times as long as rank 0's, and knows of no stall, still does as rank 0.
    loop = _loop(rank=rank, window=SimpleNamespace(step_seconds=[1e-4 if rank == 0 else 1e-2]))
    store: Any = _Store()
    hook = CheckpointHook(plan_without_data(mtbf_hours=1.0, **solver), 0, 1, store, _evaluation(), lambda: None)
    assert not hook.due(1, ending=False) and hook.due(1, ending=True) and hook.due(2, ending=False)
    hook.run(loop)
    found.put(next(iteration for iteration in range(3, 10**9) if hook.due(iteration, ending=False)))
    dist.destroy_process_group()


def test_all_ranks_take_the_next_checkpoint_together(tmp_path: Path):
    found = mp.get_context("spawn").SimpleQueue()
    spawn_ranks(_two_ranks, str(tmp_path), found)
    first, second = found.get(), found.get()
    assert first == second > 3


@pytest.mark.parametrize("ends", [False, True])
def test_the_store_learns_which_checkpoint_is_the_last(ends: bool):
    def find_the_target(loop: Any, **_: Any) -> None:
        loop.stop_reason = "target" if ends else None

    store: Any = _Store()
    CheckpointHook(plan_without_data(world_size=1), 0, 1, store, _evaluation(find_the_target), lambda: None).run(
        _loop(rank=0)
    )
    assert store.endings == [ends]
