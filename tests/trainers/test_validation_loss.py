"""The validation loss is that of a hand-made loop over the images, for every kind of model, and changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as augment
from detectron2.modeling import RetinaNet
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from orchestrator.data.generate import generate
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.spec import Experiment
from tests.builders.keypoints import add_keypoints, keypoint_experiment
from tests.builders.training import last, plan_of, train
from trainers import loading, mask_rcnn
from trainers.contract.evaluation_details import EvaluationDetails
from trainers.contract.events import Evaluated, LoopFinished
from trainers.contract.plan import TrialPlan
from trainers.passes import step_seed
from trainers.recipes import PLAIN
from trainers.validation_loss import ValidationLoss


def made_plan(folder: Path, model: str) -> TrialPlan:
    if model != "keypoint_rcnn":
        return plan_of(folder, model)
    generate(folder / "data", num_train=16, num_val=4, size=64, num_classes=3)
    add_keypoints(folder / "data")
    experiment = Experiment.model_validate(keypoint_experiment(folder / "data"))
    (plan,) = expand(experiment, Hardware(num_cpus=1), str(folder / "run"), folder)
    return plan


def built(plan: TrialPlan) -> tuple[CfgNode, nn.Module]:
    torch.set_num_threads(plan.cpus_per_worker)
    cfg = mask_rcnn.build_config(plan)
    mask_rcnn.register(cfg, plan.train)
    mask_rcnn.register(cfg, plan.val)
    torch.manual_seed(3)
    model = mask_rcnn.build_detector(cfg, plan)
    for norm in get_bn_modules(model):
        nn.init.uniform_(norm.running_mean, -0.2, 0.2)  # those of batches are others
    return cfg, model


def images(cfg: CfgNode, plan: TrialPlan) -> list[dict[str, Any]]:
    """The validation images with objects, resized as for detections and not augmented, by detectron2's mapper."""
    resized = [augment.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)]
    mapper = DatasetMapper(
        is_train=True, augmentations=resized, image_format=cfg.INPUT.FORMAT, use_instance_mask=cfg.MODEL.MASK_ON,
        use_keypoint=cfg.MODEL.KEYPOINT_ON,
    )  # fmt: skip
    records = [record for record in loading.evaluation_records(cfg, plan) if record["annotations"]]
    return [mapper(record) for record in records]


def by_hand(model: nn.Module, inputs: list[dict[str, Any]], seed: int) -> dict[str, float]:
    """The mean losses of the images, one by one; of a RetinaNet their sums over all positive anchors."""
    sums: dict[str, float] = {}
    positives = 0
    for norm in get_bn_modules(model.train()):
        norm.eval()
    with torch.no_grad(), EventStorage():
        for place, image in enumerate(inputs):
            torch.manual_seed(step_seed(seed, 0, place))
            factor = 1.0
            if isinstance(model, RetinaNet):
                pictures = model.preprocess_image([image])
                features = model.backbone(pictures.tensor)
                anchors = model.anchor_generator([features[name] for name in model.head_in_features])
                labels, _ = model.label_anchors(anchors, [image["instances"]])
                number = int(((labels[0] >= 0) & (labels[0] != model.num_classes)).sum())
                model.loss_normalizer = 100.0
                factor = 90.0 + 0.1 * number  # what the model divides by
                positives += number
            for name, loss in model([image]).items():
                sums[name] = sums.get(name, 0.0) + float(loss) * factor
    means = {name: value / (positives or len(inputs)) for name, value in sums.items()}
    return {**means, "total_loss": sum(means.values())}


@pytest.mark.parametrize(
    ("model_name", "recipe"),
    [("mask_rcnn", "reference"), ("mask_rcnn", "plain"), ("retinanet", "reference"), ("keypoint_rcnn", "reference")],
)
def test_it_is_that_of_a_hand_made_loop_and_leaves_everything_as_it_was(
    tmp_path: Path, model_name: str, recipe: str
) -> None:
    plan = made_plan(tmp_path, model_name)
    if recipe == "plain":
        plan = dataclasses.replace(plan, recipe=PLAIN)
    cfg, model = built(plan)
    if isinstance(model, RetinaNet):
        model.loss_normalizer = 42.0
    state, generator, numpys = copy.deepcopy(model.state_dict()), torch.get_rng_state(), np.random.get_state()

    losses = ValidationLoss(cfg, plan)
    found = losses.run(model)

    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert torch.get_rng_state().equal(generator) and np.random.get_state()[2] == numpys[2]
    assert (np.random.get_state()[1] == numpys[1]).all() and all(module.training for module in model.modules())
    assert getattr(model, "loss_normalizer", 42.0) == 42.0
    assert losses.run(model.eval()) == found and not model.training, "the same samples each time"
    expected = by_hand(model, images(cfg, plan), plan.seed)
    assert found == pytest.approx(expected, rel=1e-5) and found.keys() == expected.keys()
    assert {"mask_rcnn": "loss_mask", "keypoint_rcnn": "loss_keypoint"}.get(model_name, "loss_cls") in found


@pytest.mark.parametrize("model_name", ["mask_rcnn", "retinanet"])
def test_the_shares_of_several_workers_add_up_to_the_same_bit(
    tmp_path: Path, model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, model_name)
    cfg, model = built(plan)
    whole = ValidationLoss(cfg, plan).run(model)
    shares: list[Any] = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    monkeypatch.setattr(comm, "gather", lambda data, dst: shares.append(data) or shares)
    for rank in (2, 1, 0):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        found = ValidationLoss(cfg, plan).run(model)
        assert (found == {}) == (rank != 0)
    assert found == whole and len(shares) == 3


def test_a_model_without_finite_predictions_has_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_of(tmp_path, "mask_rcnn")
    cfg, model = built(plan)
    nn.init.constant_(model.get_submodule("proposal_generator.rpn_head.anchor_deltas").weight, float("nan"))
    assert ValidationLoss(cfg, plan).run(model) == {}
    assert "there is no validation loss" in caplog.text


@pytest.mark.train
@pytest.mark.parametrize("model_name", ["mask_rcnn", "retinanet"])
def test_training_with_it_ends_with_the_same_weights_and_checkpoints_are_rated_by_it(
    tmp_path: Path, model_name: str
) -> None:
    plan = plan_of(tmp_path, model_name)
    without = train(plan)
    plan = dataclasses.replace(
        plan, validation_loss=True, metric="validation_loss", checkpoint_dir=str(tmp_path / "other")
    )
    events = train(plan)
    assert last(events, LoopFinished).state_sha256 == last(without, LoopFinished).state_sha256
    assert last(without, Evaluated).validation_losses == {}
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    totals = {event.iteration: event.validation_losses["total_loss"] for event in evaluated}
    assert list(totals) == [6, 12] and totals[6] != totals[12]
    assert all(event.part_seconds["loss"] > 0 for event in evaluated)
    manifests = [json.loads(path.read_text()) for path in Path(plan.checkpoint_dir).glob("iter_*/manifest.json")]
    assert {each["iteration"]: each["score"] for each in manifests}[12] == -totals[12]
    for event in evaluated:
        details = EvaluationDetails.read(Path(plan.trial_dir) / event.details_file)
        assert details.iteration == event.iteration
        assert [f"box_ap/{name}" for name in details.classes] == [k for k in event.class_ap if k.startswith("box_ap/")]
        assert details.curves.keys() == ({"box", "mask"} if model_name == "mask_rcnn" else {"box"})
