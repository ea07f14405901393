"""The process that evaluates concurrently shares the GPU of the weights, whichever thread starts it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainers import overlap as overlap_module
from trainers.evaluation_server import EvaluatorLostError
from trainers.overlap import Overlap, process_here


class OnGpu(Tensor):
    """In memory that says it is GPU 3's."""

    device = torch.device("cuda", 3)  # type: ignore[assignment]


class Model(nn.Module):
    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return {"weight": torch.ones(3).as_subclass(OnGpu)}


class Lost:
    """A process that is lost whenever it is to evaluate."""

    def evaluate(self, *_: Any) -> Any:
        raise EvaluatorLostError("gone")

    def end(self) -> None: ...


def test_a_lost_process_is_replaced_on_the_gpu_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, current, devices = torch.empty, threading.local(), list[str]()

    def set_device(device: torch.device) -> None:
        current.index = device.index

    def start(_: Any, device: str) -> Lost:
        devices.append(device)
        return Lost()

    monkeypatch.setattr(torch, "empty", lambda size, dtype, pin_memory: empty(size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "index", 0))  # each thread has its own
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(overlap_module, "EvaluatingProcess", start)
    set_device(OnGpu.device)
    plan: Any = SimpleNamespace(device="cuda")
    overlap = Overlap(plan, [Model()], process_here)
    overlap.begin(1, [Model()], since=time.perf_counter())
    while overlap.wait():
        pass
    overlap.close()
    (job,) = overlap.fetch()
    assert isinstance(job.error, EvaluatorLostError) and job.num_lost == 3
    assert devices == ["cuda:3"] * 3
