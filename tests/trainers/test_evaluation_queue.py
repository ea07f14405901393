"""Every evaluation that is begun has its scores once, whatever happens to the process that makes them."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.builders.waiting import wait_for
from trainers import evaluation_server
from trainers import overlap as overlap_module
from trainers.contract import clock
from trainers.contract.plan import TrialPlan
from trainers.evaluation import Scores
from trainers.evaluation_hook import EvaluationHook
from trainers.evaluation_server import EvaluationServer, EvaluatorLostError, views
from trainers.overlap import Job, Overlap, process_here
from trainers.recipes import Recipe


class StandIn:
    """Takes weights that are all the same number for the box AP; `hold` and `fail` in its folder make it do so."""

    def __init__(self, plan: Any, device: str, anchor: str) -> None:
        self.folder = Path(plan.trial_dir)

    def set_up(self) -> None: ...

    def evaluate(self, iteration: int, values: list[dict[str, float]], weights: bytes) -> Any:
        while (self.folder / "hold").exists():
            time.sleep(0.001)
        if (fail := self.folder / f"fail{iteration}").exists():
            fail.unlink()
            return MemoryError("no memory left")
        if (self.folder / f"die{iteration}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        block = torch.from_numpy(np.frombuffer(weights, np.uint8).copy())
        numbers = torch.cat([view.flatten() for view in views(block, nn.Linear(3, 5).state_dict().values())])
        assert len(numbers.unique()) == 1, "weights of two iterations in one snapshot"
        file = "x" * 300_000  # more than a pipe takes at once: death may come in the middle of an answer
        return [Scores({"box_ap": float(numbers[0])}, 1.0, None, {}, details_file=file)], 0.5


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of a trial's plan what is needed here."""

    trial_dir: str
    timeouts: dict[str, float] = dataclasses.field(default_factory=dict)
    device: str = "cpu"


Make = Callable[..., Overlap]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Evaluates by `StandIn`, in processes that are forked because that takes no time."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(evaluation_server, "EvaluationServer", StandIn)
    made: list[Overlap] = []

    def make_one(**timeouts: float) -> Overlap:
        plan: Any = Plan(str(tmp_path), timeouts)
        made.append(Overlap(plan, [weights_of(0)], process_here))
        return made[-1]

    yield make_one
    for each in made:
        each.close()
    assert not multiprocessing.active_children()


def weights_of(iteration: int) -> nn.Module:
    model = nn.Linear(3, 5)
    for parameter in model.parameters():
        nn.init.constant_(parameter, iteration)
    return model


def begin(overlap: Overlap, *iterations: int) -> None:
    for iteration in iterations:
        overlap.begin(iteration, [weights_of(iteration)], since=time.perf_counter())


def finish(overlap: Overlap) -> list[Job]:
    while overlap.wait():
        pass
    return overlap.fetch()


def found(jobs: list[Job]) -> dict[int, float | None]:
    assert len({job.iteration for job in jobs}) == len(jobs)
    return {job.iteration: job.scores[0].figures["box_ap"] for job in jobs}


@pytest.mark.parametrize("seed", range(30))
def test_each_figure_comes_once_and_in_order_though_the_process_is_killed_at_any_moment(
    seed: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap_module, "MAX_STARTS", 1000)
    draw, overlap, jobs = np.random.default_rng(seed), make(), list[Job]()
    for iteration in range(1, 9):
        begin(overlap, iteration)
        for process in multiprocessing.active_children():
            time.sleep(draw.uniform(0, 0.004))
            if draw.random() < 0.7:
                process.kill()
        time.sleep(draw.uniform(0, 0.004))
        jobs += overlap.fetch()
    jobs += finish(overlap)
    assert sorted(itertools.chain(found(jobs), *(job.left_out for job in jobs))) == list(range(1, 9))
    assert all(iteration == ap for iteration, ap in found(jobs).items())
    assert list(found(jobs)) == sorted(found(jobs)) and 8 in found(jobs)
    assert not overlap.fetch() and not overlap.in_progress()


def test_at_most_one_waits_and_what_is_due_meanwhile_is_left_out(make: Make, tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    overlap = make()
    begin(overlap, 1, 2, 3, 4)  # returns, though the first is in progress
    assert overlap.in_progress() == {1, 4} and not overlap.fetch()
    (tmp_path / "hold").unlink()
    jobs = finish(overlap)
    assert found(jobs) == {1: 1.0, 4: 4.0}
    assert [job.left_out for job in jobs] == [(), (2, 3)] and all(job.stall_seconds > 0 for job in jobs)


def test_a_checkpoint_has_the_evaluations_in_progress_for_a_later_start(make: Make, tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    first = make()
    begin(first, 1, 2, 3)
    state = tmp_path / "state"
    torch.save(first.saved(3), state)  # that of 3 is made from the weights of its own checkpoint
    assert [each["iteration"] for each in first.saved(3)] == [1]
    torch.save(first.saved(4), state)
    first.close()
    (tmp_path / "hold").unlink()
    second = make()
    second.begin_again(torch.load(state, weights_only=True))
    jobs = finish(second)
    assert found(jobs) == {1: 1.0, 3: 3.0} and [job.left_out for job in jobs] == [(), (2,)]


def test_what_has_ended_but_was_not_fetched_is_in_the_checkpoint(make: Make) -> None:
    overlap = make()
    begin(overlap, 1)
    overlap.wait()
    (saved,) = overlap.saved(2)
    assert saved["iteration"] == 1 and saved["weights"].view(torch.float32)[0] == 1.0
    assert found(overlap.fetch()) == {1: 1.0} and not overlap.saved(2)


def test_an_evaluation_is_begun_three_times_and_then_given_up(make: Make, tmp_path: Path) -> None:
    (tmp_path / "die1").touch()
    overlap = make()
    begin(overlap, 1)
    (job,) = finish(overlap)
    assert isinstance(job.error, EvaluatorLostError) and job.num_lost == 3 and not job.scores
    assert "after 1 iterations was lost: its process was killed (SIGKILL)" in str(job.error)


@pytest.mark.parametrize(
    ("error", "ends_with_one", "left_out"),
    [
        (EvaluatorLostError("no room"), True, True),
        (EvaluatorLostError("no room"), False, False),
        (MemoryError("too much"), True, False),
    ],
)
def test_one_that_is_given_up_is_left_out_where_the_workers_make_the_last_one(
    error: Exception, ends_with_one: bool, left_out: bool
) -> None:
    solver = SimpleNamespace(eval_period=4, max_iter=12 if ends_with_one else 13, evaluate_at_end=False)
    plan: Any = SimpleNamespace(solver=solver, patience=None, min_improvement=0.0)
    sent: list[dict[str, Any]] = []
    unused: Any = None
    activity: Any = SimpleNamespace()
    hook = EvaluationHook(plan, [], unused, 1, lambda _, **fields: sent.append(fields), unused, activity)
    job = Job(8, [], 0, None, left_out=(4,), stall_seconds=0.5, error=error)
    hook.overlap = SimpleNamespace(fetch=lambda: [job])  # type: ignore[assignment]
    if left_out:
        assert hook.wanted_end() is None
        message = "no room; it is left out"
        assert sent == [{"iteration": 8, "message": message, "left_out": (4,), "stall_seconds": 0.5}]
    else:
        with pytest.raises(type(error), match=str(error)):
            hook.wanted_end()
        assert not sent and activity.iteration == 8


def test_one_that_runs_out_of_memory_is_begun_again_in_another_process(make: Make, tmp_path: Path) -> None:
    (tmp_path / "fail1").touch()
    overlap = make()
    wait_for(lambda: multiprocessing.active_children())
    (before,) = multiprocessing.active_children()
    begin(overlap, 1)
    (job,) = finish(overlap)
    (after,) = multiprocessing.active_children()
    assert found([job]) == {1: 1.0} and job.num_lost == 1 and before.pid != after.pid


def test_one_that_takes_too_long_is_begun_again(make: Make, tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    overlap = make(evaluation=0.2)
    begin(overlap, 1)
    (job,) = finish(overlap)
    assert "took longer than 0.2 s (faults.timeouts.evaluation)" in str(job.error) and job.num_lost == 3


def test_a_wait_ends_when_the_evaluation_is_begun_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap_module, "MAX_STARTS", 1000)
    (tmp_path / "hold").touch()
    overlap = make()
    begin(overlap, 1, 2)

    def kill_until_it_ended(waiting: Future[bool]) -> bool:
        for process in multiprocessing.active_children():
            process.kill()
        return waiting.done()

    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(overlap.wait)
        wait_for(lambda: kill_until_it_ended(waiting))
    assert waiting.result() and overlap.in_progress() == {1, 2}
    (tmp_path / "hold").unlink()
    assert found(finish(overlap)) == {1: 1.0, 2: 2.0}


class Rounds:
    """Two evaluations in progress, of which one ends each time that it is waited for."""

    def __init__(self) -> None:
        self.in_progress = 2

    def wait(self) -> bool:
        self.in_progress -= 1
        return self.in_progress > 0

    def fetch(self) -> list[Job]:
        assert not self.in_progress
        return []


def test_all_ranks_begin_a_section_for_each_evaluation_that_they_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[float] = []  # of rank 0, which another one gets in their order
    monkeypatch.setattr(dist, "broadcast", lambda number, src: numbers.append(number.item()))
    sections: list[list[str]] = [[], []]
    for rank, overlap in enumerate((Rounds(), None)):
        if rank:
            monkeypatch.setattr(dist, "broadcast", lambda number, src: number.fill_(numbers.pop(0)))
        plan: Any = SimpleNamespace(world_size=2, patience=None, min_improvement=0.0)
        unused: Any = None
        hook = EvaluationHook(plan, [], unused, 1, unused, unused, unused)
        hook.overlap = overlap  # type: ignore[assignment]
        activity = SimpleNamespace(enter=sections[rank].append)
        loop: Any = SimpleNamespace(activity=activity, device=torch.device("cpu"), stop_reason=None)
        hook.take_found(loop, wait=True)
    assert sections == [["evaluation"] * 2] * 2 and not numbers


def test_no_process_is_started_where_nothing_is_evaluated_before_the_end() -> None:
    solver: Any = type("Solver", (), {"eval_period": 9, "max_iter": 9})
    plan: Any = type("Plan", (), {"solver": solver, "evaluates_concurrently": True})
    start: Any = None
    with overlap_module.overlap(plan, [], 0, start, []) as nothing:
        assert nothing is None


class OtherArgumentsError(Exception):
    """Cannot be made again from what it was made of."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} {second}")


@pytest.mark.parametrize("error", [OtherArgumentsError(1, 2), ValueError(lambda: None)], ids=["arguments", "content"])
def test_a_failure_that_no_other_process_could_read_comes_with_its_text_and_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(server: EvaluationServer, address: str) -> None:
        raise error

    monkeypatch.setattr(EvaluationServer, "_set_up", fail)
    plan: Any = TrialPlan(**dict.fromkeys(TrialPlan.__dataclass_fields__, 1) | {"recipe": Recipe()})
    server = EvaluationServer(plan, "cpu", clock.anchor())
    server.set_up()
    found = server.evaluate(1, [{}], b"")
    assert isinstance(found, RuntimeError) and str(found) == f"{type(error).__name__}: {error}"
    assert "raise error" in found.__notes__[0]
