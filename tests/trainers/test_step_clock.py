"""The parts of a step, by a clock that the tests move, by the real one, and by the GPU's."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.builders.ranks import spawn_ranks
from trainers.step_clock import StepClock

CPU = torch.device("cpu")


class Time:
    """A clock that moves only as far as the test says."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds


def _step(
    clock: StepClock, model: nn.Module, device: torch.device = CPU, load: Callable[[], None] = lambda: None
) -> None:
    clock.begin()
    load()
    clock.mark("data")
    loss = model(torch.ones(2, 4, device=device)).sum()
    clock.mark("forward")
    loss.backward()
    clock.mark("backward")
    clock.mark("optimizer")


def test_the_parts_of_a_step_are_in_it_by_the_real_clock():
    model = nn.Linear(4, 4)
    clock = StepClock(CPU, model)
    began = time.perf_counter()
    for _ in range(3):
        _step(clock, model)
    took = time.perf_counter() - began
    steps, parts = clock.read()
    assert set(parts) == {"data", "forward", "backward", "optimizer"}
    assert all(len(values) == 3 and min(values) >= 0 for values in [steps, *parts.values()])
    rounding = 2e-5  # twelve parts, each rounded to a microsecond
    assert 0 < sum(sum(values) for values in parts.values()) <= sum(steps) + rounding
    assert sum(steps) <= took + rounding


def test_each_part_lasts_from_the_mark_before_to_its_own():
    now = Time()
    clock = StepClock(CPU, nn.Linear(4, 4), now)
    for seconds in (1.0, 2.0):
        clock.begin()
        for share, part in enumerate(("data", "forward", "backward", "optimizer"), start=1):
            now.pass_by(share * seconds)
            clock.mark(part)
    assert clock.read() == (
        [10.0, 20.0],
        {"data": [1.0, 2.0], "forward": [2.0, 4.0], "backward": [3.0, 6.0], "optimizer": [4.0, 8.0]},
    )


def test_what_lies_between_two_steps_counts_and_what_lies_between_two_windows_does_not():
    now = Time()
    clock = StepClock(CPU, nn.Linear(4, 4), now)
    for pause in (7.0, 3.0):
        now.pass_by(pause)
        clock.begin()
        now.pass_by(1.0)
        clock.mark("data")
    assert clock.read() == ([1.0, 4.0], {"data": [1.0, 1.0]})
    now.pass_by(5.0)
    clock.begin()
    now.pass_by(1.0)
    clock.mark("data")
    assert clock.read() == ([1.0], {"data": [1.0]})


class _Announcing(StepClock):
    """Releases a semaphore once the time at which its own gradients were ready has been taken."""

    def __init__(self, model: nn.Module, shared: Any, ready: Any) -> None:
        super().__init__(CPU, model, lambda: shared.value)
        self.ready = ready

    def own_gradients_ready(self) -> None:
        super().own_gradients_ready()
        self.ready.release()


def _slow_and_fast(rank: int, store: str, folder: str, shared: Any, fast_is_ready: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = DistributedDataParallel(nn.Linear(4, 4))
    clock = StepClock(CPU, model, lambda: shared.value) if rank else _Announcing(model, shared, fast_is_ready)

    def load(seconds: float = 5.0) -> None:
        if rank:
            assert fast_is_ready.acquire(timeout=120)
            shared.value += seconds

    # DistributedDataParallel rebuilds its buckets in the second forward pass, where all workers wait.
    for _ in range(2):
        _step(clock, model)
    for _ in range(2):
        load(seconds=0.0)
    clock.read()
    model.zero_grad()
    for _ in range(3):
        _step(clock, model, load=load)
    torch.save((*clock.read(), model.module.weight.grad), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.train
def test_the_fast_worker_waits_for_the_slow_ones_gradients(tmp_path):
    """By one clock for both, which only the slow worker moves, and only while the fast one waits for its gradients."""
    context = mp.get_context("spawn")
    shared, fast_is_ready = context.Value("d", 0.0), context.Semaphore(0)
    spawn_ranks(_slow_and_fast, str(tmp_path / "store"), str(tmp_path), shared, fast_is_ready)
    (fast_steps, fast, fast_grad), (slow_steps, slow, slow_grad) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert torch.equal(fast_grad, slow_grad) and torch.equal(fast_grad, torch.full((4, 4), 2.0) * 3)
    assert fast_steps == slow_steps == [5.0, 5.0, 5.0]
    nothing = dict.fromkeys(("data", "forward", "backward", "communication", "optimizer"), [0.0] * 3)
    assert fast == {**nothing, "communication": [5.0] * 3}
    assert slow == {**nothing, "data": [5.0] * 3}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_on_a_gpu_the_device_is_timed_and_not_the_asking():
    device = torch.device("cuda")
    model = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(16))).to(device)
    clock = StepClock(device, model)

    def window() -> tuple[float, list[float], dict[str, list[float]]]:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            clock.begin()
            clock.mark("data")
            loss = model(torch.ones(2048, 4096, device=device)).sum()
            clock.mark("forward")
            loss.backward()
            clock.mark("backward")
            clock.mark("optimizer")
        torch.cuda.synchronize()
        return time.perf_counter() - began, *clock.read()

    window()
    took, steps, parts = window()
    # Asking takes a hundredth of this; what a busy host adds between two kernels is far less than these margins.
    assert 0.5 * took < sum(steps) < 1.05 * took
    # A third of the products are the forward pass's, two thirds the backward pass's.
    assert 0.15 * took < sum(parts["forward"]) < sum(parts["backward"])
