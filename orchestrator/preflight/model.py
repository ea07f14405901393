"""Checks an experiment's model without importing detectron2: classes and masks, start weights, sizes."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.experiment.config_keys import value_problem
from orchestrator.experiment.detectron_config import default_values, model_value
from orchestrator.files import file_sha256, redact
from orchestrator.findings import Finding, FindingList

if TYPE_CHECKING:
    from orchestrator.data.entries import SplitSummary
    from orchestrator.experiment.spec import Experiment

BACKBONE_PARAMETERS = {18: 11.2e6, 34: 21.3e6, 50: 23.5e6, 101: 42.5e6, 152: 58.1e6}
"""Parameters of a ResNet of that depth at its usual width, without its classifier."""

GROUPED_PARAMETERS = 86.7e6
"""Parameters of the model zoo's X-101-32x8d, taken for every backbone with grouped convolutions."""


def check_data_against_model(experiment: Experiment, train: SplitSummary, val: SplitSummary) -> list[Finding]:
    """Checks that a data set has the masks and classes that the experiment's model is built for."""
    findings = FindingList()
    if model_value(experiment, "MODEL.MASK_ON"):
        for summary in (train, val):
            if summary.num_without_mask:
                what = f"{summary.num_without_mask:,} objects have no mask, and the model learns masks"
                hint = "Give them masks, or take a box model (COCO-Detection/…) or MODEL.MASK_ON: false"
                place = f"annotation {summary.first_without_mask}"
                findings.error("mask_missing", summary.annotations, place, what, hint)
        if train.num_rle and _value(experiment, "INPUT.MASK_FORMAT") == "polygon":
            what = f"{train.num_rle:,} objects have run-length encoded masks; INPUT.MASK_FORMAT is polygon"
            hint = "Set model.overrides.INPUT.MASK_FORMAT=bitmask"
            findings.error("rle_with_polygon_format", train.annotations, f"annotation {train.first_rle}", what, hint)
    if experiment.data.generated is None and train.categories:
        key = classes_key(experiment)
        asked = _value(experiment, key)
        if asked != len(train.categories):
            what = f"{key} is {asked}, the data has {len(train.categories)} categories"
            hint = f"Set model.overrides.{key}={len(train.categories)}"
            findings.error("num_classes", train.annotations, "categories", what, hint)
    return findings.to_list()


def classes_key(experiment: Experiment) -> str:
    """The key that holds the number of classes of the experiment's kind of model."""
    is_retinanet = model_value(experiment, "MODEL.META_ARCHITECTURE") == "RetinaNet"
    return "MODEL.RETINANET.NUM_CLASSES" if is_retinanet else "MODEL.ROI_HEADS.NUM_CLASSES"


def check_weights(experiment: Experiment) -> list[Finding]:
    """Checks start weights given by a path: they exist, are complete, and run no code when they are read."""
    findings, weights, wanted = FindingList(), experiment.model.weights, experiment.model.weights_sha256
    if not weights or weights.startswith("detectron2://"):
        return []
    path = Path(weights).expanduser().absolute()
    if "://" in weights:
        what = "start weights from an address are not fetched"
        hint = "Download the file, give its path, and its SHA-256 as model.weights_sha256"
        findings.error("weights_address", "model.weights", redact(weights), what, hint)
    elif not path.is_file():
        what = "the start weights do not exist"
        findings.error("weights_missing", str(path), "model.weights", what, "Correct the path")
    elif wanted is not None:
        if (found := file_sha256(path)) != wanted:
            what = f"has SHA-256 {found}, not {wanted}"
            hint = "Download it again, or correct model.weights_sha256 if you trust this file"
            findings.error("weights_checksum", str(path), "model.weights", what, hint)
    elif path.suffix != ".pth":
        what = f"reading weights from a {path.suffix or 'nameless'} file would run code in it"
        hint = "Give model.weights_sha256 of a file you trust, or a .pth file, which is read without running anything"
        findings.error("weights_unsafe", str(path), "model.weights", what, hint)
    elif reason := _zip_problem(path):
        hint = "Copy or download it again, or write it with torch.save"
        findings.error("weights_corrupt", str(path), "model.weights", f"the start weights are corrupt: {reason}", hint)
    return findings.to_list()


def _zip_problem(path: Path) -> str:
    """Checks a `.pth` as the zip archive that torch.save writes (since 1.6); returns what is wrong with it, or ""."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return str(error) or type(error).__name__
    if broken:
        return f"the checksum of its part {broken} fails"
    return "" if any(name.endswith("data.pkl") for name in names) else "it was not written by torch.save"


def estimate_checkpoint_bytes(experiment: Experiment) -> float:
    """Estimates the size of one checkpoint: fp32 weights and the optimizer's momentum, 8 bytes a parameter.

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
    return 8 * (backbone + pyramid + box + mask)


def estimate_image_bytes(experiment: Experiment) -> float:
    """Estimates the bytes of one training image as the loader hands it over: three channels at the largest size."""
    shortest = _value(experiment, "INPUT.MIN_SIZE_TRAIN")
    short = max(shortest) if isinstance(shortest, list | tuple) else shortest
    return float(3 * short * max(short, _value(experiment, "INPUT.MAX_SIZE_TRAIN")))


def _value(experiment: Experiment, key: str) -> Any:
    """A key's value, or detectron2's default where it cannot be used, which `check_settings` reports."""
    value = model_value(experiment, key)
    return value if value_problem(key, value) is None else default_values()[key]
