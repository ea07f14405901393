"""What detectron2 must know of a data set's keypoints: their names, which change places in a mirrored image, sigmas."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import orjson
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_FLIP_MAP,
    COCO_PERSON_KEYPOINT_NAMES,
    KEYPOINT_CONNECTION_RULES,
)

from trainers.contract.annotations import read_annotations
from trainers.contract.plan import DatasetPlan
from trainers.contract.problems import ConfigurationError

LINE_COLOR = (102, 204, 255)
"""Of the lines between keypoints, red, green and blue, where the data give none."""


def set_keypoint_metadata(cfg: CfgNode, dataset: DatasetPlan) -> None:
    """Sets `keypoint_names`, `keypoint_flip_map` and `keypoint_connection_rules` of a registered data set.

    They come from the categories' `keypoints` and `skeleton` in the annotation file, or are those of COCO's persons
    where it names none and has 17. Which keypoints change places in a mirrored image is read off their names.

    Raises:
        ConfigurationError: The data have no keypoints, not as many as the model, or unknown left and right ones.
        AnnotationFileError: The annotations cannot be read.
    """
    names, skeleton = _of_categories(dataset)
    wanted = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if len(names) != wanted:
        key = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
        what = f"{key} is {wanted}, the data have {len(names)} keypoints: {dataset.annotations}"
        raise ConfigurationError(what, "num_keypoints", "model.overrides", f"Set model.overrides.{key}={len(names)}")
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
    if len(sigmas or COCO_PERSON_KEYPOINT_NAMES) != len(names):
        key = "TEST.KEYPOINT_OKS_SIGMAS"
        has = f"{len(sigmas)} values" if sigmas else "COCO's 17 values, as none are given"
        hint = f"Set model.overrides.{key} to one value for each, such as [{', '.join(['0.05'] * len(names))}]"
        what = f"{key} has {has}, the data have {len(names)} keypoints; how far off each may be decides the AP"
        raise ConfigurationError(what, "keypoint_sigmas", "model.overrides", hint)
    is_flipped = cfg.INPUT.RANDOM_FLIP == "horizontal"
    metadata = MetadataCatalog.get(dataset.name)
    metadata.keypoint_names = names
    metadata.keypoint_flip_map = _flip_map(names, dataset) if is_flipped else []
    metadata.keypoint_connection_rules = skeleton


def _of_categories(dataset: DatasetPlan) -> tuple[list[str], list[tuple[str, str, tuple[int, int, int]]]]:
    """Names of a data set's keypoints, and the lines between them."""
    document = read_annotations(Path(dataset.annotations).read_bytes(), orjson.loads).document
    place, found = dataset.annotations, {}
    for category in document["categories"]:
        if names := category.get("keypoints"):
            found[tuple(map(str, names))] = category
    if len(found) > 1:
        lists = "; ".join(", ".join(names[:3]) + f", … ({len(names)})" for names in found)
        what = f"the categories have different keypoints, and a model has one list of them for all: {lists}"
        raise ConfigurationError(what, "keypoint_names", place, "Train a model for each")
    if not found:
        number = max((len(each.get("keypoints") or ()) // 3 for each in document["annotations"]), default=0)
        if not number:
            hint = "Take data with keypoints (COCO's are in person_keypoints_….json), or a box or mask model"
            raise ConfigurationError("the annotations hold no keypoints", "keypoints_missing", place, hint)
        if number != len(COCO_PERSON_KEYPOINT_NAMES):
            return [f"keypoint_{index}" for index in range(1, number + 1)], []
        return list(COCO_PERSON_KEYPOINT_NAMES), list(KEYPOINT_CONNECTION_RULES)
    ((names, category),) = found.items()
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        what = f"the keypoint {twice!r} is listed twice"
        raise ConfigurationError(what, "keypoint_names", place, "Give every keypoint a name of its own")
    return list(names), _lines(names, category.get("skeleton"))


def _lines(names: tuple[str, ...], skeleton: Any) -> list[tuple[str, str, tuple[int, int, int]]]:
    """COCO's pairs of numbers from 1; pairs that lead nowhere are left out, as they are only drawn."""
    pairs = skeleton if isinstance(skeleton, list) else []
    inside = range(1, len(names) + 1)
    ends = [pair for pair in pairs if isinstance(pair, list) and len(pair) == 2 and all(end in inside for end in pair)]
    return [(names[first - 1], names[second - 1], LINE_COLOR) for first, second in ends]


def _flip_map(names: list[str], dataset: DatasetPlan) -> list[tuple[str, str]]:
    """Pairs of keypoints that change places in a mirrored image, by the left and right in their names."""
    if names == list(COCO_PERSON_KEYPOINT_NAMES):
        return list(COCO_PERSON_KEYPOINT_FLIP_MAP)
    off = "or set model.overrides.INPUT.RANDOM_FLIP=none"
    if all(re.fullmatch(r"keypoint_\d+", name) for name in names):
        what = "the keypoints have no names, so that it is not known which change places in a mirrored image"
        hint = f"Name them in the categories' `keypoints` (left_eye, right_eye, …), {off}"
        raise ConfigurationError(what, "keypoint_flip", dataset.annotations, hint)
    by_name = {name.lower(): name for name in names}
    pairs = []
    for name in names:
        other = mirrored(name)
        if other == name.lower():
            continue
        if other not in by_name:
            what = f"the keypoint {name!r} has no counterpart {other!r} to change places with in a mirrored image"
            hint = f"Name both sides alike in the categories' `keypoints`, {off}"
            raise ConfigurationError(what, "keypoint_flip", dataset.annotations, hint)
        if name < by_name[other]:
            pairs.append((name, by_name[other]))
    return pairs


def mirrored(name: str) -> str:
    """A keypoint's name in lower case with left and right exchanged (`left_eye`, `L_Eye`, `LEye`, `eye-r`)."""
    sides = {"left": "right", "right": "left", "l": "r", "r": "l"}
    # A single letter counts as a word of its own: between marks, or before another capital.
    spaced = re.sub(r"^([LR])(?=[A-Z][a-z])", r"\1\0", name).lower()
    swapped = re.sub(r"left|right|(?<![a-z])[lr](?![a-z])", lambda match: sides[match[0]], spaced)
    return swapped.replace("\0", "")
