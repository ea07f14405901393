"""What a data set lists twice under different names or ids is counted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from orchestrator.data.checks import check_split
from orchestrator.data.generate import generate
from orchestrator.data.layout import Split, coco_layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.findings import Finding


@pytest.fixture
def root(tmp_path: Path) -> Path:
    generate(tmp_path / "set", num_train=6, num_val=1, size=48, seed=5, num_classes=2)
    return tmp_path / "set"


def check(root: Path, change: Callable[[dict[str, Any]], None], *, for_scoring: bool = False) -> list[Finding]:
    train = coco_layout(root).train
    document = json.loads(train.annotations.read_text())
    change(document)
    train.annotations.write_text(json.dumps(document))
    return check_split(Split(train.annotations, train.images, for_scoring=for_scoring)).findings


def list_twice(document: dict[str, Any], **values: Any) -> None:
    """Adds every object again under a new id, with other values."""
    again = copy.deepcopy(document["annotations"])
    for entry in again:
        entry.update(id=entry["id"] + 1000, **values)
    document["annotations"] += again


@pytest.mark.parametrize("for_scoring", [False, True])
def test_objects_that_are_listed_twice_are_one_warning(root: Path, for_scoring: bool) -> None:
    (finding,) = check(root, list_twice, for_scoring=for_scoring)
    document = json.loads(coco_layout(root).train.annotations.read_text())
    assert (finding.level, finding.code, finding.id) == ("warning", "duplicate_object", "annotation 1001")
    assert finding.count == len(document["annotations"]) / 2 and "same as annotation 1's" in finding.what
    assert ("the other counts as missed" if for_scoring else "trained on twice") in finding.what


def test_the_layout_of_a_mask_s_text_makes_no_other_object(root: Path) -> None:
    train = coco_layout(root).train
    document = json.loads(train.annotations.read_text())
    list_twice(document)
    half = len(document["annotations"]) // 2
    document["annotations"][half:] = [f"#{n}#" for n in range(half)]
    text = json.dumps(document)
    for n, entry in enumerate(document["annotations"][:half]):
        text = text.replace(f'"#{n}#"', json.dumps({**entry, "id": n + 1001}, indent=1))
    train.annotations.write_text(text)
    (finding,) = check_split(train).findings
    assert finding.code == "duplicate_object" and finding.count == half


@pytest.mark.parametrize(
    "values", [{"category_id": 2}, {"keypoints": [1, 1, 2]}, {"iscrowd": 1}, {"bbox": [1, 2, 0, 3], "segmentation": []}]
)
def test_objects_that_differ_or_count_for_nothing_are_none_that_are_listed_twice(
    root: Path, values: dict[str, Any]
) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"] = [{**entry, "category_id": 1} for entry in document["annotations"]]
        list_twice(document, **values)

    assert "duplicate_object" not in [finding.code for finding in check(root, change)]


@pytest.mark.parametrize("name", ["./{}", "x/../{}", ".//{}", "{}"])
def test_two_ways_to_write_one_file_name_are_noticed(root: Path, name: str) -> None:
    def change(document: dict[str, Any]) -> None:
        first, second = document["images"][:2]
        second["file_name"] = name.format(first["file_name"])

    found = {finding.code: finding for finding in check(root, change)}
    assert found["duplicate_file_name"].what.endswith("is image 1's too")
