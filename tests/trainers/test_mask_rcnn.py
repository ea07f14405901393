"""Configs, weights and solvers of any detector of the model zoo."""

import dataclasses
import hashlib
import pickle
import sys
from pathlib import Path

import pytest
import torch

from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment
from tests.builders.training import plan_of
from trainers.contract.plan import TrialPlan
from trainers.evaluation import Evaluator
from trainers.mask_rcnn import ConfigurationError, build_config, build_detector, register

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


REFUSED = {
    "SOLVER.LR_SCHEDULER_NAME": ("CosineAnnealing", "Unknown LR scheduler"),
    "SOLVER.WARMUP_METHOD": ("exponential", "Unknown warmup method"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("full_model", "full_model"),
    "INPUT.RANDOM_FLIP": ("both", "At least one of horiz or vert"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("any", r"assert sample_style in .* any"),
    "INPUT.CROP.TYPE": ("some", "relative_range"),
    "INPUT.CROP.SIZE": ([1.5, 1.5], "assert h >= croph"),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIMagic", "Unknown pooler type"),
    "MODEL.ANCHOR_GENERATOR.SIZES": ([["8"], [16], [32], [64], [128]], "unsupported operand"),
}
"""For a key, a value that detectron2 would refuse once it trains, and words of the message."""


@pytest.mark.parametrize("key", REFUSED)
def test_what_detectron2_refuses_is_a_configuration_error_before_anything_is_read(key: str) -> None:
    value, words = REFUSED[key]
    cropping = {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "relative"} if "CROP" in key else {}
    trial = dataclasses.replace(plan(weights=""), overrides={**TINY_OVERRIDES, **cropping, key: value})
    with pytest.raises(ConfigurationError, match=words):
        build_detector(build_config(trial), trial)


def test_momentum_of_nesterov_is_needed() -> None:
    with pytest.raises(ConfigurationError, match=r"SOLVER: .*Nesterov momentum requires a momentum"):
        build_config(plan(overrides={"SOLVER.NESTEROV": True, "SOLVER.MOMENTUM": 0.0}))


def test_crops_of_images_without_objects_are_refused_with_masks_alone() -> None:
    crop = {"INPUT.CROP.ENABLED": True, "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False}
    with pytest.raises(ConfigurationError, match="FILTER_EMPTY_ANNOTATIONS: true"):
        build_config(plan(overrides=crop))
    build_config(plan(config="COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", overrides=crop))


def test_cropping_polygons_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shapely.geometry", None)
    with pytest.raises(ConfigurationError, match=r"INPUT: .*shapely"):
        build_config(plan(overrides={"INPUT.CROP.ENABLED": True}))
    build_config(plan(overrides={}))


@pytest.mark.parametrize("part", ["RESNETS", "FPN", "ROI_MASK_HEAD"])
def test_synchronized_batch_norm_is_refused_on_cpus(part: str) -> None:
    key = f"MODEL.{part}.NORM"
    trial = plan(weights="", overrides={**TINY_OVERRIDES, key: "SyncBN"})
    with pytest.raises(ConfigurationError, match="SyncBN needs GPUs"):
        build_detector(build_config(trial), trial)
    trial = plan(weights="", overrides={**TINY_OVERRIDES, key: "naiveSyncBN"})
    build_detector(build_config(trial), trial)


def test_synchronized_batch_norm_evaluates_on_cpus_as_batch_norm_does(tmp_path: Path) -> None:
    """It only refuses to be trained there; the validation loss has it in evaluation mode, too."""
    found = []
    for norm in ("BN", "SyncBN"):
        trial = plan_of(tmp_path, "mask_rcnn")
        overrides = {**trial.overrides, "MODEL.RESNETS.NORM": norm, "MODEL.FPN.NORM": norm}
        trial = dataclasses.replace(trial, overrides=overrides, trial_dir=str(tmp_path), validation_loss=True)
        cfg = build_config(trial)
        register(cfg, trial.train)
        register(cfg, trial.val)
        torch.manual_seed(0)
        found.append(Evaluator(cfg, trial).run(build_detector(cfg, trial, trains=norm == "BN"), 1))
    assert found[0].validation_losses == found[1].validation_losses != {}
    assert found[0].figures == found[1].figures


def test_the_recorded_config_says_what_is_in_force() -> None:
    trial = plan(overrides={"SOLVER.AMP.ENABLED": True, "SEED": 3, "OUTPUT_DIR": "/elsewhere", "TEST.EVAL_PERIOD": 77})
    cfg = build_config(trial)
    recorded = cfg.SOLVER.AMP.ENABLED, cfg.SEED, cfg.OUTPUT_DIR
    assert recorded == (False, trial.seed, trial.trial_dir)
    assert cfg.TEST.EVAL_PERIOD == trial.solver.eval_period != 77
    assert build_config(
        dataclasses.replace(trial, recipe=dataclasses.replace(trial.recipe, precision="amp"))
    ).SOLVER.AMP.ENABLED
