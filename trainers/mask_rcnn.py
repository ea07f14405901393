"""From a trial's plan to detectron2's config, model, optimizer and schedule: any detector of the model zoo.

The plan's figures are final: nothing here scales with the world size. detectron2 would, a second time, through
`SOLVER.REFERENCE_WORLD_SIZE`.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainers.contract.plan import ADDED_CONFIG_KEYS, DatasetPlan, TrialPlan
from trainers.contract.problems import ConfigurationError
from trainers.dataset_cache import load_records
from trainers.keypoints import set_keypoint_metadata
from trainers.recipes import Recipe
from trainers.speedups.apply import resolve_precision, tune_model
from trainers.speedups.determinism import require_deterministic
from trainers.speedups.sgd import build_tuned_optimizer
from trainers.weights import load_start_weights


class ModelFile(CfgNode):
    """A YAML file with its bases, of which only those of detectron2's package may compute values by code."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Reads a file; detectron2 calls it for each base. Raises yaml.YAMLError for code elsewhere."""
        allow_unsafe = Path(filename).resolve().is_relative_to(Path(model_zoo.__file__).resolve().parent)
        values: dict[str, Any] = super().load_yaml_with_base(filename, allow_unsafe)
        return values


def build_config(plan: TrialPlan) -> CfgNode:
    """The resolved detectron2 config of a trial, frozen.

    Raises:
        ConfigurationError: A key or a value is not one of detectron2's.
    """
    cfg = get_cfg()
    for key, value in ADDED_CONFIG_KEYS.items():
        section, _, name = key.rpartition(".")
        cfg[section][name] = value
    try:
        is_path = Path(plan.config_file).is_absolute()
        file = plan.config_file if is_path else model_zoo.get_config_file(plan.config_file)
        cfg.merge_from_other_cfg(CfgNode(ModelFile.load_yaml_with_base(file)))
        cfg.merge_from_list([part for item in plan.overrides.items() for part in item])
    except (KeyError, ValueError, AssertionError, RuntimeError, yaml.YAMLError) as error:
        raise ConfigurationError(str(error), key="model.config or model.overrides") from error
    if plan.weights is not None:
        cfg.MODEL.WEIGHTS = plan.weights
    if plan.num_classes is not None:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = plan.num_classes
        cfg.MODEL.RETINANET.NUM_CLASSES = plan.num_classes
    solver = plan.solver
    cfg.MODEL.DEVICE = plan.device
    cfg.DATASETS.TRAIN = (plan.train.name,)
    cfg.DATASETS.TEST = (plan.val.name,)
    cfg.DATALOADER.NUM_WORKERS = plan.loader_workers
    cfg.SOLVER.IMS_PER_BATCH = solver.global_batch_size
    cfg.SOLVER.BASE_LR = solver.base_lr
    cfg.SOLVER.MAX_ITER = solver.max_iter
    cfg.SOLVER.STEPS = solver.steps
    cfg.SOLVER.WARMUP_ITERS = solver.warmup_iters
    cfg.SOLVER.CHECKPOINT_PERIOD = solver.checkpoint_period
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    cfg.SOLVER.AMP.ENABLED = resolve_precision(plan.recipe.precision, torch.device(plan.device)) == "amp"
    cfg.TEST.EVAL_PERIOD = solver.eval_period
    cfg.SEED = plan.seed
    cfg.OUTPUT_DIR = plan.trial_dir
    cfg.freeze()
    check_settings(cfg)
    return cfg


def check_settings(cfg: CfgNode) -> None:
    """Refuses what detectron2 would refuse only once it trains or evaluates.

    Raises:
        ConfigurationError: Names the key.
    """
    if cfg.TEST.AUG.ENABLED and (cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN" or cfg.MODEL.KEYPOINT_ON):
        what = "detectron2 has test-time augmentation for R-CNN models without keypoints only"
        raise ConfigurationError(
            what, key="TEST.AUG.ENABLED", hint="Set TEST.AUG.ENABLED: false, or take another model"
        )
    if cfg.INPUT.CROP.ENABLED and cfg.MODEL.MASK_ON and not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        what = "detectron2 cannot crop images without objects for a model with masks"
        hint = "Set DATALOADER.FILTER_EMPTY_ANNOTATIONS: true, or INPUT.CROP.ENABLED: false"
        raise ConfigurationError(what, key="INPUT.CROP.ENABLED", hint=hint)
    with refused_by_detectron2("SOLVER"):
        build_lr_scheduler(cfg, build_optimizer(cfg, nn.Linear(1, 1)))
    with refused_by_detectron2("INPUT"):
        for is_train in (True, False):
            _augment_once(cfg, is_train)


def _augment_once(cfg: CfgNode, is_train: bool) -> None:
    """Augments an empty image and a polygon; raises what detectron2 raises, and ValueError if no pixel is left."""
    without_keypoints = cfg.clone()
    without_keypoints.defrost()
    without_keypoints.MODEL.KEYPOINT_ON = False  # whose names come with the data
    augmentations = DatasetMapper.from_config(without_keypoints, is_train)["augmentations"]
    sample = AugInput(np.zeros((480, 640, 3), np.uint8))
    transforms = AugmentationList(augmentations)(sample)
    if 0 in sample.image.shape:
        raise ValueError(f"{augmentations} leaves nothing of an image of 480 x 640 pixels")
    if cfg.MODEL.MASK_ON:
        transforms.apply_polygons([np.array([[0.0, 0.0], [640.0, 0.0], [640.0, 480.0]])])  # cropping needs a package


@contextmanager
def refused_by_detectron2(key: str) -> Iterator[None]:
    """Turns what detectron2 raises for settings of a section into a ConfigurationError."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        reason = str(error)
        if isinstance(error, AssertionError):  # its text may be a mere value
            reason = f"{traceback.extract_tb(error.__traceback__)[-1].line} {reason}"
        raise ConfigurationError(f"detectron2 refuses these settings: {reason.strip()}", key=key) from error


def register(cfg: CfgNode, dataset: DatasetPlan) -> None:
    """Makes a data set known to detectron2 under its name, in place of one of that name.

    Raises:
        ConfigurationError: Its keypoints are not those of a keypoint model.
    """
    if dataset.name in DatasetCatalog:
        DatasetCatalog.remove(dataset.name)
        MetadataCatalog.remove(dataset.name)
    DatasetCatalog.register(dataset.name, functools.partial(load_records, dataset))
    MetadataCatalog.get(dataset.name).set(
        json_file=dataset.annotations, image_root=dataset.images, evaluator_type="coco"
    )
    if cfg.MODEL.KEYPOINT_ON:
        set_keypoint_metadata(cfg, dataset)


def build_detector(cfg: CfgNode, plan: TrialPlan, *, trains: bool = True) -> nn.Module:
    """The model on its device with its start weights, in training mode.

    Args:
        cfg: Its config.
        plan: The trial.
        trains: Whether it will be trained; where not, its batch norm is in evaluation mode whenever it is used.

    Raises:
        ConfigurationError: detectron2 cannot build it, its start weights cannot be read or do not fit, or the recipe
            asks for a deterministic training of what has none.
    """
    with refused_by_detectron2("MODEL"):
        model: nn.Module = build_model(cfg)
    if trains and plan.device == "cpu" and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        hint = "Write naiveSyncBN, which does the same on CPUs, or BN, which keeps workers apart"
        keys = [
            f"MODEL.{name}.NORM"
            for name, part in cfg.MODEL.items()
            if isinstance(part, CfgNode) and part.get("NORM") == "SyncBN"
        ]
        raise ConfigurationError("SyncBN needs GPUs", key=", ".join(keys), hint=hint)
    if cfg.MODEL.WEIGHTS:
        load_start_weights(model, cfg.MODEL.WEIGHTS, plan.weights_sha256)
    if plan.recipe.deterministic and plan.device == "cuda":
        require_deterministic(model, cfg, plan.recipe)
    tune_model(model, plan.recipe, torch.device(plan.device))
    return model.train()


def distribute(
    model: nn.Module, device: torch.device, world_size: int, gradient_views: bool = False, graphs: bool = False
) -> nn.Module:
    """The model in DistributedDataParallel, on GPU or CPU; as it is for one worker, and for CUDA graphs.

    detectron2's `create_ddp_model` passes `device_ids`, which torch refuses for a CPU model. Under graphs
    `GradientBuckets` averages the gradients; here all workers get rank 0's weights and buffers, as from torch's class.
    """
    if world_size > 1 and graphs:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
    if world_size == 1 or graphs:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=gradient_views
    )


def build_solver(cfg: CfgNode, model: nn.Module, recipe: Recipe) -> tuple[torch.optim.Optimizer, Any]:
    """detectron2's optimizer, as the recipe has it, and its learning rate schedule."""
    optimizer = build_tuned_optimizer(cfg, model, recipe)
    return optimizer, build_lr_scheduler(cfg, optimizer)
