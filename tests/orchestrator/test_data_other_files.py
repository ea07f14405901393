"""A file for another of COCO's tasks (panoptic segments, captions) is recognised, and the right one named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.checks import check_split
from orchestrator.data.layout import Split

IMAGES = [{"id": 1, "file_name": "1.jpg", "width": 48, "height": 48}]
SEGMENTS = {"segments_info": [{"id": 7, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}]}
PANOPTIC: dict[str, Any] = {
    "images": IMAGES,
    "annotations": [{"image_id": 1, "file_name": "1.png", **SEGMENTS}],
    "categories": [{"id": 1, "name": "person", "isthing": 1}],
}
CAPTIONS: dict[str, Any] = {"images": IMAGES, "annotations": [{"id": 1, "image_id": 1, "caption": "A cat."}]}


@pytest.mark.parametrize("for_scoring", [False, True])
@pytest.mark.parametrize(
    ("name", "document", "kind", "hint"),
    [
        ("panoptic_val2017.json", PANOPTIC, "panoptic segments", "instances_val2017.json"),
        ("captions_train2017.json", CAPTIONS, "captions", "instances_train2017.json"),
        ("my.json", CAPTIONS, "captions", "instances_….json"),
    ],
)
def test_a_file_without_objects_is_recognised(
    tmp_path: Path, name: str, document: dict[str, Any], kind: str, hint: str, for_scoring: bool
) -> None:
    (tmp_path / name).write_text(json.dumps(document))
    (finding,) = check_split(Split(tmp_path / name, tmp_path, for_scoring=for_scoring)).findings
    assert (finding.level, finding.code) == ("error", "annotation_kind")
    assert f"holds {kind}" in finding.what and hint in finding.hint


def test_objects_with_a_caption_are_objects(tmp_path: Path) -> None:
    entry = {"id": 1, "image_id": 1, "category_id": "x", "bbox": [1, 1, 9, 9], "caption": "A cat."}
    document = {**PANOPTIC, "annotations": [entry]}
    (tmp_path / "my.json").write_text(json.dumps(document))
    found = check_split(Split(tmp_path / "my.json", tmp_path)).findings
    assert "annotation_kind" not in [finding.code for finding in found]
