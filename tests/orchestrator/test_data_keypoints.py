"""Keypoints that are no places, or of no known visibility, are counted, with what training and scoring make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.checks import SplitReport, check_split
from orchestrator.data.generate import generate
from orchestrator.data.layout import Split, coco_layout
from tests.builders.keypoints import add_keypoints

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    generate(tmp_path / "set", num_train=3, num_val=1, size=48, seed=5, num_classes=2)
    add_keypoints(tmp_path / "set")
    return tmp_path / "set"


def check(root: Path, *, for_scoring: bool, **values: Any) -> SplitReport:
    """The check of the training set, once its second object has these values."""
    train = coco_layout(root).train
    document = json.loads(train.annotations.read_text())
    document["annotations"][1].update(values)
    train.annotations.write_text(json.dumps(document))
    return check_split(Split(train.annotations, train.images, for_scoring=for_scoring))


@pytest.mark.parametrize(
    ("point", "code", "words", "in_training", "in_scoring"),
    [
        ([NAN, 4, 2], "keypoint_not_finite", "1 is at [nan, 4]", "not labelled", "match it with anything"),
        ([4, -INFINITY, 1], "keypoint_not_finite", "1 is at [4, -inf]", "not labelled", "match it with anything"),
        ([4, 4, 7], "keypoint_visibility", "1 has visibility 7,", "taken as labelled", "taken as labelled"),
        ([4, 4, -4], "keypoint_visibility", "1 has visibility -4,", "as not labelled", "as not labelled"),
        ([4, 4, NAN], "keypoint_visibility", "1 has visibility nan,", "as not labelled", "as not labelled"),
    ],
)
def test_a_keypoint_of_no_place_or_visibility_is_a_warning(
    root: Path, point: list[float], code: str, words: str, in_training: str, in_scoring: str
) -> None:
    keypoints = [1, 1, 2, *point, 3, 3, 1]
    for effect, for_scoring in ((in_training, False), (in_scoring, True)):
        report = check(root, keypoints=keypoints, for_scoring=for_scoring)
        (finding,) = report.findings
        assert (finding.level, finding.code, finding.id) == ("warning", code, "annotation 2")
        assert words in finding.what and effect in finding.what
        # A model of keypoints is scored wrong by a place that is none, which preflight refuses.
        assert report.summary and report.summary.num_broken_keypoints == (effect == "match it with anything")


@pytest.mark.parametrize(
    "values",
    [
        {"keypoints": [0, 0, 0, 1.5, 2, 1.0, 3, 3, 2.0]},
        {"keypoints": [NAN, NAN, 0, 1, 2, 1, 3, 3, 2]},  # not labelled: nothing reads where it is
        {"keypoints": [NAN, 4, 7, 1, 2, 1, 3, 3, 2], "iscrowd": 1},
    ],
)
@pytest.mark.parametrize("for_scoring", [False, True])
def test_keypoints_that_are_good_or_that_nothing_reads_are_fine(
    root: Path, values: dict[str, Any], for_scoring: bool
) -> None:
    assert check(root, for_scoring=for_scoring, **values).findings == []
