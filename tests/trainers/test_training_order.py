"""The training order is that of detectron2's samplers, exact after a skip, and says truly how long an epoch is."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.training_order import Epoch, TrainingOrder, random_subset, repeated, training_epoch, whole

SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")


def first(order: TrainingOrder, number: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(order, number))


def records(size: int) -> list[dict[str, Any]]:
    """Images of several shapes; the first three classes are in every image, the others the rarer the higher."""
    sizes = np.random.default_rng(0).integers(1, 100, (size, 2)).tolist()
    classes = [[0, 1, 2, *(c for c in range(3, 7) if number % (c * c) == 0)] for number in range(size)]
    return [
        {"width": width, "height": height, "annotations": [{"category_id": c} for c in found]}
        for (width, height), found in zip(sizes, classes, strict=True)
    ]


def config(sampler: str, threshold: float = 0.5, ratio: float = 0.4) -> CfgNode:
    values = {"REPEAT_THRESHOLD": threshold, "REPEAT_SQRT": True, "RANDOM_SUBSET_RATIO": ratio}
    return CfgNode({"DATALOADER": {"SAMPLER_TRAIN": sampler, **values}})


def detectron2s(sampler: str, images: list[dict[str, Any]]) -> Any:
    if sampler == "TrainingSampler":
        return TrainingSampler(len(images), seed=7)
    if sampler == "RandomSubsetTrainingSampler":
        return RandomSubsetTrainingSampler(len(images), 0.4, seed_shuffle=7, seed_subset=7)
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(images, 0.5)
    return RepeatFactorTrainingSampler(factors, seed=7)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_the_order_is_that_of_detectron2s_sampler(sampler: str, rank: int, world_size: int) -> None:
    images = records(37)
    with (
        patch("detectron2.utils.comm.get_rank", return_value=rank),
        patch("detectron2.utils.comm.get_world_size", return_value=world_size),
    ):
        shown = ({**images[i], "index": i} for i in iter(detectron2s(sampler, images)))
        theirs = [[i["index"] for i in batch] for batch in itertools.islice(AspectRatioGroupedDataset(shown, 4), 50)]
    epoch = training_epoch(config(sampler), images, seed=7)
    wide = [image["width"] > image["height"] for image in images]
    ours = TrainingOrder(epoch.draw, wide, 4, 7, rank, world_size)
    assert [[index for _, index in batch] for batch in first(ours, 50)] == theirs


@settings(max_examples=30)
@given(
    wide=st.lists(st.booleans(), min_size=1, max_size=30),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 2**31 - 1),
    skip=st.integers(0, 40),
    kind=st.sampled_from(("whole", "repeated", "subset")),
)
def test_a_resumed_order_goes_on_where_the_first_one_was(
    wide: list[bool], batch_size: int, seed: int, skip: int, kind: str
) -> None:
    size = len(wide)
    draw = {
        "whole": whole(size),
        "repeated": repeated(torch.linspace(1.0, 3.3, size)),
        "subset": random_subset(size, 0.6, seed),
    }[kind].draw
    undisturbed = first(TrainingOrder(draw, wide, batch_size, seed, 0, 1), skip + 5)
    resumed = first(TrainingOrder(draw, wide, batch_size, seed, 0, 1, skip=skip), 5)
    assert resumed == undisturbed[skip:]


def test_ranks_share_every_pass_without_repeating_or_leaving_out_an_image() -> None:
    positions: Counter[int] = Counter()
    images: Counter[int] = Counter()
    for rank in range(2):
        for batch in first(TrainingOrder(whole(20).draw, [False] * 20, 2, 3, rank, 2), 10):
            positions.update(position for position, _ in batch)
            images.update(index for _, index in batch)
    assert sorted(positions) == list(range(40))
    assert set(images.values()) == {2}, "two passes, each image once in each"


@pytest.mark.parametrize("epoch", [whole(21), repeated(torch.linspace(1.0, 2.7, 21)), random_subset(42, 0.5, 3)])
def test_every_batch_of_all_workers_together_is_the_same_at_every_world_size(epoch: Epoch) -> None:
    """A trial that goes on with fewer workers sees the images it would have seen (where all are of one shape)."""

    def batches(world_size: int) -> list[list[tuple[int, int]]]:
        batch_size, ranks = 8 // world_size, range(world_size)
        orders = (TrainingOrder(epoch.draw, [False] * 42, batch_size, 3, rank, world_size, skip=2) for rank in ranks)
        together = zip(*(first(order, 7) for order in orders), strict=True)
        return [sorted(itertools.chain.from_iterable(parts)) for parts in together]

    assert batches(1) == batches(2) == batches(4) == batches(8)
    assert len(batches(1)[0]) == 8


def test_an_epoch_counts_repeats_and_leaves_out_what_is_not_in_the_subset() -> None:
    # Class 1 is in one of four images: at a threshold of 1 its image comes sqrt(1 / 0.25) = 2 times, the others once.
    images = [{"annotations": [{"category_id": 0}]} for _ in range(3)]
    images.append({"annotations": [{"category_id": 0}, {"category_id": 1}]})
    assert training_epoch(config("RepeatFactorTrainingSampler", threshold=1.0), images, seed=0).num_images == 5
    assert training_epoch(config("TrainingSampler"), images, seed=0).num_images == 4
    half = training_epoch(config("RandomSubsetTrainingSampler", ratio=0.5), images, seed=0)
    assert half.num_images == 2
    shown = {index for batch in first(TrainingOrder(half.draw, [False] * 4, 2, 0, 0, 1), 10) for _, index in batch}
    assert len(shown) == 2


def test_a_fraction_of_a_repeat_factor_is_a_chance() -> None:
    epoch, generator = repeated(torch.tensor([1.0, 2.25])), torch.Generator().manual_seed(0)
    counts = [epoch.draw(generator).tolist().count(1) for _ in range(2000)]
    assert set(counts) == {2, 3} and epoch.num_images == 3
    assert 0.2 < counts.count(3) / len(counts) < 0.3


def test_a_subset_holds_an_image_at_least() -> None:
    assert random_subset(3, 0.01, seed=0).num_images == 1
