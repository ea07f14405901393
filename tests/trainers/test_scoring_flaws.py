"""How objects with missing or odd fields are scored, and what cannot be scored at all."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.builders.scoring import (
    FOUND,
    HEIGHT,
    IOU_TYPES,
    SCORERS,
    TRUTH,
    WIDTH,
    Document,
    Figures,
    both,
    changed,
    raw,
    some,
)
from trainers.scoring import dry_score, score

if TYPE_CHECKING:
    from pathlib import Path

    from trainers.scoring_input import IouType

DELETED = object()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[IouType, Figures]:
    folder = tmp_path_factory.mktemp("expected")
    return {iou_type: both(folder / f"{iou_type}.json", TRUTH, iou_type) for iou_type in IOU_TYPES}


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_a_missing_iscrowd_is_0(tmp_path: Path, iou_type: IouType) -> None:
    path = tmp_path / "truth.json"
    with_zeros = both(path, some(lambda annotation: annotation.update(iscrowd=0)), iou_type)
    without = some(lambda annotation: annotation.pop("iscrowd"))
    assert both(path, without, iou_type) == with_zeros
    assert both(path, some(lambda annotation: annotation.update(iscrowd=None)), iou_type) == with_zeros


@pytest.mark.parametrize("missing", [DELETED, None, float("nan"), "large", "7.5"])
def test_a_missing_area_is_the_masks(tmp_path: Path, expected: dict[IouType, Figures], missing: Any) -> None:
    def change(annotation: dict[str, Any]) -> None:
        annotation |= {"area": missing}
        if missing is DELETED:
            del annotation["area"]

    for iou_type in IOU_TYPES:
        assert both(tmp_path / "truth.json", some(change), iou_type) == expected[iou_type]


def test_a_missing_area_is_the_boxs_where_there_is_no_mask(tmp_path: Path) -> None:
    def boxes_alone(annotation: dict[str, Any]) -> None:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        del annotation["segmentation"]

    with_area = changed(annotations=boxes_alone)
    without = copy.deepcopy(with_area)
    for annotation in without["annotations"]:
        del annotation["area"]
    path = tmp_path / "truth.json"
    assert both(path, with_area, "bbox") == both(path, without, "bbox")


def test_keypoints_are_counted_where_their_number_is_missing(tmp_path: Path, expected: dict[IouType, Figures]) -> None:
    document = some(lambda annotation: annotation.pop("num_keypoints"))
    assert both(tmp_path / "truth.json", document, "keypoints") == expected["keypoints"]


def test_an_object_without_keypoints_is_one_without_labelled_ones(tmp_path: Path) -> None:
    path = tmp_path / "truth.json"
    unlabelled = some(lambda annotation: annotation.update(keypoints=[0] * 51, num_keypoints=0))
    without = some(lambda annotation: [annotation.pop(key) for key in ("keypoints", "num_keypoints")])
    figures = both(path, unlabelled, "keypoints")
    assert both(path, without, "keypoints") == figures
    assert list(figures.values()) == pytest.approx(raw(unlabelled, "keypoints"))


@pytest.mark.parametrize(
    "mask",
    [
        [[10, 10, 110, 10, 110]],
        {"size": [HEIGHT, WIDTH], "counts": [5]},
        {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]},
        {"size": [10, 10], "counts": [0, 100]},
        [[10, 10, 110, 10, 110, 110, 10]],
        [[10, 10, 110, 10, 110, 110], [1, 2, 3, 4]],
    ],
)
def test_odd_masks_count_as_with_pycocotools(tmp_path: Path, mask: Any) -> None:
    document = some(lambda annotation: annotation.update(segmentation=mask))
    assert list(both(tmp_path / "truth.json", document, "segm").values()) == pytest.approx(raw(document, "segm"))


@pytest.mark.parametrize("mask", [DELETED, None, [], [[]], [[1, 2, 3, 4]], {"size": [9]}, [[1, 2, 3, 4, 5, None]], "x"])
def test_an_object_without_a_mask_that_pycocotools_reads_counts_as_missed(tmp_path: Path, mask: Any) -> None:
    def change(annotation: dict[str, Any]) -> None:
        annotation |= {"segmentation": mask}
        if mask is DELETED:
            del annotation["segmentation"]

    path = tmp_path / "truth.json"
    empty = some(lambda annotation: annotation.update(segmentation=[[10, 10, 10, 10, 10, 10]]))
    missed = raw(empty, "segm")
    assert list(both(path, some(change), "segm").values()) == pytest.approx(missed)


def test_polygons_with_two_points_are_left_out_of_a_mask(tmp_path: Path, expected: dict[IouType, Figures]) -> None:
    def add_sliver(annotation: dict[str, Any]) -> None:
        if isinstance(annotation["segmentation"], list):
            annotation["segmentation"].insert(0, [1, 2, 3, 4])  # pycocotools fails: it takes all for boxes

    assert both(tmp_path / "truth.json", some(add_sliver), "segm") == expected["segm"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_in_other_encodings_are_scored(tmp_path: Path, expected: dict[IouType, Figures], encoding: str) -> None:
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(TRUTH), encoding=encoding)
    assert score(path, FOUND, "bbox") == pytest.approx(expected["bbox"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": None}, "holds no list 'annotations'"),
        ({"images": [{"id": [1]}]}, "an entry of 'images' has no usable id"),
        ({"categories": [None]}, "an entry of 'categories' has no usable id"),
        ({"annotations": [{"image_id": 1, "category_id": 1}]}, r"annotations\[0\] cannot be scored: it has no 'bbox'"),
        ({"annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2]}]}, "its bbox has 2 numbers, not 4"),
        ({"annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, float("nan")]}]}, "is not finite"),
        ({"annotations": [None]}, r"annotations\[0\] cannot be scored"),
    ],
)
def test_what_cannot_be_scored_is_named_with_its_place(tmp_path: Path, change: Document, message: str) -> None:
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(TRUTH | change))
    for scorer in SCORERS:
        with pytest.raises(ValueError, match=message):
            dry_score(path, ["bbox"], scorer)


def test_masks_need_the_images_sizes_and_boxes_do_not(tmp_path: Path, expected: dict[IouType, Figures]) -> None:
    document = changed(images=lambda image: image.pop("height"))
    path = tmp_path / "truth.json"
    assert both(path, document, "bbox") == expected["bbox"]
    with pytest.raises(ValueError, match="image 1 has no height and width"):
        dry_score(path, ["segm"])
