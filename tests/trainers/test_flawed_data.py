"""A data set with flaws gives the records and the training inputs that detectron2 makes of it, whatever the recipe."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image

from trainers.contract.plan import DatasetPlan
from trainers.dataset_cache import cached_records, load_records
from trainers.speedups.fast_mapper import FastMapper

Document = dict[str, Any]


def document() -> Document:
    """Three images of 64 x 48 with two objects each."""
    images = [{"id": number, "file_name": f"{number}.png", "width": 64, "height": 48} for number in (1, 2, 10)]
    annotations = [
        {
            "id": 2 * place + each + 1, "image_id": image["id"], "category_id": 3 + each, "iscrowd": 0, "area": 200,
            "bbox": [10, 10.5, 20, 10], "segmentation": [[10, 10.5, 30, 10.5, 30, 20.5, 10, 20.5]],
        }
        for place, image in enumerate(images)
        for each in (0, 1)
    ]  # fmt: skip
    categories = [{"id": 3, "name": "three"}, {"id": 4, "name": "four"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    for image in document()["images"]:
        Image.fromarray(pixels).save(tmp_path / image["file_name"])
    return tmp_path


def write(folder: Path, change: Callable[[Document], object], encoding: str = "utf-8") -> DatasetPlan:
    values = document()
    change(values)
    (folder / "truth.json").write_text(json.dumps(values), encoding=encoding)
    return DatasetPlan("flawed", str(folder / "truth.json"), str(folder))


def first(**fields: Any) -> Callable[[Document], object]:
    return lambda values: values["annotations"][0].update(fields)


def sliver(values: Document) -> None:
    values["annotations"][0]["segmentation"].append([10, 10, 11, 11])


def without(*names: str) -> Callable[[Document], object]:
    return lambda values: [entry.pop(name) for entry in values["annotations"] for name in names]


FLAWS: dict[str, Callable[[Document], object]] = {
    "a polygon of four numbers next to a good one": sliver,
    "no polygon but one of four numbers": first(segmentation=[[10, 10, 12, 12]]),
    "an odd number of coordinates": first(segmentation=[[10, 10, 20, 10, 20, 20, 7]]),
    "an empty polygon": first(segmentation=[[]]),
    "a box over the left edge": first(bbox=[-4, 10, 20, 10]),
    "a box over the right edge, in decimals": first(bbox=[50.5, 10, 20.25, 60]),
    "a box outside": first(bbox=[70, 10, 20, 10]),
    "a box of no width": first(bbox=[10, 10, 0, 10]),
    "a box of negative height": first(bbox=[10, 30, 10, -5.5]),
    "a box of NaN": first(bbox=[float("nan"), 10, 20, 10]),
    "a box of infinite width": first(bbox=[10, 10, float("inf"), 10]),
    "an annotation of no image": first(image_id=77),
    "iscrowd as a decimal": lambda values: [entry.update(iscrowd=0.0) for entry in values["annotations"]],
    "no iscrowd and no area": without("iscrowd", "area"),
    "an image without annotations": lambda values: values["images"].append(
        {"id": 4, "file_name": "1.png", "width": 64, "height": 48}
    ),
}


def detectron2_records(dataset: DatasetPlan) -> list[dict[str, Any]]:
    if dataset.name in MetadataCatalog:
        MetadataCatalog.remove(dataset.name)
    records: list[dict[str, Any]] = load_coco_json(dataset.annotations, dataset.images, dataset.name)
    MetadataCatalog.remove(dataset.name)
    return records


def alike(one: Any, other: Any) -> bool:
    """Equality in which NaN equals itself."""
    return repr(one) == repr(other)


@pytest.mark.parametrize("change", FLAWS.values(), ids=FLAWS.keys())
def test_flaws_leave_detectron2s_records(folder: Path, change: Callable[[Document], object]) -> None:
    dataset = write(folder, change)
    expected = detectron2_records(dataset)
    assert alike(load_records(dataset), expected)
    for _ in range(2):  # written, and read again
        assert alike(list(cached_records(dataset, False, folder / "cache")), expected)


def settings(mask_on: bool) -> CfgNode:
    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.MASK_ON = mask_on
    cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    return cfg


@pytest.mark.parametrize("mask_on", [True, False], ids=["masks", "boxes"])
@pytest.mark.parametrize("change", FLAWS.values(), ids=FLAWS.keys())
def test_flaws_leave_the_objects_that_detectron2s_mapper_leaves(
    folder: Path, change: Callable[[Document], object], mask_on: bool
) -> None:
    records = load_records(write(folder, change))
    cfg = settings(mask_on)
    plain, fast = DatasetMapper(cfg, is_train=True), FastMapper(cfg, is_train=True, packed_masks=False)
    for record in records:
        np.random.seed(0)
        expected = plain(copy.deepcopy(record))["instances"]
        np.random.seed(0)
        found = fast(copy.deepcopy(record))["instances"]
        assert torch.equal(found.gt_boxes.tensor, expected.gt_boxes.tensor)
        assert found.gt_classes.tolist() == expected.gt_classes.tolist()
        if mask_on and len(expected):
            assert alike(found.gt_masks.polygons, expected.gt_masks.polygons)


def as_text(values: Document) -> None:
    for image in values["images"]:
        image["id"] = f"{image['id']:06d}"
    for entry in values["annotations"]:
        entry["image_id"], entry["id"] = f"{entry['image_id']:06d}", str(entry["id"])


def as_names(values: Document) -> None:
    for image in values["images"]:
        image["id"] = f"img_{image['id']}"
    for entry in values["annotations"]:
        entry["image_id"], entry["id"] = f"img_{entry['image_id']}", f"uuid-{entry['id']}"
        entry["category_id"] = f"class {entry['category_id']}"
    for category in values["categories"]:
        category["id"] = f"class {category['id']}"


def as_decimals(values: Document) -> None:
    for entry in values["annotations"]:
        entry["category_id"], entry["image_id"] = float(entry["category_id"]), float(entry["image_id"])
    for image in values["images"]:
        image["width"] = 64.0


@pytest.mark.parametrize("change", [as_text, as_names, as_decimals])
def test_ids_of_other_kinds_give_the_records_that_detectron2_makes_of_them(
    folder: Path, change: Callable[[Document], object]
) -> None:
    dataset = write(folder, change)
    expected, found = detectron2_records(dataset), load_records(dataset)
    assert all(type(record["image_id"]) is int for record in found)
    for record, theirs in zip(found, expected, strict=True):
        assert {**theirs, "image_id": record["image_id"]} == record
    assert len({record["image_id"] for record in found}) == len(found)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("is_cached", [True, False])
def test_every_encoding_gives_the_same_records(folder: Path, encoding: str, is_cached: bool) -> None:
    expected = detectron2_records(write(folder, lambda values: None))
    dataset = write(folder, lambda values: None, encoding)
    found = cached_records(dataset, False, folder / "cache") if is_cached else load_records(dataset)
    assert list(found) == expected


def test_a_plain_file_is_left_to_detectron2(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write(folder, lambda values: None)
    monkeypatch.setattr("trainers.dataset_cache.read_annotations", None)
    assert load_records(dataset) == detectron2_records(dataset)
