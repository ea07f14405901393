"""Configs, weights and solvers of any detector of the model zoo."""

import dataclasses
import hashlib
import pickle
from pathlib import Path

import pytest
import torch

from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment
from trainers.contract.plan import TrialPlan
from trainers.mask_rcnn import ConfigurationError, build_config, build_detector

ZOO = [
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
]


def plan(**model: object) -> TrialPlan:
    experiment = parse_experiment(tiny_experiment(model=model), "test")
    return expand(experiment, Hardware(), "/runs/x", Path("/data"))[0]


@pytest.mark.parametrize("config", ZOO)
def test_a_model_zoo_config_resolves_to_the_plans_figures(config: str) -> None:
    trial = plan(config=config, weights="", overrides={"SOLVER.IMS_PER_BATCH": 4})
    cfg = build_config(trial)
    assert cfg.SOLVER.IMS_PER_BATCH == trial.solver.global_batch_size == 4
    assert trial.solver.max_iter == cfg.SOLVER.MAX_ITER
    assert tuple(cfg.SOLVER.STEPS) == trial.solver.steps
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 3
    assert ("Mask" in config or "InstanceSegmentation" in config) == cfg.MODEL.MASK_ON


def test_an_unknown_detectron2_key_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match=r"Non-existent key: MODEL\.RESNETS\.DEEP"):
        build_config(plan(overrides={"MODEL.RESNETS.DEEP": 50}))


def test_a_users_config_may_not_run_code(tmp_path: Path) -> None:
    evil = tmp_path / "evil.yaml"
    evil.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{tmp_path}/ran']\n", encoding="utf-8")
    with pytest.raises(ConfigurationError):
        build_config(TrialPlan.from_dict({**_values(plan()), "config_file": str(evil)}))
    assert not (tmp_path / "ran").exists()


def _values(trial: TrialPlan) -> dict[str, object]:
    return dataclasses.asdict(trial)


def test_start_weights_are_loaded_from_a_users_checkpoint(tmp_path: Path) -> None:
    trial = plan(weights="", overrides=TINY_OVERRIDES)
    cfg = build_config(trial)
    torch.manual_seed(1)
    first = build_detector(cfg, trial)
    path = tmp_path / "start.pth"
    torch.save({"model": first.state_dict()}, path)
    with_weights = plan(weights=str(path), overrides=TINY_OVERRIDES)
    torch.manual_seed(2)
    second = build_detector(build_config(with_weights), with_weights)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_imagenet_weights_in_detectron2s_pickle_format_are_matched_by_name(tmp_path: Path) -> None:
    trial = plan(weights="", overrides=TINY_OVERRIDES)
    model = build_detector(build_config(trial), trial)
    stem = model.backbone.bottom_up.stem.conv1.weight
    path = tmp_path / "R-50.pkl"
    weights = {"model": {"stem.conv1.weight": torch.full_like(stem, 0.5).numpy()}, "__author__": "a test"}
    path.write_bytes(pickle.dumps({**weights, "matching_heuristics": True}))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    ours = plan(weights=str(path), weights_sha256=sha256, overrides=TINY_OVERRIDES)
    loaded = build_detector(build_config(ours), ours)
    assert torch.all(loaded.backbone.bottom_up.stem.conv1.weight == 0.5)
