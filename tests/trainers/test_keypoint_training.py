"""A Keypoint R-CNN trains and is scored, and what is made faster for it gives what detectron2 gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances

from orchestrator.data.generate import generate
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.spec import Experiment
from tests.builders.keypoints import add_keypoints, keypoint_experiment
from tests.builders.training import last, train
from trainers import mask_rcnn
from trainers.contract.events import Evaluated, LoopFinished
from trainers.contract.plan import TrialPlan
from trainers.detections import IMAGE_FIELD, to_host
from trainers.loading import training_records
from trainers.speedups.fast_mapper import FastMapper


def plan_of(folder: Path, recipe: str = "reference") -> TrialPlan:
    generate(folder / "data", num_train=16, num_val=4, size=64, num_classes=3)
    add_keypoints(folder / "data")
    values = keypoint_experiment(folder / "data", trials={"recipes": [recipe], "scaling": "strong"})
    (plan,) = expand(Experiment.model_validate(values), Hardware(num_cpus=1), str(folder / "run"), folder)
    return plan


@pytest.mark.train
@pytest.mark.parametrize("recipe", ["reference", "fast"])
def test_a_keypoint_model_trains_and_is_scored_for_boxes_and_keypoints(tmp_path: Path, recipe: str) -> None:
    events = train(plan_of(tmp_path, recipe))
    assert last(events, LoopFinished).reason == "max_iter"
    evaluated = last(events, Evaluated)
    names = {name.partition("_")[0] for name in evaluated.figures}
    assert names == {"box", "keypoint"}, "no mask figures for a model without masks"
    assert evaluated.figures["keypoint_ap"] is not None and evaluated.figures["keypoint_apm"] is None, "small objects"
    assert evaluated.mask_scored is None and evaluated.scored == evaluated.keypoint_scored >= evaluated.box_scored


def test_the_fast_mapper_moves_and_mirrors_keypoints_as_detectron2s_does(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    cfg = mask_rcnn.build_config(plan)
    mask_rcnn.register(cfg, plan.train)
    mirrored = 0
    for index, record in enumerate(training_records(cfg, plan)):
        mapped = []
        for mapper in (DatasetMapper(cfg, is_train=True), FastMapper(cfg, is_train=True)):
            torch.manual_seed(index)
            np.random.seed(index)
            mapped.append(mapper(record)["instances"])
        theirs, ours = (instances.gt_keypoints.tensor for instances in mapped)
        assert torch.equal(theirs, ours)
        left, right = theirs[:, 0, 0], theirs[:, 1, 0]
        assert (left <= right).all(), "left stays left in a mirrored image"
        mirrored += not torch.equal(theirs[:, 0, 0], torch.tensor([a["keypoints"][0] for a in record["annotations"]]))
    assert mirrored


def test_keypoints_are_encoded_as_detectron2_encodes_them() -> None:
    torch.manual_seed(0)
    found = Instances((50, 60))
    found.pred_boxes = Boxes(torch.rand(3, 4) * 20 + torch.tensor([0.0, 0.0, 20.0, 20.0]))
    found.scores, found.pred_classes = torch.rand(3), torch.tensor([0, 1, 0])
    found.pred_keypoints = torch.rand(3, 5, 3) * 50
    found.set(IMAGE_FIELD, torch.zeros(3, dtype=torch.int64))
    ours = to_host(found, [7]).results({0: 0, 1: 1})
    assert ours == instances_to_coco_json(found, 7) and len(ours[0]["keypoints"]) == 15
