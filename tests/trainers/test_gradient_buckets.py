"""Gradients at fixed places, and their average over workers of which each replays a graph of its own or none."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.builders.graphs import batch_of, plan_of, train
from tests.builders.ranks import spawn_ranks
from trainers.speedups.gradient_buckets import GradientBuckets


def _rank_trains(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    plan = dataclasses.replace(plan_of(Path(folder)), world_size=2)
    # Where one worker replays, the other has another shape, or is eager.
    batch = partial(batch_of, records_at=(2, 6) if rank else (5,))
    without, trained = (train(plan, graphs=on, rank=rank, batch=batch) for on in (False, True))
    communication = [len(event["step_part_seconds"]["communication"]) for event in trained.events]
    found = without.sha256, trained.sha256, trained.capture.num_replays, communication  # type: ignore[union-attr]
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.train
def test_two_workers_average_the_gradients_of_replays(tmp_path: Path) -> None:
    spawn_ranks(_rank_trains, str(tmp_path / "store"), str(tmp_path))
    for rank in (0, 1):
        without, trained, num_replays, communication = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert trained == without and num_replays >= 3 and communication == [2] * 6


def test_gradients_lie_in_buckets_in_the_order_of_their_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Flatten(), nn.Linear(4, 2))
    expected = torch.autograd.grad(model(torch.ones(1, 3, 3, 3)).sum(), list(model.parameters()))
    buckets = GradientBuckets(model.parameters(), world_size=1, bucket_bytes=50)
    addresses = [weight.grad.data_ptr() for weight in model.parameters() if weight.grad is not None]
    for _ in range(2):
        buckets.zero()
        buckets.expect_all()
        model(torch.ones(1, 3, 3, 3)).sum().backward()
        buckets.average()
    assert len(buckets.tensors()) == 2
    for weight, gradient, address in zip(model.parameters(), expected, addresses, strict=True):
        assert weight.grad is not None and torch.equal(weight.grad, gradient)
        assert (weight.grad.data_ptr(), weight.grad.stride()) == (address, weight.stride())


def test_a_weight_without_gradient_is_an_error() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    buckets = GradientBuckets([used, unused], world_size=1)
    buckets.expect_all()
    used.sum().backward()
    with pytest.raises(RuntimeError, match=r"got no gradient.*\(3,\)"):
        buckets.average()
