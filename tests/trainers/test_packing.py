"""Batches are packed into tensors of fixed sizes, and those that cannot be say why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from torch.utils.data import DataLoader

from tests.builders.polygons import as_edges, shapes
from trainers.batching import Collation
from trainers.loading import TrainingImages
from trainers.speedups.mask_targets import PackedPolygons
from trainers.speedups.packing import NotPackedError, Packer, capacities
from trainers.speedups.padded_batch import PaddedBatch

CANVASES = ((32, 64), (64, 32), (64, 96))
PACKER = Packer(CANVASES, max_objects=16, max_edges=2048, with_masks=True)


def record(
    height: int, width: int, num_objects: int, seed: int = 0, mask_class: Any = PackedPolygons
) -> dict[str, Any]:
    """An image of random pixels with random objects, as a mapper returns it."""
    rng = np.random.default_rng(seed)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.from_numpy(rng.uniform(0, 30, (num_objects, 4)).astype(np.float32)))
    instances.gt_classes = torch.from_numpy(rng.integers(0, 80, num_objects))
    instances.gt_masks = mask_class(shapes(rng, num_objects))
    image = torch.from_numpy(rng.integers(1, 256, (3, height, width), dtype=np.uint8))
    return {"file_name": f"{seed}.jpg", "image": image, "instances": instances}


def test_a_batch_lies_on_the_smallest_canvas_that_takes_all_of_its_images() -> None:
    images = [record(30, 40, 2), record(20, 64, 0, seed=1)]
    batch = PACKER.pack(images)
    assert batch.shape == (2, 32, 64, 16, 2048)
    assert batch.sizes.tolist() == [[30, 40], [20, 64]]
    for number, image in enumerate(images):
        height, width = image["image"].shape[1:]
        assert torch.equal(batch.images[number, :, :height, :width], image["image"])
    assert batch.images.sum() == sum(image["image"].sum() for image in images)  # zeros elsewhere
    assert PACKER.pack([record(40, 40, 1), record(20, 64, 1)]).shape[1:3] == (64, 96)


@pytest.mark.parametrize("mask_class", [PackedPolygons, PolygonMasks])
def test_objects_are_the_mappers(mask_class: Any) -> None:
    images = [record(30, 40, count, seed, mask_class) for seed, count in enumerate([5, 0, 16, 1])]
    batch = PACKER.pack(images)
    assert batch.num_objects.tolist() == [5, 0, 16, 1]
    for number, image in enumerate(images):
        objects, count = image["instances"], len(image["instances"])
        assert torch.equal(batch.boxes[number, :count], objects.gt_boxes.tensor)
        assert torch.equal(batch.classes[number, :count], objects.gt_classes)
        assert not batch.boxes[number, count:].any() and not batch.classes[number, count:].any()
    polygons = [list(image["instances"].gt_masks.polygons) for image in images]
    for packed, expected in zip(
        (batch.edges, batch.edge_polygon, batch.first_edge), as_edges(polygons, 16, 2048), strict=True
    ):
        assert packed.dtype == expected.dtype and torch.equal(packed, expected)


def test_selected_instances_keep_their_own_polygons() -> None:
    image = record(30, 40, 6)
    image["instances"] = image["instances"][torch.tensor([4, 1])]
    expected = as_edges([image["instances"].gt_masks.polygons], 16, 2048)
    assert torch.equal(PACKER.pack([image]).edges, expected[0])


def test_a_model_without_masks_gets_no_edges() -> None:
    image = record(30, 40, 3)
    image["instances"].remove("gt_masks")
    batch = Packer(CANVASES, 16, 2048, with_masks=False).pack([image])
    assert batch.num_objects.tolist() == [3] and not batch.edges.any() and batch.edges.shape[1] <= 16


def with_(**fields: Any) -> dict[str, Any]:
    image = record(30, 40, 1)
    for name, value in fields.items():
        image["instances"].set(name, value)
    return image


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (record(65, 97, 1), "larger than every canvas"),
        (record(97, 64, 1), "larger than every canvas"),
        (record(30, 40, 17), "more than 16 objects"),
        (record(30, 40, 1) | {"image": torch.zeros(3, 30, 40)}, "not of three bytes a pixel"),
        (record(30, 40, 1) | {"image": torch.zeros(1, 30, 40, dtype=torch.uint8)}, "not of three bytes a pixel"),
        ({name: value for name, value in record(30, 40, 1).items() if name != "instances"}, "without annotations"),
        (with_(gt_masks=BitMasks(torch.zeros(1, 30, 40))), "not polygons"),
        (with_(gt_keypoints=Keypoints(np.zeros((1, 17, 3)))), "keypoints"),
        (with_(gt_masks=PackedPolygons([[np.arange(2 * 2049.0)]])), "more than 2,048 corners"),
    ],
)
def test_a_batch_that_cannot_be_packed_says_why_and_is_trained_eagerly(image: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotPackedError, match=reason):
        PACKER.pack([record(30, 40, 1), image])
    batch = Collation(32, PACKER)([image])
    assert batch.inputs == [image] and reason in str(batch.eager_reason)


def test_a_batch_knows_its_shape_and_what_its_canvas_wastes() -> None:
    images = [record(20, 30, 1), record(31, 32, 1)]
    packed, plain = Collation(32, PACKER)(images), Collation(32)(images)
    assert isinstance(packed.inputs, PaddedBatch) and plain.inputs is images
    assert (packed.shape, packed.wasted_pixels) == ((2, 32, 64), 2 * 32 * 32)
    assert (plain.shape, plain.wasted_pixels) == ((2, 32, 32), 0)
    assert Collation(0)(images).shape == (2, 31, 32)
    assert packed.image_files == plain.image_files == ("0.jpg", "0.jpg") and len(packed) == 2
    assert packed.eager_reason is None and plain.eager_reason is None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_gives_the_batch_that_was_packed_in_its_process(num_workers: int) -> None:
    images = TrainingImages([{"number": 3}], lambda each: record(30, 40, each["number"]), 0, Collation(32, PACKER))
    loader = DataLoader(
        images,
        batch_sampler=[[(0, 0), (1, 0)]],
        num_workers=num_workers,
        collate_fn=images.collation,
        multiprocessing_context="fork" if num_workers else None,
    )
    (batch,) = loader
    for tensor, expected in zip(batch.inputs.tensors(), PACKER.pack([record(30, 40, 3)] * 2).tensors(), strict=True):
        assert torch.equal(tensor, expected)
    copied = batch.to(torch.device("cpu"))
    assert copied.image_files == batch.image_files and copied.inputs.shape == batch.inputs.shape


def test_capacities_are_twice_the_largest_image_of_a_sample_in_powers_of_two() -> None:
    def image(num_objects: int, corners: int, **annotation: Any) -> dict[str, Any]:
        outline = {"segmentation": [[0.0] * 2 * corners]}
        return {"annotations": [outline | annotation for _ in range(num_objects)]}

    assert capacities([image(1, 4), image(33, 5), image(900, 900, iscrowd=1)]) == (128, 512)
    assert capacities([image(1, 4)]) == (16, 16)
    assert capacities([image(5000, 4, segmentation={"counts": "x"})]) == (1024, 16)
    assert capacities([image(2, 40_000)]) == (16, 16384)
