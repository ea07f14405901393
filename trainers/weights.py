"""Loads start weights into a model by name and shape, as detectron2 does, and says what does not fit."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils.file_io import PathManager
from filelock import FileLock
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from trainers.contract.problems import Problem
from trainers.contract.weights import StartWeights
from trainers.weight_files import FIELD, MAX_NAMED, Checkpoint, read_weights, weights_error

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """How start weights fitted a model; names are the model's, those of `unused` the file's."""

    fitting: list[str]
    missing: list[str]
    """They keep their random start. Buffers that a config determines are not counted."""
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Shape in the file and in the model, of weights that are not loaded for it."""
    unused: list[str]


def load_start_weights(model: nn.Module, name: str, sha256: str | None = None) -> Loaded:
    """Loads start weights into a model by name and shape, as detectron2's DetectionCheckpointer does.

    Args:
        model: A model of detectron2, not wrapped for several workers.
        name: `MODEL.WEIGHTS`: a path, or an address, which preflight has fetched on the nodes of then.
        sha256: Hash the file must have; None for not checked.

    Raises:
        ConfigurationError: The file is missing, has another hash, cannot be read, or holds nothing that fits.
    """
    weights = StartWeights.of(name)
    if weights.address and not weights.path.is_file():
        _fetch(weights)
    if not weights.path.is_file():
        raise weights_error("missing", f"no such file: {name}", "Correct the path")
    if wrong := weights.checksum_problem(sha256):
        hint = "Download it again, or correct model.weights_sha256"
        raise weights_error("checksum", f"{weights.path} {wrong}", hint)
    loaded = _load(model, read_weights(weights))
    logger.info("Start weights %s: %d of the model's weights are in it.", name, len(loaded.fitting))
    for problem in fit_problems(loaded):
        logger.warning("%s: %s", name, problem.what)
    return loaded


def _fetch(weights: StartWeights) -> None:
    """Fetches an address on a node that joined after preflight, once for all of its workers."""
    path = weights.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():
                folder = str(path.parent / f".{path.name}.fetched")
                Path(PathManager.get_local_path(weights.address, force=True, cache_dir=folder)).replace(path)
    except (OSError, RuntimeError, ValueError) as error:
        what = f"{weights.name} is not on this node, and cannot be fetched: {error}"
        raise weights_error("download", what, f"Put it at {path} there, or on storage that all nodes share") from error


def _load(model: nn.Module, checkpoint: Checkpoint) -> Loaded:
    ours = model.state_dict()
    state = checkpoint.state
    if checkpoint.matching_heuristics:
        try:
            state = align_and_update_state_dicts(ours, state, c2_conversion=checkpoint.caffe2)
        except (ValueError, KeyError, AssertionError) as error:
            what = f"its names cannot be matched with the model's: {error}"
            raise weights_error("unmatched", what, "Give weights of this kind of model") from error
    if all(name.startswith("module.") for name in state):  # of a model that was wrapped for several workers
        consume_prefix_in_state_dict_if_present(state, "module.")
    shapes = {name: (tuple(state[name].shape), tuple(ours[name].shape)) for name in state if name in ours}
    other_shape = {name: both for name, both in shapes.items() if both[0] != both[1]}
    fitting = [name for name in shapes if name not in other_shape]
    if not fitting:
        raise weights_error("unmatched", *_nothing_fits(list(checkpoint.state), list(ours)))
    for name in other_shape:
        del state[name]
    outcome = model.load_state_dict(state, strict=False)
    determined = ("pixel_mean", "pixel_std", "num_batches_tracked")
    missing = [name for name in outcome.missing_keys if not name.endswith(determined) and name not in other_shape]
    unused = [name for name in outcome.unexpected_keys if "anchor_generator.cell_anchors" not in name]
    return Loaded(fitting, missing, other_shape, unused)


def _nothing_fits(theirs: list[str], ours: list[str]) -> tuple[str, str]:
    """What is wrong with weights of which none fits, and how to get others."""
    what = f"none of its {len(theirs):,} weights fits: none of its names ({theirs[0]}, …) is the model's ({ours[0]}, …)"
    parts = {name.partition(".")[0] for name in theirs}
    if parts & {"neck", "bbox_head", "rpn_head", "roi_head"}:
        return f"{what}: they are mmdetection's", "Give weights of detectron2; there is no converter"
    if any(re.match(r"(backbone\.body\.)?layer1\.0\.", name) for name in theirs):
        hint = "Convert a ResNet with detectron2's tools/convert-torchvision-to-d2.py; other models have no converter"
        return f"{what}: they are torchvision's", hint
    ends = {name.split(".", 1)[-1] for name in theirs}
    if len(parts) == 1 and ends & set(ours):
        hint = "Save them again with the names after it"
        return f"{what}: they all begin with {parts.pop()!r}", hint
    return what, "Give weights of the same kind of model, or weights: '' to start from random ones"


def fit_problems(loaded: Loaded) -> list[Problem]:
    """What a user must know of weights that fit in part; parts of the model that the file leaves out are no problem."""
    problems = []

    def warn(code: str, what: str, hint: str) -> None:
        problems.append(Problem("warning", code, FIELD, what, hint))

    def is_backbone(name: str) -> bool:
        return name.startswith("backbone.")

    if not any(map(is_backbone, loaded.fitting)) and any(map(is_backbone, [*loaded.missing, *loaded.other_shape])):
        what = f"none of the weights fits the backbone: {len(loaded.fitting)} weights of other parts do"
        hint = "Give weights of the same backbone (MODEL.BACKBONE, MODEL.RESNETS), or weights: '' for random ones"
        return [Problem("error", "weights_unmatched", FIELD, what, hint)]
    if loaded.other_shape:
        names = _listed([f"{name} {a} instead of {b}" for name, (a, b) in loaded.other_shape.items()])
        what = f"{len(loaded.other_shape)} weights have another shape than the model's and start at random: {names}"
        warn("weights_shape", what, "That is normal for predictors where the number of classes differs")
    lost = [name for name in loaded.missing if _part(name) in {_part(fitting) for fitting in loaded.fitting}]
    if lost:
        what = f"{len(lost)} weights start at random: the file has others of their parts, not them: {_listed(lost)}"
        warn("weights_missing_part", what, "Give weights of the same model, such as of the same depth")
    unused = [name for name in loaded.unused if is_backbone(name)]
    if unused:
        what = f"{len(unused)} weights of the file have no place in the model's backbone: {_listed(unused)}"
        warn("weights_unused", what, "Give weights of the same model, such as of the same depth")
    return problems


def _part(name: str) -> str:
    """The part of a model that a weight belongs to: `backbone.bottom_up`, `roi_heads.mask_head`."""
    return ".".join(name.split(".")[:2])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
