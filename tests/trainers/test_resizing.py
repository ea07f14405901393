"""A trial that runs with fewer workers than planned, or with more again, trains what it would have trained."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders.graphs import batch_of, plan_of, train
from tests.builders.ranks import spawn_ranks
from tests.builders.training import last
from tests.builders.training import plan_of as plan_of_rank
from tests.builders.training import train as train_rank
from trainers import loading, mask_rcnn
from trainers.contract.events import LoopFinished, StepsDone
from trainers.training_order import Place, TrainingOrder, random_subset, repeated, training_epoch, whole

EPOCHS = {
    "whole": whole,
    "repeated": lambda size: repeated(torch.linspace(1.0, 2.7, size)),
    "subset": lambda size: random_subset(size, 0.6, 3),
}


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A planned number of workers, and how many workers trained how many steps, one after the other."""
    planned = draw(st.integers(1, 8))
    steps = st.tuples(st.sampled_from(divisors(planned)), st.integers(1, 3))
    return planned, draw(st.lists(steps, min_size=1, max_size=4))


@settings(max_examples=30, deadline=None)
@given(
    schedule=schedules(),
    wide=st.lists(st.booleans(), min_size=5, max_size=40),
    batch=st.integers(1, 3),
    parts=st.integers(1, 2),
    kind=st.sampled_from(list(EPOCHS)),
)
def test_every_step_has_the_batches_of_the_undisturbed_run_whatever_the_sizes_were(
    schedule: tuple[int, list[tuple[int, int]]], wide: list[bool], batch: int, parts: int, kind: str
) -> None:
    planned, sizes = schedule
    draw = EPOCHS[kind](len(wide)).draw

    def order(rank: int, skip: int = 0, num_ranks: int = 1) -> Iterator[list[Place]]:
        return iter(TrainingOrder(draw, wide, batch * parts, 7, rank, planned, skip, parts, num_ranks))

    undisturbed = [order(rank) for rank in range(planned)]
    trained: Counter[Place] = Counter()
    done = 0
    for size, steps in sizes:
        each = planned // size
        workers = [order(worker * each, done, each) for worker in range(size)]
        for _ in range(steps):
            step = [list(itertools.islice(worker, each * parts)) for worker in workers]
            expected = [list(itertools.islice(rank, parts)) for rank in undisturbed]
            assert list(itertools.chain(*step)) == list(itertools.chain(*expected))
            trained.update(place for batches in step for one in batches for place in one)
        done += steps
    assert set(trained.values()) == {1}, "no place of the order is trained twice"
    if not any(wide):  # none waits for others of its kind: those of the steps are the first of the order
        assert sorted(position for position, _ in trained) == list(range(done * batch * parts * planned))


def test_two_four_and_two_workers_see_each_image_once_in_each_epoch() -> None:
    size, planned, batch = 32, 4, 2
    seen: list[int] = []
    for workers, first, end in ((2, 0, 3), (4, 3, 9), (2, 9, 12)):
        each = planned // workers
        orders = [
            iter(TrainingOrder(whole(size).draw, [False] * size, batch, 5, worker * each, planned, first, 1, each))
            for worker in range(workers)
        ]
        for _ in range(first, end):
            seen += [index for order in orders for one in itertools.islice(order, each) for _, index in one]
    assert [sorted(seen[first : first + size]) for first in range(0, len(seen), size)] == [list(range(size))] * 3


def test_the_loader_of_a_worker_goes_on_with_what_it_stands_for(tmp_path: Path) -> None:
    """What is read from disk, augmented at its place of the order, after 3 steps with four workers of two batches."""
    plan = dataclasses.replace(plan_of_rank(tmp_path, "mask_rcnn"), world_size=4, accumulate=2)
    plan = dataclasses.replace(plan, solver=dataclasses.replace(plan.solver, global_batch_size=16))
    cfg = mask_rcnn.build_config(plan)
    mask_rcnn.register(cfg, plan.train)
    records = loading.training_records(cfg, plan)
    images = loading.training_images(cfg, plan, records, mask_rcnn.build_detector(cfg, plan))
    epoch = training_epoch(cfg, records, plan.seed)

    def read(size: int, rank: int) -> list[tuple[tuple[str, ...], float]]:
        resized = dataclasses.replace(plan, world_size=size, stands_for=4 // size)
        assert (resized.batch_per_worker, resized.batches_per_step) == (2, 8 // size)
        batches = loading.training_loader(cfg, resized, images, epoch, rank, skip=3, num_processes=0)
        step = itertools.islice(batches, resized.batches_per_step)
        return [(batch.image_files, float(sum(one["image"].sum() for one in batch.inputs))) for batch in step]

    expected = [batch for rank in range(4) for batch in read(4, rank)]
    assert len(expected) == 8
    assert [batch for rank in range(2) for batch in read(2, rank)] == expected
    assert read(1, 0) == expected


def _rank_trains(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    plan = dataclasses.replace(plan_of(Path(folder)), world_size=2)
    trained = train(plan, graphs=False, rank=rank)
    if rank == 0:
        losses = [event["losses"] for event in trained.events]
        torch.save((dict(trained.loop.model.module.named_parameters()), losses), Path(folder) / "two.pt")
    dist.destroy_process_group()


@pytest.mark.train
def test_one_worker_that_stands_for_two_trains_as_they_do_to_rounding(tmp_path: Path) -> None:
    """The same batches and the same random choices of the model: gradients are added in another order only."""
    spawn_ranks(_rank_trains, str(tmp_path / "store"), str(tmp_path))
    expected, losses = torch.load(tmp_path / "two.pt", weights_only=True)
    torch.set_num_threads(1)
    plan = dataclasses.replace(plan_of(tmp_path), stands_for=2)
    alone = train(plan, graphs=False, batch=lambda number, _: batch_of(number // 2, number % 2))
    for event, two in zip(alone.events, losses, strict=True):
        assert event["losses"] == pytest.approx(two, rel=1e-4)
        assert (event["num_images"], event["batches_per_step"]) == (8, 2)
    for name, value in alone.loop.model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    graphed = train(plan, graphs=True, batch=lambda number, _: batch_of(number // 2, number % 2))
    assert graphed.sha256 == alone.sha256


@pytest.mark.train
def test_a_rank_that_stands_for_two_goes_on_exactly_after_it_died(tmp_path: Path) -> None:
    plan = dataclasses.replace(plan_of_rank(tmp_path, "mask_rcnn"), stands_for=2)
    healthy = train_rank(plan)
    broken = dataclasses.replace(plan, checkpoint_dir=str(tmp_path / "broken"))
    train_rank(broken, die_at=6)
    second = train_rank(broken, attempt=1)
    assert last(second, LoopFinished).state_sha256 == last(healthy, LoopFinished).state_sha256
    assert {(e.num_images, e.batches_per_step) for e in healthy if isinstance(e, StepsDone)} == {(8, 2)}
