"""Checks an experiment's model without importing detectron2: classes, masks, keypoints, sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.experiment.config_keys import value_problem
from orchestrator.experiment.detectron_config import default_values, model_value
from orchestrator.findings import Finding, FindingList
from trainers.contract.targets import VALIDATION_LOSS, class_names, known_metrics

if TYPE_CHECKING:
    from orchestrator.data.entries import SplitSummary
    from orchestrator.experiment.spec import Experiment

BACKBONE_PARAMETERS = {18: 11.2e6, 34: 21.3e6, 50: 23.5e6, 101: 42.5e6, 152: 58.1e6}
"""Parameters of a ResNet of that depth at its usual width, without its classifier."""

GROUPED_PARAMETERS = 86.7e6
"""Parameters of the model zoo's X-101-32x8d, taken for every backbone with grouped convolutions."""

MAX_CLASSES = 20
"""Most classes that a hint lists."""


def check_data_against_model(experiment: Experiment, train: SplitSummary, val: SplitSummary) -> list[Finding]:
    """Checks that a data set has the masks, keypoints and classes that the experiment's model is built for."""
    findings = FindingList()
    with_masks = bool(model_value(experiment, "MODEL.MASK_ON"))
    if with_masks:
        _check_masks(experiment, train, val, findings)
    elif experiment.protocol.target_mask_ap is not None:
        hint = "Take a target of boxes alone, or a model with masks (COCO-InstanceSegmentation/…)"
        what = "a model without masks (MODEL.MASK_ON: false) never reaches it"
        findings.error("target_without_masks", "protocol.target_mask_ap", "", what, hint)
    if model_value(experiment, "MODEL.KEYPOINT_ON"):
        for summary in (train, val):
            _check_keypoints(experiment, summary, findings)
    _check_metric(experiment, val, findings)
    if experiment.data.generated is None and train.categories:
        key = classes_key(experiment)
        asked = _value(experiment, key)
        if asked != len(train.categories):
            what = f"{key} is {asked}, the data has {len(train.categories)} categories"
            hint = f"Set model.overrides.{key}={len(train.categories)}"
            findings.error("num_classes", train.annotations, "categories", what, hint)
    return findings.to_list()


def _check_metric(experiment: Experiment, val: SplitSummary, findings: FindingList) -> None:
    """Checks that the model is scored for the metric, and that the validation set has its class."""
    metric = experiment.protocol.metric
    is_on = {"box": True, "mask": "MODEL.MASK_ON", "keypoint": "MODEL.KEYPOINT_ON"}
    parts = [part for part, key in is_on.items() if key is True or model_value(experiment, str(key))]
    scored = {key: name for key, name in class_names(val.categories).items() if key in val.objects_of_category}
    if metric == VALIDATION_LOSS or metric in known_metrics(parts, scored.values()):
        return
    figure, _, name = metric.partition("/")
    part, hint = figure.partition("_")[0], "Take one of: " + ", ".join(known_metrics(parts))
    if part not in parts:
        what = f"{metric}: this model is not scored for it ({is_on[part]} is false)"
    else:
        what = f"{metric}: {val.annotations} has no object of a class {name!r}"
        more = " …" if len(scored) > MAX_CLASSES else ""
        shown = list(scored.values())[:MAX_CLASSES]
        hint = "Take one of: " + ", ".join(f"{figure}/{each}" for each in shown) + more
    findings.error("metric_unknown", "protocol.metric", "", what, hint)


def _check_masks(experiment: Experiment, train: SplitSummary, val: SplitSummary, findings: FindingList) -> None:
    for summary in (train, val):
        if summary.num_without_mask:
            what = f"{summary.num_without_mask:,} objects have no mask, and the model learns masks"
            hint = "Give them masks, or take a box model (COCO-Detection/…) or MODEL.MASK_ON: false"
            place = f"annotation {summary.first_without_mask}"
            findings.error("mask_missing", summary.annotations, place, what, hint)
    # A validation loss reads the validation set as training reads the other one.
    for summary in (train, *([val] if experiment.protocol.validation_loss else [])):
        if summary.num_rle and _value(experiment, "INPUT.MASK_FORMAT") == "polygon":
            what = f"{summary.num_rle:,} objects have run-length encoded masks; INPUT.MASK_FORMAT is polygon"
            hint = "Set model.overrides.INPUT.MASK_FORMAT=bitmask"
            findings.error(
                "rle_with_polygon_format", summary.annotations, f"annotation {summary.first_rle}", what, hint
            )


def _check_keypoints(experiment: Experiment, summary: SplitSummary, findings: FindingList) -> None:
    """Every object needs as many keypoints as the model has; those that are not labelled have visibility 0."""
    key = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
    wanted, numbers, place = _value(experiment, key), summary.objects_of_points, (summary.annotations, "annotations")
    if not any(numbers):
        hint = "Take data with keypoints (COCO's are in person_keypoints_….json), or a box or mask model"
        findings.error("keypoints_missing", *place, "no object has keypoints, and the model learns them", hint)
        return
    if summary.num_broken_keypoints:
        what = f"{summary.num_broken_keypoints:,} objects have keypoints that are not triples of x, y and visibility"
        findings.error("keypoints_entry", *place, what, "Write x, y and visibility (0 to 2) of each")
    if none := numbers.get(0):
        what = f"{none:,} objects have no keypoints, which detectron2 cannot train on among others that have"
        hint = f"Write {3 * wanted} zeros, which stand for keypoints that are not labelled, or take the objects out"
        findings.error("keypoints_missing", *place, what, hint)
    others = {number: count for number, count in numbers.items() if number not in (0, wanted)}
    if others:
        counts = ", ".join(f"{count:,} objects have {number} keypoints" for number, count in others.items())
        fits = len(numbers.keys() - {0}) == 1
        hint = f"Set model.overrides.{key}={next(iter(others))}" if fits else "Give all objects the same keypoints"
        findings.error("num_keypoints", *place, f"{counts}; {key} is {wanted}", hint)


def classes_key(experiment: Experiment) -> str:
    """The key that holds the number of classes of the experiment's kind of model."""
    is_retinanet = model_value(experiment, "MODEL.META_ARCHITECTURE") == "RetinaNet"
    return "MODEL.RETINANET.NUM_CLASSES" if is_retinanet else "MODEL.ROI_HEADS.NUM_CLASSES"


def estimate_checkpoint_bytes(experiment: Experiment) -> float:
    """Estimates the size of one checkpoint: fp32 weights, momentum and the weights' average, if any, 4 bytes each.

    Counts the parts of a Mask R-CNN with FPN: backbone, FPN and RPN, box head, mask head. For detectron2's
    R50-FPN that gives 44.3 million parameters; it has 44.4.
    """

    def value(key: str) -> float:
        return float(_value(experiment, key) or 0)

    depth, channels = value("MODEL.RESNETS.DEPTH"), value("MODEL.FPN.OUT_CHANNELS")
    hidden, width = value("MODEL.ROI_BOX_HEAD.FC_DIM"), value("MODEL.RESNETS.RES2_OUT_CHANNELS")
    widening = width / (256 if depth >= 50 else 64)
    grouped = value("MODEL.RESNETS.NUM_GROUPS") > 1
    backbone = GROUPED_PARAMETERS if grouped else widening**2 * BACKBONE_PARAMETERS.get(int(depth), GROUPED_PARAMETERS)
    pyramid = 15 * width * channels + 45 * channels**2
    box = 49 * channels * hidden + hidden**2 + hidden * (5 * value(classes_key(experiment)) + 1)
    mask = (9 * value("MODEL.ROI_MASK_HEAD.NUM_CONV") + 4) * value("MODEL.ROI_MASK_HEAD.CONV_DIM") ** 2
    each = 12 if experiment.protocol.ema else 8
    return each * (backbone + pyramid + box + mask)


def estimate_image_bytes(experiment: Experiment) -> float:
    """Estimates the bytes of one training image as the loader hands it over: three channels at the largest size."""
    shortest = _value(experiment, "INPUT.MIN_SIZE_TRAIN")
    short = max(shortest) if isinstance(shortest, list | tuple) else shortest
    return float(3 * short * max(short, _value(experiment, "INPUT.MAX_SIZE_TRAIN")))


def _value(experiment: Experiment, key: str) -> Any:
    """A key's value, or detectron2's default where it cannot be used, which `check_settings` reports."""
    value = model_value(experiment, key)
    return value if value_problem(key, value) is None else default_values()[key]
