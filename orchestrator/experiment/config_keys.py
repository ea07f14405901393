"""Which of detectron2's config keys are honoured, which one of our fields decides instead, and which are refused.

Every key belongs to exactly one of the three tables (a test walks all keys of the installed detectron2), so that no
key is taken and then ignored. A name that ends in "." stands for all keys under it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.experiment.detectron_config import default_values, given_setting
from orchestrator.experiment.spec import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from orchestrator.experiment.spec import Experiment

KeyClass = Literal["honoured", "mapped", "refused"]

HONOURED = (
    *("VERSION", "CUDNN_BENCHMARK"),
    *("MODEL.WEIGHTS", "MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.META_ARCHITECTURE", "MODEL.LOAD_PROPOSALS"),
    *("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.BACKBONE.", "MODEL.RESNETS.", "MODEL.FPN.", "MODEL.RPN."),
    *("MODEL.PROPOSAL_GENERATOR.", "MODEL.ANCHOR_GENERATOR.", "MODEL.ROI_HEADS.", "MODEL.ROI_BOX_HEAD."),
    *("MODEL.ROI_BOX_CASCADE_HEAD.", "MODEL.ROI_MASK_HEAD.", "MODEL.ROI_KEYPOINT_HEAD.", "MODEL.RETINANET."),
    *("INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST"),
    *("INPUT.MAX_SIZE_TEST", "INPUT.RANDOM_FLIP", "INPUT.FORMAT", "INPUT.MASK_FORMAT"),
    *("INPUT.CROP.ENABLED", "INPUT.CROP.TYPE", "INPUT.CROP.SIZE"),
    *("DATALOADER.NUM_WORKERS", "DATALOADER.ASPECT_RATIO_GROUPING", "DATALOADER.FILTER_EMPTY_ANNOTATIONS"),
    *("DATALOADER.SAMPLER_TRAIN", "DATALOADER.REPEAT_THRESHOLD", "DATALOADER.REPEAT_SQRT"),
    "DATALOADER.RANDOM_SUBSET_RATIO",
    *("SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "SOLVER.BASE_LR_END", "SOLVER.MAX_ITER", "SOLVER.STEPS"),
    *("SOLVER.GAMMA", "SOLVER.NUM_DECAYS", "SOLVER.RESCALE_INTERVAL", "SOLVER.LR_SCHEDULER_NAME"),
    *("SOLVER.WARMUP_FACTOR", "SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_METHOD", "SOLVER.MOMENTUM", "SOLVER.NESTEROV"),
    *("SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS", "SOLVER.BIAS_LR_FACTOR"),
    *("SOLVER.CHECKPOINT_PERIOD", "SOLVER.REFERENCE_WORLD_SIZE"),
    *("SOLVER.CLIP_GRADIENTS.ENABLED", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE"),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
    *("TEST.DETECTIONS_PER_IMAGE", "TEST.KEYPOINT_OKS_SIGMAS", "TEST.AUG.ENABLED", "TEST.AUG.MIN_SIZES"),
    *("TEST.AUG.MAX_SIZE", "TEST.AUG.FLIP", "TEST.PRECISE_BN.ENABLED", "TEST.PRECISE_BN.NUM_ITER"),
)
"""Keys whose value is used as detectron2 uses it."""

MAPPED: Mapping[str, str] = {
    "MODEL.DEVICE": "resources.device",
    "DATASETS.TRAIN": "data",
    "DATASETS.TEST": "data",
    "SOLVER.AMP.ENABLED": "trials.switches.precision",
    "TEST.EVAL_PERIOD": "protocol.eval_period_iterations",
    "TEST.EXPECTED_RESULTS": "protocol.target_box_ap",
    "SEED": "trials.seeds",
    "OUTPUT_DIR": "storage.path",
}
"""Keys that have no effect here, and the field of the experiment file that decides instead."""

REPLACED: Mapping[str, tuple[str, ...]] = {
    "MODEL.WEIGHTS": ("model.weights",),
    "MODEL.ROI_HEADS.NUM_CLASSES": ("data.generated.num_classes",),
    "MODEL.RETINANET.NUM_CLASSES": ("data.generated.num_classes",),
    "DATALOADER.NUM_WORKERS": ("resources.loader_workers",),
    "SOLVER.CHECKPOINT_PERIOD": ("storage.checkpoint_period_iterations", "storage.checkpoint_period"),
    "SOLVER.REFERENCE_WORLD_SIZE": ("trials.reference_world_size",),
}
"""Honoured keys, each with the fields of the experiment file of which one replaces it where it is given."""

REFUSED: Mapping[str, str] = {
    "DATASETS.PROPOSAL_FILES_TRAIN": "precomputed proposals are not read",
    "DATASETS.PROPOSAL_FILES_TEST": "precomputed proposals are not read",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": "precomputed proposals are not read",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": "precomputed proposals are not read",
    "MODEL.ANCHOR_GENERATOR.ANGLES": "rotated boxes are not supported",
    "MODEL.SEM_SEG_HEAD.": "semantic and panoptic segmentation are not supported",
    "MODEL.PANOPTIC_FPN.": "semantic and panoptic segmentation are not supported",
    "VIS_PERIOD": "training batches are not drawn; the report and MLflow show the detections of every evaluation",
    "GLOBAL.HACK": "nothing reads it",
}
"""Keys that have no effect here, and why."""


ADDED_ELSEWHERE: Mapping[str, str] = {"MODEL_EMA": "protocol.ema, whose decay is MODEL_EMA.DECAY"}
"""Groups of keys that relatives of detectron2 add (d2go), and the field that does the same here."""

FPN_BACKBONES = ("build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone")
BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "VERSION": (2,),
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN", "RetinaNet"),
    "MODEL.LOAD_PROPOSALS": (False,),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN",),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "MODEL.ROI_HEADS.NAME": ("Res5ROIHeads", "StandardROIHeads", "CascadeROIHeads"),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": (False,),
    "MODEL.BACKBONE.NAME": ("build_resnet_backbone", *FPN_BACKBONES),
    "MODEL.RPN.HEAD_NAME": ("StandardRPNHead",),
    "MODEL.ROI_BOX_HEAD.NAME": ("", "FastRCNNConvFCHead"),
    "MODEL.ROI_MASK_HEAD.NAME": ("MaskRCNNConvUpsampleHead",),
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ("KRCNNConvDeconvUpsampleHead",),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.FORMAT": ("BGR", "RGB", "L", "HSV", "LAB", "YCbCr", "YUV-BT.601", "CMYK", "RGBA"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": BOX_LOSSES,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": BOX_LOSSES,
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
}
"""Keys of which only some values can be used. What users register in code of their own is not known to workers."""

PANOPTIC = "is not supported: boxes, masks and keypoints are trained and scored, no semantic or panoptic segmentation"
PROPOSALS = "is not supported: precomputed proposals are not read"
WEIGHTED = "is not supported: it weighs data sets, and an experiment has one"
ROTATED = "is not supported: rotated boxes are neither read nor scored"

REASONS: Mapping[tuple[str, Any], str] = {
    ("VERSION", 0): "is of an old detectron2",
    ("VERSION", 1): "is of an old detectron2",
    ("MODEL.META_ARCHITECTURE", "PanopticFPN"): PANOPTIC,
    ("MODEL.META_ARCHITECTURE", "SemanticSegmentor"): PANOPTIC,
    ("MODEL.META_ARCHITECTURE", "ProposalNetwork"): "is not supported: proposals alone are no detections to be scored",
    ("MODEL.LOAD_PROPOSALS", True): PROPOSALS,
    ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"): PROPOSALS,
    ("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"): ROTATED,
    ("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"): ROTATED,
    ("MODEL.ROI_HEADS.NAME", "RROIHeads"): ROTATED,
    ("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True): "is not supported: the data has no class frequencies, as LVIS has",
    ("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler"): WEIGHTED,
    ("DATALOADER.SAMPLER_TRAIN", "WeightedCategoryTrainingSampler"): WEIGHTED,
}
"""Why a value that detectron2 knows is none of the CHOICES of its key."""

NOT_KNOWN = "is not one of detectron2's"

MAX_NUMBER = 10**9
ABOVE_ZERO = (1e-9, MAX_NUMBER)

LIMITS: Mapping[str, tuple[float, float]] = {
    "SOLVER.IMS_PER_BATCH": (1, 10**6),
    "SOLVER.MAX_ITER": (1, MAX_NUMBER),
    "SOLVER.STEPS": (1, MAX_NUMBER),
    "SOLVER.REFERENCE_WORLD_SIZE": (0, 10**6),
    "SOLVER.NUM_DECAYS": (1, MAX_NUMBER),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": (0.1, math.inf),
    "DATALOADER.NUM_WORKERS": (0, 10**4),
    "DATALOADER.RANDOM_SUBSET_RATIO": (0, 1),
    "INPUT.MIN_SIZE_TRAIN": (1, 10**5),
    "INPUT.MAX_SIZE_TRAIN": (1, 10**6),
    "INPUT.MIN_SIZE_TEST": (0, 10**5),
    "INPUT.MAX_SIZE_TEST": (1, 10**6),
    "MODEL.BACKBONE.FREEZE_AT": (-1, MAX_NUMBER),
    "MODEL.PIXEL_MEAN": (-MAX_NUMBER, MAX_NUMBER),
    "MODEL.PIXEL_STD": ABOVE_ZERO,
    "MODEL.RPN.BBOX_REG_WEIGHTS": ABOVE_ZERO,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": ABOVE_ZERO,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": ABOVE_ZERO,
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": ABOVE_ZERO,
    "MODEL.ROI_HEADS.NUM_CLASSES": (1, 10**6),
    "MODEL.RETINANET.NUM_CLASSES": (1, 10**6),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": (1, MAX_NUMBER),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": (1, MAX_NUMBER),
    "TEST.DETECTIONS_PER_IMAGE": (1, 10**6),
    "TEST.AUG.MIN_SIZES": (1, 10**5),
    "TEST.AUG.MAX_SIZE": (1, 10**6),
    "TEST.PRECISE_BN.NUM_ITER": (1, MAX_NUMBER),
}
"""Smallest and largest value of a number, or of each number of a list, where `limits` does not say it."""

NONEMPTY = ("INPUT.MIN_SIZE_TRAIN", "TEST.AUG.MIN_SIZES")
"""Lists that must hold something."""

NULLABLE = ("SOLVER.WEIGHT_DECAY_BIAS", "SOLVER.WEIGHT_DECAY_NORM")
"""Keys to which null means: as SOLVER.WEIGHT_DECAY."""

CONDITIONS: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "MODEL.RETINANET.": ("MODEL.META_ARCHITECTURE", ("RetinaNet",)),
    "MODEL.RPN.": ("MODEL.META_ARCHITECTURE", ("GeneralizedRCNN",)),
    "MODEL.ROI_": ("MODEL.META_ARCHITECTURE", ("GeneralizedRCNN",)),
    "MODEL.ROI_MASK_HEAD.": ("MODEL.MASK_ON", (True,)),
    "MODEL.ROI_KEYPOINT_HEAD.": ("MODEL.KEYPOINT_ON", (True,)),
    "MODEL.ROI_BOX_CASCADE_HEAD.": ("MODEL.ROI_HEADS.NAME", ("CascadeROIHeads",)),
    "MODEL.FPN.": ("MODEL.BACKBONE.NAME", FPN_BACKBONES),
    "INPUT.MASK_FORMAT": ("MODEL.MASK_ON", (True,)),
    "INPUT.CROP.": ("INPUT.CROP.ENABLED", (True,)),
    "DATALOADER.REPEAT_": ("DATALOADER.SAMPLER_TRAIN", ("RepeatFactorTrainingSampler",)),
    "DATALOADER.RANDOM_SUBSET_RATIO": ("DATALOADER.SAMPLER_TRAIN", ("RandomSubsetTrainingSampler",)),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ("norm",)),
    "SOLVER.CLIP_GRADIENTS.": ("SOLVER.CLIP_GRADIENTS.ENABLED", (True,)),
    "SOLVER.STEPS": ("SOLVER.LR_SCHEDULER_NAME", ("WarmupMultiStepLR",)),
    "SOLVER.GAMMA": ("SOLVER.LR_SCHEDULER_NAME", ("WarmupMultiStepLR", "WarmupStepWithFixedGammaLR")),
    "SOLVER.BASE_LR_END": ("SOLVER.LR_SCHEDULER_NAME", ("WarmupCosineLR",)),
    "SOLVER.NUM_DECAYS": ("SOLVER.LR_SCHEDULER_NAME", ("WarmupStepWithFixedGammaLR",)),
    "TEST.AUG.": ("TEST.AUG.ENABLED", (True,)),
    "TEST.PRECISE_BN.": ("TEST.PRECISE_BN.ENABLED", (True,)),
    "TEST.KEYPOINT_OKS_SIGMAS": ("MODEL.KEYPOINT_ON", (True,)),
}
"""Keys, by the start of their names, that detectron2 itself uses only where another key has one of certain values."""


def class_of(key: str) -> tuple[KeyClass, str]:
    """The class of a key; the field that decides instead of a mapped one, or the reason why one is refused.

    Raises:
        KeyError: The key is in no table.
    """
    if key in MAPPED:
        return "mapped", MAPPED[key]
    if (name := _name_in(REFUSED, key)) is not None:
        return "refused", REFUSED[name]
    if _name_in(HONOURED, key) is not None:
        return "honoured", ""
    raise KeyError(key)


def _name_in(table: Iterable[str], key: str) -> str | None:
    return next((name for name in table if name == key or (name.endswith(".") and key.startswith(name))), None)


def usable_value(experiment: Experiment, key: str) -> Any:
    """A key's value for an experiment (`model_value`); SpecError where `value_problem` finds one, with its place."""
    setting = given_setting(experiment, key)
    if setting is None:
        return default_values()[key]
    if problem := value_problem(key, setting.value):
        raise SpecError(f"{setting.place}: {problem}. {value_hint(key, setting.value)}.")
    return setting.value


def value_problem(key: str, value: Any) -> str | None:
    """What is wrong with a value for one of detectron2's keys; None where it can be used.

    The types are those that detectron2 takes: the default's own, a list for a tuple, no integer for a float. Lists of
    numbers hold numbers, numbers are within `limits`, names are those of CHOICES.
    """
    default = default_values()[key]
    if key in NULLABLE and value is None:
        return None
    if not _has_type_of(value, default):
        return f"its value {value!r} is not of the type of detectron2's default, {default!r}"
    low, high = limits(key)
    if not all(low <= number <= high for number in numbers_of(value)):  # NaN is in no range
        upper = "" if high == math.inf else f" and at most {high:,}"
        return f"its value {value!r} is out of range: at least {low:,}{upper}"
    if key in NONEMPTY and not value:
        return f"its value {value!r} is empty"
    if key in CHOICES and value not in CHOICES[key]:
        return f"{value} {REASONS.get((key, value), NOT_KNOWN)}"
    return None


def limits(key: str) -> tuple[float, float]:
    """Smallest and largest value of a key's numbers: none is negative where detectron2's default is not."""
    lowest = -MAX_NUMBER if any(number < 0 for number in numbers_of(default_values()[key])) else 0
    return LIMITS.get(key, (lowest, MAX_NUMBER))


def numbers_of(value: Any) -> list[float]:
    """The numbers in a value, also those of lists in lists."""
    if isinstance(value, list | tuple):
        return [number for item in value for number in numbers_of(item)]
    return [value] if _is_number(value) else []


def _has_type_of(value: Any, default: Any) -> bool:
    """Whether detectron2 can use a value in place of a default: by yacs's rule, and numbers in place of numbers."""
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        have, need = (all(_is_number(item) for item in items) for items in (value, default))
        return have or not need or not default
    return type(value) is type(default) or (default is None and _is_number(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def value_hint(key: str, value: Any) -> str:
    """How to write a key's value where `value_problem` finds a problem with it; a sentence without its full stop.

    Names the number in the key's type where one is given, else detectron2's default as an example.
    """
    if key in CHOICES:
        return f"Take {' or '.join(map(repr, CHOICES[key]))}"
    default = default_values()[key]
    example: Any = list(default) if isinstance(default, tuple) else default
    if _is_number(value) and abs(value) <= MAX_NUMBER:
        if isinstance(default, float):
            example = float(value)
        elif type(default) is int and value == int(value):
            example = int(value)
        elif isinstance(default, list | tuple) and default and all(map(_is_number, default)):
            example = [value]
    low, high = limits(key)
    if _is_number(example) and not low <= example <= high:
        example = default
    return f"Write a value like {example!r}"
