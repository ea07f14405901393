"""`plain` trains what detectron2's DefaultTrainer trains: the same losses and weights, bit for bit, on CPU.

DefaultTrainer is its own but for where its random numbers come from: an untouched one takes the sampler's seed from the
clock, and numbers of augmentation and of the steps from generators that go on from step to step.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler
from detectron2.engine import DefaultTrainer

from tests.builders.experiments import TINY_OVERRIDES
from tests.builders.training import last, plan_of, train
from trainers import mask_rcnn
from trainers.contract.events import LoopFinished, StepsDone
from trainers.contract.plan import TrialPlan
from trainers.loading import augmentation_seed
from trainers.passes import step_seed
from trainers.recipes import FAST, PLAIN, REFERENCE, Recipe

SETTINGS: dict[str, dict[str, Any]] = {
    "as the model zoo has it": {},
    "rare classes repeated, images cropped, all of the solver": {
        "DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
        "DATALOADER.REPEAT_THRESHOLD": 0.9,
        "INPUT.CROP.ENABLED": True,
        "INPUT.CROP.SIZE": [0.6, 0.7],
        "INPUT.RANDOM_FLIP": "vertical",
        "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
        "SOLVER.BASE_LR_END": 0.001,
        "SOLVER.WARMUP_METHOD": "constant",
        "SOLVER.NESTEROV": True,
        "SOLVER.MOMENTUM": 0.8,
        "SOLVER.WEIGHT_DECAY_NORM": 0.001,
        "SOLVER.WEIGHT_DECAY_BIAS": 0.0,
        "SOLVER.BIAS_LR_FACTOR": 2.0,
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "value",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.01,
    },
    "a subset, bitmasks, class-agnostic heads of another loss": {
        "DATALOADER.SAMPLER_TRAIN": "RandomSubsetTrainingSampler",
        "DATALOADER.RANDOM_SUBSET_RATIO": 0.6,
        "DATALOADER.ASPECT_RATIO_GROUPING": False,
        "INPUT.MASK_FORMAT": "bitmask",
        "INPUT.RANDOM_FLIP": "none",
        "INPUT.FORMAT": "RGB",
        "INPUT.MIN_SIZE_TRAIN": [48, 80],
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giou",
        "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True,
        "MODEL.RPN.BBOX_REG_LOSS_TYPE": "diou",
        "MODEL.RESNETS.NORM": "GN",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 32,
        "SOLVER.RESCALE_INTERVAL": True,
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE": float("inf"),
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.02,
    },
    "cascade heads without clipping": {
        "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
        "MODEL.BACKBONE.FREEZE_AT": 2,
        "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": False,
        "SOLVER.CLIP_GRADIENTS.ENABLED": False,
        "SOLVER.MOMENTUM": 0.0,
    },
    "a C4 model": {
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8, 16, 32, 64]],
        "config": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 64,
    },
    "RetinaNet": {
        "config": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "MODEL.RETINANET.NUM_CONVS": 1,
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": "giou",
    },
    "keypoints": {
        "config": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 3,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (16,),
        "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": 2,
        "TEST.KEYPOINT_OKS_SIGMAS": [0.1, 0.1, 0.1],
    },
    "boxes alone, without aspect ratio grouping, on empty images too": {
        "config": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        "DATALOADER.ASPECT_RATIO_GROUPING": False,
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign",
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
        "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True,
    },
}
"""Overrides of the tiny model's, and `config` for another one of the model zoo."""


class Pinned(DefaultTrainer):
    """DefaultTrainer with this program's random numbers, without its files."""

    plan: TrialPlan

    def __init__(self, cfg: CfgNode) -> None:
        self.seen: list[dict[str, float]] = []
        super().__init__(cfg)

        def seed(*_: Any) -> None:
            torch.manual_seed(step_seed(self.plan.seed, 0, self.iter))

        self.model.register_forward_pre_hook(seed)  # the loader draws a seed for itself before

    @classmethod
    def build_model(cls, cfg: CfgNode) -> Any:
        torch.manual_seed(cls.plan.seed)
        return super().build_model(cfg)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        few = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
        records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, few)
        seed, mapper, number = cls.plan.seed, DatasetMapper(cfg, is_train=True), iter(range(10**9))
        samplers = {
            "TrainingSampler": lambda: TrainingSampler(len(records), seed=seed),
            "RandomSubsetTrainingSampler": lambda: RandomSubsetTrainingSampler(
                len(records), cfg.DATALOADER.RANDOM_SUBSET_RATIO, seed_shuffle=seed, seed_subset=seed
            ),
            "RepeatFactorTrainingSampler": lambda: RepeatFactorTrainingSampler(
                RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
                    records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
                ),
                seed=seed,
            ),
        }

        def pinned(record: dict[str, Any]) -> Any:
            np.random.seed(augmentation_seed(seed, next(number)))
            return mapper(record)

        sampler = samplers[cfg.DATALOADER.SAMPLER_TRAIN]()
        return build_detection_train_loader(cfg, mapper=pinned, dataset=records, sampler=sampler)

    def after_step(self) -> None:
        super().after_step()
        self.seen.append({name: history.latest() for name, history in self.storage.histories().items()})

    def build_writers(self) -> list[Any]:
        return []

    @classmethod
    def test(cls, *_: Any) -> dict[str, Any]:
        return {}


def add_keypoints(annotations: Path) -> None:
    """Three keypoints for every object, of which two change places in a mirrored image; none in image 1."""
    document = json.loads(annotations.read_text())
    for category in document["categories"]:
        category["keypoints"] = ["left_corner", "right_corner", "middle"]
    for each in document["annotations"]:
        x, y, width, height = each["bbox"]
        visible = 0 if each["image_id"] == 1 else 2
        each["keypoints"] = [x, y, visible, x + width, y, visible, x + width / 2, y + height / 2, visible]
        each["num_keypoints"] = 3 if visible else 0
    annotations.write_text(json.dumps(document))


def prepared(folder: Path, overrides: dict[str, Any], recipe: Recipe, iterations: int = 10) -> TrialPlan:
    plan, overrides = plan_of(folder, "mask_rcnn"), dict(overrides)
    config = overrides.pop("config", plan.config_file)
    if "Keypoints" in config:
        add_keypoints(Path(plan.train.annotations))
        add_keypoints(Path(plan.val.annotations))
    solver = dataclasses.replace(plan.solver, max_iter=iterations, eval_period=0, evaluate_at_end=False)
    overrides = {**TINY_OVERRIDES, **overrides}
    return dataclasses.replace(
        plan, config_file=config, overrides=overrides, recipe=recipe, solver=solver, log_period=1
    )


@pytest.mark.train
@pytest.mark.parametrize("recipe", [PLAIN, REFERENCE], ids=["plain", "reference"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_losses_and_weights_are_those_of_default_trainer(tmp_path: Path, settings: str, recipe: Recipe) -> None:
    plan = prepared(tmp_path, SETTINGS[settings], recipe)
    ours = [event for event in train(plan) if isinstance(event, StepsDone)]
    Pinned.plan = plan
    trainer = Pinned(mask_rcnn.build_config(plan))
    with torch.jit.optimized_execution(False):  # as on our CPUs; RetinaNet's loss is TorchScript
        trainer.train()
    for number, (our, their) in enumerate(zip(ours, trainer.seen, strict=True)):
        losses = {name: value for name, value in our.losses.items() if name != "total_loss"}
        assert len(losses) >= 2 and losses == {name: their[name] for name in losses}, f"iteration {number}"
        assert our.learning_rate == their["lr"]
    (file,) = Path(plan.checkpoint_dir).glob("iter_0000010/state*")
    state = torch.load(file, weights_only=True)["model"]
    different = [name for name, value in trainer.model.state_dict().items() if not state[name].equal(value)]
    assert len(ours) == 10 and not different


@pytest.mark.train
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_fast_recipe_honours_the_same_settings(tmp_path: Path, settings: str) -> None:
    """Its first losses are those of `plain` but for rounding, and it goes on."""
    found = []
    for name, recipe in (("plain", PLAIN), ("fast", dataclasses.replace(FAST, mapper="exact", precision="fp32"))):
        plan = prepared(tmp_path / name, SETTINGS[settings], recipe, iterations=4)
        found.append([event.losses for event in train(plan) if isinstance(event, StepsDone)])
    plain, fast = found
    assert len(plain) == len(fast) == 4
    assert fast[0] == pytest.approx(plain[0], rel=1e-3, abs=1e-4)


@pytest.mark.train
def test_a_schedule_that_has_no_rate_after_the_last_iteration_trains_to_its_end(tmp_path: Path) -> None:
    """detectron2's DefaultTrainer ends in an IndexError there, before its last checkpoint and evaluation."""
    changes = {"SOLVER.LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR", "SOLVER.NUM_DECAYS": 1, "SOLVER.GAMMA": 0.5}
    plan = prepared(tmp_path, changes, PLAIN)
    events = train(plan)
    rates = [event.learning_rate for event in events if isinstance(event, StepsDone)]
    base = plan.solver.base_lr
    assert rates[2:] == [base] * 3 + [base / 2] * 5
    assert last(events, LoopFinished).reason == "max_iter"
