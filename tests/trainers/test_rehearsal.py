"""What would end every worker is found by building the model and running it once, with its key."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.data.generate import generate
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.spec import Experiment
from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment
from tests.builders.keypoints import add_keypoints, keypoint_experiment
from trainers import mask_rcnn
from trainers.contract.plan import TrialPlan
from trainers.rehearsal import rehearse

SIZES, LEVELS = "MODEL.ANCHOR_GENERATOR.SIZES", "the number of input features is 5"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rehearsal")
    generate(root / "data", num_train=4, num_val=3, size=64, num_classes=3)
    return root


def plan_of(root: Path, overrides: dict[str, Any] | None = None, **model: Any) -> TrialPlan:
    values = tiny_experiment(model={"weights": "", "overrides": TINY_OVERRIDES | (overrides or {}), **model})
    (plan,) = expand(Experiment.model_validate(values), Hardware(num_cpus=1), str(root / "run"), root / "data")
    return plan


@pytest.mark.parametrize("recipe", ["reference", "fast"])
def test_a_fit_model_has_no_problem(data: Path, recipe: str) -> None:
    values = tiny_experiment(trials={"recipes": [recipe], "scaling": "strong"})
    assert rehearse(expand(Experiment.model_validate(values), Hardware(num_cpus=1), "/runs/x", data / "data")) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("MODEL.RESNETS.NORM", "SyncBN", "SyncBN needs GPUs"),
        ("MODEL.RESNETS.NORM", "BatchNorm", "knows no 'BatchNorm'"),
        ("MODEL.RESNETS.DEPTH", 20, "knows no 20"),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True], "not compiled"),
        (SIZES, [[8], [16]], LEVELS),
        (SIZES, [[8, 16], [16], [32], [64], [128]], "same number of anchors"),
        ("MODEL.RPN.IN_FEATURES", ["p2", "p9"], "knows no 'p9'"),
        ("MODEL.RPN.IOU_THRESHOLDS", [0.7, 0.3], "low <= high"),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", [1.0, 1.0], "expected 4, got 2"),
        ("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0, 4.0], "different shapes"),
        ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "CLS_AGNOSTIC_BBOX_REG"),
        ("INPUT.FORMAT", "XYZ", "wrong mode"),
    ],
)  # fmt: skip
def test_what_detectron2_refuses_is_an_error_with_its_key(data: Path, key: str, value: Any, words: str) -> None:
    (problem,) = rehearse([plan_of(data, {key: value})])
    assert (problem.level, problem.code) == ("error", "model_config") and words in problem.what
    assert problem.file == key
    assert "\n" not in problem.what and problem.hint


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_precise_statistics_of_a_model_without_batch_norm_are_a_warning(data: Path, norm: str) -> None:
    problems = rehearse([plan_of(data, {"TEST.PRECISE_BN.ENABLED": True, "MODEL.RESNETS.NORM": norm})])
    assert [(each.level, each.file) for each in problems] == [("warning", "TEST.PRECISE_BN.ENABLED")] * (norm != "BN")


def test_the_key_is_found_in_a_file_of_ones_own(data: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    zoo = Path(mask_rcnn.model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    own.write_text(f"_BASE_: {zoo}\nMODEL: {{RPN: {{IOU_LABELS: [0, 1]}}}}\n")
    (problem,) = rehearse([plan_of(data, config=str(own))])
    assert problem.file == "MODEL.RPN.IOU_LABELS" and "len(labels)" in problem.what


def test_what_only_gpus_can_do_is_left_to_them(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, images: object) -> None:
        raise NotImplementedError("this operation is not supported on CPUs")

    monkeypatch.setattr("detectron2.modeling.GeneralizedRCNN.forward", refuse)
    plan = plan_of(data)
    assert rehearse([dataclasses.replace(plan, device="cuda")]) == []
    (problem,) = rehearse([plan])
    assert "not supported on CPUs" in problem.what


def test_start_weights_are_compared_with_the_model(data: Path, tmp_path: Path) -> None:
    plan = plan_of(data)
    state = mask_rcnn.build_detector(mask_rcnn.build_config(plan), plan).state_dict()
    predictor = "roi_heads.box_predictor.cls_score.weight"
    state[predictor] = torch.zeros(81, *state[predictor].shape[1:])
    torch.save({"model": state}, tmp_path / "start.pth")
    (problem,) = rehearse([plan_of(data, weights=str(tmp_path / "start.pth"))])
    assert (problem.level, problem.code) == ("warning", "weights_shape") and predictor in problem.what
    torch.save({"state_dict": {"backbone.layer1.0.conv1.weight": torch.zeros(1)}}, tmp_path / "start.pth")
    (problem,) = rehearse([plan_of(data, weights=str(tmp_path / "start.pth"))])
    assert (problem.level, problem.code) == ("error", "weights_unmatched")


def test_the_validation_set_is_scored(data: Path, tmp_path: Path) -> None:
    plan = plan_of(data)
    document = json.loads(Path(plan.val.annotations).read_text())
    for entry in document["annotations"]:
        del entry["bbox"]
    (tmp_path / "val.json").write_text(json.dumps(document))
    val = dataclasses.replace(plan.val, annotations=str(tmp_path / "val.json"))
    (problem,) = rehearse([dataclasses.replace(plan, val=val)])
    assert (problem.code, problem.file) == ("scoring", val.annotations) and "bbox" in problem.what


def test_a_keypoint_model_is_rehearsed_with_the_datas_own_keypoints(tmp_path: Path) -> None:
    generate(tmp_path / "data", num_train=4, num_val=3, size=64, num_classes=3)

    def problems(**overrides: Any) -> list[tuple[str, str]]:
        values = keypoint_experiment(tmp_path / "data")
        values["model"] = {**values["model"], "overrides": values["model"]["overrides"] | overrides}
        plans = expand(Experiment.model_validate(values), Hardware(num_cpus=1), str(tmp_path / "run"), tmp_path)
        return [(problem.level, problem.code) for problem in rehearse(plans)]

    assert problems() == [("error", "keypoints_missing")]
    add_keypoints(tmp_path / "data")
    assert problems() == []
    assert problems(**{"TEST.KEYPOINT_OKS_SIGMAS": []}) == [("error", "keypoint_sigmas")]
