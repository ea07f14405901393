"""Names, mirrored pairs and sigmas of a data set's keypoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices

from tests.builders.models import KEYPOINT_RCNN, tiny_config
from trainers.contract.plan import DatasetPlan
from trainers.contract.problems import ConfigurationError
from trainers.keypoints import mirrored
from trainers.mask_rcnn import register

NUM_KEYPOINTS, SIGMAS, FLIP = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "TEST.KEYPOINT_OKS_SIGMAS", "INPUT.RANDOM_FLIP"


def dataset(folder: Path, *categories: dict[str, Any], num_keypoints: int = 0) -> DatasetPlan:
    annotations = [{"id": 1, "image_id": 1, "category_id": 1, "keypoints": [1, 1, 2] * num_keypoints}]
    content = {"images": [], "annotations": annotations if num_keypoints else [], "categories": list(categories)}
    (folder / "a.json").write_text(json.dumps(content))
    return DatasetPlan("keypoints_test", str(folder / "a.json"), str(folder))


def flipped(plan: DatasetPlan, **overrides: Any) -> list[int]:
    """The keypoint that each takes the place of in a mirrored image."""
    register(tiny_config(overrides, KEYPOINT_RCNN), plan)
    return [int(index) for index in create_keypoint_hflip_indices([plan.name])]


def few(number: int, **more: Any) -> dict[str, Any]:
    return {NUM_KEYPOINTS: number, SIGMAS: [0.05] * number} | more


def test_names_and_lines_come_from_the_categories(tmp_path: Path) -> None:
    names = ["nose", "left_eye", "right_eye", "tail"]
    lines = [[1, 2], [1, 3], [1, 9], "broken"]
    plan = dataset(tmp_path, {"id": 1, "name": "cat", "keypoints": names, "skeleton": lines}, {"id": 2, "name": "ball"})
    assert flipped(plan, **few(4)) == [0, 2, 1, 3]
    metadata = MetadataCatalog.get(plan.name)
    assert metadata.keypoint_names == names
    assert [pair[:2] for pair in metadata.keypoint_connection_rules] == [("nose", "left_eye"), ("nose", "right_eye")]


def test_seventeen_without_names_are_those_of_cocos_persons(tmp_path: Path) -> None:
    plan = dataset(tmp_path, {"id": 1, "name": "person"}, num_keypoints=17)
    assert flipped(plan)[:3] == [0, 2, 1]
    assert MetadataCatalog.get(plan.name).keypoint_names[16] == "right_ankle"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("left_eye", "right_eye"), ("eye.R", "eye.l"), ("L-Shoulder", "r-shoulder"), ("RShoulder", "lshoulder"),
        ("topLeft", "topright"), ("bottom_left", "bottom_right"), ("nose", "nose"), ("tail_l2", "tail_r2"),
        ("Lower_back", "lower_back"), ("upper", "upper"), ("wheel_rl", "wheel_rl"),
    ],
)  # fmt: skip
def test_left_and_right_are_read_off_a_name(name: str, other: str) -> None:
    assert mirrored(name) == other


def test_what_cannot_be_mirrored_is_refused_unless_nothing_is_mirrored(tmp_path: Path) -> None:
    plan = dataset(tmp_path, {"id": 1, "name": "cat", "keypoints": ["left_eye", "eye_right"]})
    with pytest.raises(ConfigurationError, match="'left_eye' has no counterpart 'right_eye'") as caught:
        flipped(plan, **few(2))
    assert caught.value.problem.code == "keypoint_flip" and "INPUT.RANDOM_FLIP=none" in caught.value.problem.hint
    assert flipped(plan, **few(2, **{FLIP: "none"})) == [0, 1]
    plan = dataset(tmp_path, {"id": 1, "name": "cat"}, num_keypoints=3)
    with pytest.raises(ConfigurationError, match="have no names"):
        flipped(plan, **few(3))
    assert flipped(plan, **few(3, **{FLIP: "none"})) == [0, 1, 2]


def test_a_number_of_keypoints_or_sigmas_that_is_not_the_datas_is_refused(tmp_path: Path) -> None:
    plan = dataset(tmp_path, {"id": 1, "name": "cat", "keypoints": ["nose", "tail"]})
    with pytest.raises(ConfigurationError, match=r"is 17, the data have 2 keypoints.*NUM_KEYPOINTS=2"):
        flipped(plan)
    with pytest.raises(ConfigurationError, match=r"COCO.s 17 values.*TEST.KEYPOINT_OKS_SIGMAS to .*\[0.05, 0.05\]"):
        flipped(plan, **{NUM_KEYPOINTS: 2})
    with pytest.raises(ConfigurationError, match="has 3 values"):
        flipped(plan, **{NUM_KEYPOINTS: 2, SIGMAS: [0.1] * 3})


def test_data_without_keypoints_or_with_several_lists_of_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="hold no keypoints"):
        flipped(dataset(tmp_path, {"id": 1, "name": "cat"}))
    two = [{"id": n, "name": str(n), "keypoints": ["nose", f"tail{n}"]} for n in (1, 2)]
    with pytest.raises(ConfigurationError, match="different keypoints"):
        flipped(dataset(tmp_path, *two), **few(2))
    with pytest.raises(ConfigurationError, match="'a' is listed twice"):
        flipped(dataset(tmp_path, {"id": 1, "name": "cat", "keypoints": ["a", "a"]}), **few(2))
