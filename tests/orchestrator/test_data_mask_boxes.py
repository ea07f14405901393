"""Masks that do not lie on their boxes are a warning that names what moved them apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from orchestrator.data.checks import check_split
from orchestrator.data.generate import generate
from orchestrator.data.layout import Split, coco_layout
from orchestrator.data.masks import mask_extent

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.findings import Finding

    Change = Callable[[dict[str, Any]], object]

WIDTH, HEIGHT = 160, 96


@pytest.fixture
def root(tmp_path: Path) -> Path:
    generate(tmp_path / "set", num_train=6, num_val=1, size=(WIDTH, HEIGHT), seed=5, num_classes=2)
    return tmp_path / "set"


def check(root: Path, change: Change, *, for_scoring: bool) -> list[Finding]:
    """The findings on the training set, once all its objects are changed."""
    train = coco_layout(root).train
    document = json.loads(train.annotations.read_text())
    for entry in document["annotations"]:
        change(entry)
    file = train.annotations.with_name("changed.json")
    file.write_text(json.dumps(document))
    return check_split(Split(file, train.images, for_scoring=for_scoring)).findings


def scale_mask(x_factor: float, y_factor: float) -> Change:
    def change(entry: dict[str, Any]) -> None:
        factors = (x_factor, y_factor)
        entry["segmentation"] = [[v * factors[i % 2] for i, v in enumerate(each)] for each in entry["segmentation"]]

    return change


def swap_mask(entry: dict[str, Any]) -> None:
    entry["segmentation"] = [
        [v for x, y in zip(each[::2], each[1::2], strict=True) for v in (y, x)] for each in entry["segmentation"]
    ]


def centre_box(entry: dict[str, Any]) -> None:
    x, y, width, height = entry["bbox"]
    entry["bbox"] = [x + width / 2, y + height / 2, width, height]


def corner_box(entry: dict[str, Any]) -> None:
    x, y, width, height = entry["bbox"]
    entry["bbox"] = [x, y, x + width, y + height]


def turn_box(entry: dict[str, Any]) -> None:
    """The box at the opposite place of the image."""
    x, y, width, height = entry["bbox"]
    entry["bbox"] = [WIDTH - x - width, HEIGHT - y - height, width, height]


def encode_mask(entry: dict[str, Any]) -> None:
    encoded = coco_mask.merge(coco_mask.frPyObjects(entry["segmentation"], HEIGHT, WIDTH))
    entry["segmentation"] = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    entry["area"] = int(coco_mask.area(encoded))


def turn_encoded_mask(entry: dict[str, Any]) -> None:
    encode_mask(entry)
    turn_box(entry)


def nothing(entry: dict[str, Any]) -> None:
    """Leaves the object as it is."""


@pytest.mark.parametrize("is_encoded", [False, True])
@pytest.mark.parametrize("for_scoring", [False, True])
def test_masks_on_their_boxes_are_fine(root: Path, is_encoded: bool, for_scoring: bool) -> None:
    assert check(root, encode_mask if is_encoded else nothing, for_scoring=for_scoring) == []


@pytest.mark.parametrize("for_scoring", [False, True])
@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (scale_mask(1 / WIDTH, 1 / HEIGHT), "shares of the image's width and height"),
        (scale_mask(100 / WIDTH, 100 / HEIGHT), "percentages of the image's width and height"),
        (scale_mask(4, 4), "an image of another size"),
        (scale_mask(0.5, 0.8), "an image of another size"),
        (swap_mask, "Write x before y"),
        (centre_box, "as if it began with its centre"),
        (corner_box, "two corners"),
        (turn_box, "belong to another object"),
        (turn_encoded_mask, "belong to another object"),
    ],
)
def test_masks_off_their_boxes_are_one_warning_with_the_cause_and_none_about_areas(
    root: Path, change: Change, hint: str, for_scoring: bool
) -> None:
    found = {finding.code: finding for finding in check(root, change, for_scoring=for_scoring)}
    assert set(found) - {"box_over_edge"} == {"mask_off_box"}
    finding = found["mask_off_box"]
    assert finding.level == "warning" and hint in finding.hint and finding.count >= 3
    assert ("no detection fits both" if for_scoring else "learned as its mask") in finding.what


def test_areas_of_objects_in_shares_of_the_image_are_not_blamed(root: Path) -> None:
    def change(entry: dict[str, Any]) -> None:
        scale_mask(1 / WIDTH, 1 / HEIGHT)(entry)
        x, y, width, height = entry["bbox"]
        entry["bbox"] = [x / WIDTH, y / HEIGHT, width / WIDTH, height / HEIGHT]

    assert [finding.code for finding in check(root, change, for_scoring=True)] == ["box_normalised"]


@pytest.mark.parametrize(
    ("box", "polygon"),
    [
        ([20, 20, 1, 1], [20.4, 20.4, 22.9, 20.4, 22.9, 22.9]),
        ([20, 20, 1, 60], [20, 20, 22.9, 20, 22.9, 80]),
        ([20, 20, 2, 2], [18.5, 18.5, 20.5, 18.5, 20.5, 20.5]),
        ([0, 20, 10, 50], [-90, 20, 10, 20, 10, 70]),  # The polygon alone reaches out of the image.
    ],
)
def test_tools_that_round_or_cut_boxes_do_not_count(root: Path, box: list[float], polygon: list[float]) -> None:
    def change(entry: dict[str, Any]) -> None:
        if entry["id"] == 3:
            entry.update(bbox=box, segmentation=[polygon])

    assert check(root, change, for_scoring=False) == []


def test_boxes_beyond_floating_point_end_in_no_traceback(root: Path) -> None:
    def change(entry: dict[str, Any]) -> None:
        entry.update(bbox=[1e308, 1e308, 1e308, 1e308])

    assert "box_outside" in [finding.code for finding in check(root, change, for_scoring=False)]
    train = coco_layout(root).train
    document = json.loads(train.annotations.read_text())
    for entry in (*document["images"], *document["annotations"]):
        entry |= {"width": None} if "width" in entry else {"bbox": [1, 1, 1e308, 1e308]}
    train.annotations.write_text(json.dumps(document))
    assert {finding.code for finding in check_split(train).findings} == {"image_entry"}


def test_of_a_large_file_a_sample_is_looked_at(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.data.entries.MAX_SAMPLED", 4)
    (finding,) = check(root, turn_box, for_scoring=False)
    assert finding.count == 4 and "(one annotation in 3 is looked at)" in finding.what  # 10 objects, by threes


@pytest.mark.parametrize("seed", range(5))
def test_the_extent_of_an_encoded_mask_is_that_of_its_pixels(seed: int) -> None:
    pixels = np.zeros((9, 7), dtype=np.uint8, order="F")
    top, bottom, left, right = np.random.default_rng(seed).integers([0, 5, 0, 4], [4, 10, 3, 8])
    pixels[top:bottom, left] = pixels[bottom - 1, left:right] = pixels[top, right - 1] = 1
    encoded = coco_mask.encode(pixels)
    encoded["counts"] = encoded["counts"].decode()
    assert mask_extent(encoded) == (left, top, right, bottom)
    assert mask_extent({"size": [9, 7], "counts": [63]}) is None
