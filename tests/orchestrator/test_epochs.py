"""How many images an epoch has, where COCO's files differ by what is learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from tests.builders.experiments import tiny_experiment


def test_a_keypoint_model_takes_cocos_files_with_keypoints_and_counts_the_images_that_have_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [
        {"image_id": image, "keypoints": [1, 1, seen], "iscrowd": 0} for image, seen in ((1, 2), (1, 0), (2, 0), (3, 1))
    ]
    file = tmp_path / "coco" / "annotations" / "person_keypoints_train2017.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"images": [], "annotations": entries, "categories": []}))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    values = tiny_experiment(
        data={"coco2017": True},
        model={"config": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", "weights": ""},
        protocol={"eval_period_epochs": 16.0, "iterations": 20},
    )
    (plan,) = expand(parse_experiment(values, "test"), Hardware(num_cpus=1), "/runs/x", Path("/data"))
    assert plan.train.annotations == str(file) and "person_keypoints_val2017" in plan.val.annotations
    assert plan.solver.global_batch_size == 16 and plan.solver.eval_period == 2, "16 epochs of 2 images"
