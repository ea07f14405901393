"""Images are augmented by their place in the training order, and one that cannot be used is named."""

import numpy as np
import pytest
from torch.utils.data import DataLoader

from trainers.loading import BadInputError, TrainingImages


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


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'shapely'"), MemoryError("full")], ids=repr)
def test_what_no_image_can_be_blamed_for_keeps_its_type(error: Exception, num_workers: int) -> None:
    def fail(record: dict[str, object]) -> None:
        raise error

    images = TrainingImages([{"file_name": "innocent.jpg"}], fail, seed=0)
    loader = DataLoader(
        images,
        batch_sampler=[[(0, 0)]],
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,
    )
    with pytest.raises(type(error)) as caught:
        next(iter(loader))
    assert "innocent" not in str(caught.value).splitlines()[-1]
