"""The training order: detectron2's own, exact after a skip, nothing repeated or left out."""

import itertools
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.loading import BadInputError, TrainingImages, TrainingOrder


def first(order: TrainingOrder, number: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(order, number))


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_the_order_is_detectron2s_own(rank: int, world_size: int) -> None:
    from detectron2.data.common import AspectRatioGroupedDataset
    from detectron2.data.samplers import TrainingSampler

    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 100, (37, 2)).tolist()
    with (
        patch("detectron2.utils.comm.get_rank", return_value=rank),
        patch("detectron2.utils.comm.get_world_size", return_value=world_size),
    ):
        sampler = iter(TrainingSampler(len(sizes), seed=7))
        images = ({"width": sizes[i][0], "height": sizes[i][1], "index": i} for i in sampler)
        theirs = [
            [image["index"] for image in batch] for batch in itertools.islice(AspectRatioGroupedDataset(images, 4), 50)
        ]
    ours = TrainingOrder([w > h for w, h in sizes], 4, 7, rank, world_size)
    assert [[index for _, index in batch] for batch in first(ours, 50)] == theirs


@settings(max_examples=30)
@given(
    wide=st.lists(st.booleans(), min_size=1, max_size=30),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 2**31 - 1),
    skip=st.integers(0, 40),
)
def test_a_resumed_order_goes_on_where_the_first_one_was(
    wide: list[bool], batch_size: int, seed: int, skip: int
) -> None:
    whole = first(TrainingOrder(wide, batch_size, seed, 0, 1), skip + 5)
    resumed = first(TrainingOrder(wide, batch_size, seed, 0, 1, skip=skip), 5)
    assert resumed == whole[skip:]


def test_ranks_share_every_pass_without_repeating_or_leaving_out_an_image() -> None:
    positions: Counter[int] = Counter()
    images: Counter[int] = Counter()
    for rank in range(2):
        for batch in first(TrainingOrder([False] * 20, 2, 3, rank, 2), 10):
            positions.update(position for position, _ in batch)
            images.update(index for _, index in batch)
    assert sorted(positions) == list(range(40))
    assert set(images.values()) == {2}, "two passes, each image once in each"


def test_every_batch_of_all_workers_together_is_the_same_at_every_world_size() -> None:
    """A trial that goes on with fewer workers sees the images it would have seen (where all are of one shape)."""

    def batches(world_size: int) -> list[list[tuple[int, int]]]:
        batch_size = 8 // world_size
        orders = (TrainingOrder([False] * 21, batch_size, 3, rank, world_size, skip=2) for rank in range(world_size))
        together = zip(*(first(order, 7) for order in orders), strict=True)
        return [sorted(itertools.chain.from_iterable(parts)) for parts in together]

    assert batches(1) == batches(2) == batches(4) == batches(8)
    assert len(batches(1)[0]) == 8


def test_augmentation_depends_on_the_place_alone() -> None:
    def draw(record: dict[str, object]) -> dict[str, object]:
        return {**record, "drawn": np.random.rand()}

    data = TrainingImages([{"file_name": "a"}, {"file_name": "b"}], draw, seed=5)
    one, other = data[7, 1]["drawn"], data[8, 1]["drawn"]
    assert data[7, 1]["drawn"] == one != other


def test_an_image_that_cannot_be_read_is_named() -> None:
    def fail(record: dict[str, object]) -> None:
        raise OSError("truncated")

    with pytest.raises(BadInputError, match=r'broken.jpg": OSError: truncated') as caught:
        TrainingImages([{"file_name": "broken.jpg"}], fail, seed=0)[0, 0]
    assert caught.value.image_file == "broken.jpg"
