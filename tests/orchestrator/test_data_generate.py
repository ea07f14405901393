"""The generated data set is what it says: exact, repeatable, whole or not there at all."""

from __future__ import annotations

import errno
import hashlib
import json
from typing import TYPE_CHECKING, Any

import cv2
import pytest
from pycocotools import mask as coco_mask

from orchestrator.data.generate import generate
from orchestrator.data.layout import coco_layout

if TYPE_CHECKING:
    from pathlib import Path


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def decode(segmentation: Any, height: int, width: int) -> Any:
    objects = coco_mask.frPyObjects(segmentation, height, width) if not is_compressed(segmentation) else segmentation
    return coco_mask.merge(objects) if isinstance(objects, list) else objects


def is_compressed(segmentation: Any) -> bool:
    return isinstance(segmentation, dict) and isinstance(segmentation["counts"], str)


def test_the_same_seed_gives_the_same_bytes_however_many_processes_draw(tmp_path: Path) -> None:
    generate(tmp_path / "a", num_train=450, num_val=3, size=32, seed=7, num_processes=1)
    generate(tmp_path / "b", num_train=450, num_val=3, size=32, seed=7, num_processes=2)
    generate(tmp_path / "c", num_train=450, num_val=3, size=32, seed=8)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_train_and_validation_images_differ(tmp_path: Path) -> None:
    paths = generate(tmp_path / "a", num_train=3, num_val=3, size=32)
    assert set(digest(paths.train.images).values()).isdisjoint(digest(paths.val.images).values())


@pytest.mark.parametrize("mask_format", ["polygon", "rle"])
def test_area_and_box_are_those_of_the_mask(tmp_path: Path, mask_format: Any) -> None:
    paths = generate(
        tmp_path / "a", num_train=20, num_val=1, size=(96, 64), num_classes=12, crowd_fraction=0.5,
        shapes_per_image=(3, 6), mask_format=mask_format,
    )  # fmt: skip
    document = read(paths.train.annotations)
    assert {annotation["iscrowd"] for annotation in document["annotations"]} == {0, 1}
    for annotation in document["annotations"]:
        rle = decode(annotation["segmentation"], 64, 96)
        assert annotation["area"] == coco_mask.area(rle)
        assert annotation["bbox"] == coco_mask.toBbox(rle).tolist()
        assert isinstance(annotation["segmentation"], dict) == (annotation["iscrowd"] == 1 or mask_format == "rle")


def test_files_match_the_annotations(tmp_path: Path) -> None:
    paths = generate(tmp_path / "a", num_train=6, num_val=4, size=(48, 40), num_classes=10, shapes_per_image=(1, 2))
    for json_file, images, count in (
        (paths.train.annotations, paths.train.images, 6),
        (paths.val.annotations, paths.val.images, 4),
    ):
        document = read(json_file)
        assert len(document["images"]) == count == len(list(images.iterdir()))
        assert [category["id"] for category in document["categories"]] == list(range(1, 11))
        assert len({category["name"] for category in document["categories"]}) == 10
        for image in document["images"]:
            pixels = cv2.imread(str(images / image["file_name"]))
            assert pixels is not None and pixels.shape == (40, 48, 3)
        assert {annotation["image_id"] for annotation in document["annotations"]} == set(range(1, count + 1))


def test_a_second_call_does_nothing_and_other_parameters_are_refused(tmp_path: Path) -> None:
    paths = generate(tmp_path / "a", num_train=2, num_val=1, size=32)
    before = paths.train.annotations.stat()
    assert generate(tmp_path / "a", num_train=2, num_val=1, size=32) == paths
    assert paths.train.annotations.stat() == before
    with pytest.raises(FileExistsError, match="num_train 2 there, 3 asked"):
        generate(tmp_path / "a", num_train=3, num_val=1, size=32)
    assert paths.train.annotations.stat() == before
    generate(tmp_path / "a", num_train=3, num_val=1, size=32, replace=True)
    assert len(read(paths.train.annotations)["images"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_was_not_generated_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("dear")
    with pytest.raises(FileExistsError, match="was not generated"):
        generate(tmp_path, num_train=1, num_val=1, size=32, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_generation_leaves_nothing(tmp_path: Path) -> None:
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "a", num_train=1, num_val=1, size=32, on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_set_larger_than_the_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"2,147,483,711 images take about [\d,.]+ GiB, [\d,.]+ GiB are free") as caught:
        generate(tmp_path / "data", num_train=2**31 - 1, num_val=64)
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_repeated_images_are_links_with_annotations_of_their_own(tmp_path: Path) -> None:
    paths = generate(tmp_path / "a", num_train=25, num_val=1, size=32, distinct_images=10)
    document = read(paths.train.annotations)
    assert len(document["images"]) == 25 == len(list(paths.train.images.iterdir()))
    assert len({path.stat().st_ino for path in paths.train.images.iterdir()}) == 10
    assert len({annotation["id"] for annotation in document["annotations"]}) == len(document["annotations"])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"num_train": -1}, "num_train is -1"),
        ({"size": 4}, "width is 4"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"crowd_fraction": 1.5}, "crowd_fraction is 1.5"),
        ({"shapes_per_image": (3, 2)}, "below min_shapes 3"),
        ({"mask_format": "bitmap"}, "mask_format is 'bitmap'"),
    ],
)
def test_impossible_parameters_are_refused_before_anything_is_written(
    tmp_path: Path, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / "a", **parameters)
    assert list(tmp_path.iterdir()) == []


def test_the_paths_of_the_layout_are_cocos(tmp_path: Path) -> None:
    paths = coco_layout(tmp_path)
    assert paths.train.annotations == tmp_path / "annotations" / "instances_train2017.json"
    assert paths.val.images == tmp_path / "val2017"
