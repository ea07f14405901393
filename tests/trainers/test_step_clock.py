import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainers.step_clock import StepClock


def _train(clock: StepClock, model: nn.Module, device: torch.device, seconds: float, steps: int = 3) -> None:
    for _ in range(steps):
        clock.begin()
        time.sleep(seconds)
        clock.mark("data")
        loss = model(torch.ones(2, 4, device=device)).sum()
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        clock.mark("optimizer")


def test_the_parts_of_a_step_are_in_it_and_leave_little_over():
    model = nn.Linear(4, 4)
    clock = StepClock(torch.device("cpu"), model)
    began = time.perf_counter()
    _train(clock, model, torch.device("cpu"), 0.02)
    took = time.perf_counter() - began
    steps, parts = clock.read()
    assert set(parts) == {"data", "forward", "backward", "optimizer"}
    assert all(len(values) == 3 for values in [steps, *parts.values()])
    assert all(wait >= 0.02 for wait in parts["data"])
    assert sum(steps) == pytest.approx(took, abs=0.005)
    assert sum(steps) >= sum(sum(values) for values in parts.values()) - 1e-4


def test_what_lies_between_two_steps_counts_and_what_lies_between_two_windows_does_not():
    clock = StepClock(torch.device("cpu"), nn.Linear(4, 4))
    for pause in (0.0, 0.03):
        time.sleep(pause)
        clock.begin()
        clock.mark("data")
    steps, parts = clock.read()
    assert steps[1] >= 0.03 and parts["data"][1] < 0.03
    time.sleep(0.03)
    clock.begin()
    clock.mark("data")
    (only,), _ = clock.read()
    assert only < 0.03


def _slow_and_fast(rank: int, store: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 4))
    clock = StepClock(torch.device("cpu"), model)
    _train(clock, model, torch.device("cpu"), 0.1 if rank else 0.0)
    steps, parts = clock.read()
    torch.save((steps, parts, model.module.weight.grad), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.train
def test_the_fast_worker_waits_for_the_slow_ones_gradients(tmp_path):
    mp.spawn(_slow_and_fast, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    (fast_steps, fast, fast_grad), (slow_steps, slow, slow_grad) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert torch.equal(fast_grad, slow_grad) and torch.equal(fast_grad, torch.full((4, 4), 2.0) * 3)
    # Every step the slow worker loads 0.1 s longer; the fast one spends them waiting.
    assert sum(fast["communication"]) > 0.2 > sum(slow["communication"])
    assert sum(fast_steps) == pytest.approx(sum(slow_steps), rel=0.5)


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
    assert sum(steps) == pytest.approx(took, rel=0.05)
    # The backward pass has twice the forward's products.
    assert 1.5 < sum(parts["backward"]) / sum(parts["forward"]) < 2.5
