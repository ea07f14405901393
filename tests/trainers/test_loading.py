"""Images are augmented by their place in the training order, and one that cannot be used is named."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from tests.builders.training import plan_of
from trainers import loading, mask_rcnn
from trainers.batching import Collation
from trainers.loading import BadInputError, TrainingImages
from trainers.recipes import REFERENCE
from trainers.speedups.padded_batch import PaddedBatch
from trainers.training_order import training_epoch


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


def images_of(folder: Path, model: str, fixed_shapes: bool | None) -> TrainingImages:
    plan = plan_of(folder, model)
    plan = dataclasses.replace(plan, recipe=dataclasses.replace(REFERENCE, fixed_shapes=fixed_shapes))
    cfg = mask_rcnn.build_config(plan)
    mask_rcnn.register(cfg, plan.train)
    records = loading.training_records(cfg, plan)
    images = loading.training_images(cfg, plan, records, mask_rcnn.build_detector(cfg, plan))
    epoch = training_epoch(cfg, records, plan.seed)
    batch = next(iter(loading.training_loader(cfg, plan, images, epoch, rank=0, skip=0, num_processes=0)))
    packed = images.collation.packer is not None
    assert isinstance(batch.inputs, PaddedBatch) == packed and len(batch.image_files) == plan.batch_per_worker
    assert batch.eager_reason == images.collation.eager_reason
    return images


def test_batches_are_packed_for_models_that_know_them(tmp_path: Path) -> None:
    images = images_of(tmp_path, "mask_rcnn", True)
    assert images.collation.divisibility == 32
    packer = images.collation.packer
    assert packer and packer.with_masks and packer.canvases == ((64, 64),)


def test_a_model_that_is_trained_eagerly_gives_its_reason_with_every_batch(tmp_path: Path) -> None:
    assert images_of(tmp_path, "retinanet", True).collation.eager_reason == "RetinaNet is not GeneralizedRCNN"


def test_nothing_is_packed_on_a_cpu_unless_it_is_asked_for(tmp_path: Path) -> None:
    for choice in (None, False):
        assert images_of(tmp_path, "mask_rcnn", choice).collation == Collation(32)
