"""Seeds depend on every part of their key and on nothing else."""

from __future__ import annotations

import itertools

import torch

from trainers.loading import augmentation_seed
from trainers.passes import step_seed


def test_every_seed_rank_and_iteration_has_another_step_seed_that_torch_takes() -> None:
    keys = list(itertools.product((0, 1, 2**31 - 1), (0, 1, 63), (0, 1, 89_999)))
    seeds = [step_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    for seed in seeds:
        assert torch.Generator().manual_seed(seed).initial_seed() == seed


def test_a_step_seed_is_the_same_in_every_process_and_version() -> None:
    # NumPy guarantees SeedSequence's output, so that a run resumed after an upgrade draws the same numbers.
    assert step_seed(0, 0, 0) == 15793235383387715774
    assert step_seed(7, 3, 1200) == 6402966554157887018


def test_places_in_the_training_order_have_seeds_of_four_words() -> None:
    seeds = {tuple(augmentation_seed(seed, place).tolist()) for seed in (0, 1) for place in range(100)}
    assert len(seeds) == 200 and {len(words) for words in seeds} == {4}
