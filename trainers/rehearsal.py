"""Rehearses a run before a worker starts: builds the model, trains and detects once on a small image, reads weights.

`python -m trainers.rehearsal` reads the trials' plans as JSON from its standard input and writes what it found wrong
as JSON to its standard output. It is a process of its own, because the driver does without torch and detectron2, and
because what crashes it would have crashed every worker.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules
from PIL import Image
from torch import nn

from trainers import mask_rcnn
from trainers.contract.plan import TrialPlan
from trainers.contract.problems import ConfigurationError, Problem
from trainers.evaluation import scored_types
from trainers.loading import build_mapper
from trainers.scoring import dry_score
from trainers.scoring_input import IouType
from trainers.weights import fit_problems, load_start_weights

SIDE = 64
"""Height and width of the made image, and the size it is resized to, in pixels."""

DAMPING = 0.3
"""Factor of each frozen batch norm."""

MAX_SEARCH_SECONDS = 30.0
"""How long the key is searched for that an error of detectron2's is about."""

SECTIONS = {
    "anchor_generator.py": "MODEL.ANCHOR_GENERATOR",
    "resnet.py": "MODEL.RESNETS",
    "fpn.py": "MODEL.FPN",
    "rpn.py": "MODEL.RPN",
    "proposal_utils.py": "MODEL.RPN",
    "retinanet.py": "MODEL.RETINANET",
    "roi_heads.py": "MODEL.ROI_HEADS",
    "cascade_rcnn.py": "MODEL.ROI_BOX_CASCADE_HEAD",
    "fast_rcnn.py": "MODEL.ROI_BOX_HEAD",
    "box_head.py": "MODEL.ROI_BOX_HEAD",
    "poolers.py": "MODEL.ROI_BOX_HEAD",
    "mask_head.py": "MODEL.ROI_MASK_HEAD",
    "keypoint_head.py": "MODEL.ROI_KEYPOINT_HEAD",
    "lr_scheduler.py": "SOLVER",
    "augmentation_impl.py": "INPUT",
    "detection_utils.py": "INPUT",
}
"""The config's section that each of detectron2's files is built from, for errors that no override explains."""

WHOLE = ("MODEL", "INPUT", "SOLVER")
"""Sections that are too wide to name."""


@dataclasses.dataclass
class Attempt:
    """How far a plan came."""

    cfg: CfgNode | None = None
    weights: str = ""
    model: nn.Module | None = None
    problem: Problem | None = None
    """Why it came no further; None where nothing is wrong."""
    cause: BaseException | None = None
    """What detectron2 or torch raised."""


def rehearse(plans: Sequence[TrialPlan]) -> list[Problem]:
    """What is wrong with the trials of a run, as far as one process on a CPU finds out; the widest stands for all."""
    plan = max(plans, key=lambda each: each.world_size)
    # What needs a GPU to be asked about, or a minute, is left to the workers.
    plan = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, precision="fp32", compile=False))
    attempt = _attempt(plan)
    problems: list[Problem] = []
    if attempt.problem:
        problems.append(_with_key(plan, attempt, attempt.problem))
    if attempt.model is not None and attempt.weights:
        try:
            problems += fit_problems(load_start_weights(attempt.model, attempt.weights, plan.weights_sha256))
        except ConfigurationError as error:
            problems.append(error.problem)
    precise = attempt.cfg is not None and attempt.cfg.TEST.PRECISE_BN.ENABLED
    if precise and attempt.model is not None and not get_bn_modules(attempt.model.train()):
        what = "no effect: this model has no batch norm that is trained"
        hint = "Leave it out, or set MODEL.RESNETS.NORM: BN"
        problems.append(Problem("warning", "config_unused", "TEST.PRECISE_BN.ENABLED", what, hint))
    return [*problems, *_score_dry(plans, attempt.cfg if attempt.model is not None else None)]


def _attempt(plan: TrialPlan) -> Attempt:
    """Builds a plan's model without its start weights, and runs it once."""
    attempt = Attempt()
    try:
        attempt.cfg = cfg = mask_rcnn.build_config(plan).clone()
        cfg.defrost()
        attempt.weights, cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = cfg.MODEL.WEIGHTS, "", "cpu"
        for dataset in (plan.train, plan.val):
            mask_rcnn.register(cfg, dataset)
        attempt.model = mask_rcnn.build_detector(cfg, plan)
        for module in attempt.model.modules():
            if isinstance(module, FrozenBatchNorm2d):  # random weights without statistics grow to infinity
                module.weight.mul_(DAMPING)
        _run_once(cfg, plan, attempt.model)
    except ConfigurationError as error:
        attempt.problem, attempt.cause = error.problem, error.__cause__
    except FloatingPointError:
        pass  # detectron2's word for losses that are no numbers; random weights may give them all the same
    except Exception as error:  # noqa: BLE001 - detectron2 and torch raise anything
        if not (isinstance(error, NotImplementedError) and plan.device == "cuda"):  # an operation that only GPUs have
            reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
            what = f"a training step or a detection with this model fails: {type(error).__name__}: {reason}"
            hint = "Correct this part of model.config or model.overrides"
            attempt.problem, attempt.cause = Problem("error", "model_config", "MODEL", what, hint), error
    return attempt


def _run_once(cfg: CfgNode, plan: TrialPlan, model: nn.Module) -> None:
    """Maps a made image, and takes its losses and its detections."""
    small = cfg.clone()
    small.INPUT.MIN_SIZE_TRAIN = tuple(SIDE for _ in cfg.INPUT.MIN_SIZE_TRAIN)
    small.INPUT.MIN_SIZE_TEST = SIDE
    small.INPUT.MAX_SIZE_TRAIN = small.INPUT.MAX_SIZE_TEST = 2 * SIDE
    with tempfile.TemporaryDirectory() as folder, EventStorage(0):
        image = Path(folder) / "made.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(image)
        np.random.seed(0)
        for is_train in (True, False):
            record = build_mapper(small, plan, is_train)(_made_record(cfg, str(image)))
            with torch.no_grad():
                model.train(is_train)([record])


def _made_record(cfg: CfgNode, image: str) -> dict[str, Any]:
    """An image that one object fills, as a record of detectron2's dataset format."""
    end = float(SIDE - 2)
    point = [SIDE / 2, SIDE / 2, 2.0]
    made = {
        "bbox": [1.0, 1.0, end, end],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "segmentation": [[1.0, 1.0, end, 1.0, end, end, 1.0, end]],
        "keypoints": point * cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS,
    }
    if not cfg.MODEL.KEYPOINT_ON:
        del made["keypoints"]
    return {"file_name": image, "image_id": 1, "height": SIDE, "width": SIDE, "annotations": [made]}


def _score_dry(plans: Sequence[TrialPlan], cfg: CfgNode | None) -> list[Problem]:
    """Scores a few made detections of the validation file, with every scorer that the trials use."""
    problems = []
    types: list[IouType] = scored_types(cfg) if cfg else ["bbox"]
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS if cfg else None
    evaluating = [plan for plan in plans if plan.solver.evaluates]
    for scorer, plan in {plan.recipe.scorer: plan for plan in evaluating}.items():
        place = plan.val.annotations
        try:
            for warning in dry_score(place, types, scorer, sigmas):
                hint = "Nothing needs to be done if that is meant"
                problems.append(Problem("warning", "scoring", place, warning.removeprefix(f"{place}: "), hint))
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"the validation set cannot be scored: {str(error).removeprefix(f'{place}: ')}"
            problems.append(Problem("error", "scoring", place, what, "Correct the annotations"))
    return problems


def _with_key(plan: TrialPlan, attempt: Attempt, problem: Problem) -> Problem:
    """A problem with the key that it is most likely about, where it names no more than a whole section.

    That is the key whose value its text quotes; else the one without which there is no such problem; else the section
    that the failing file of detectron2 is built from.
    """
    cause = attempt.cause
    is_name = isinstance(cause, KeyError) and " " not in str(cause)
    what = f"detectron2 knows no {cause} here" if is_name else problem.what
    named = dataclasses.replace(problem, what=_in_short(what))
    if problem.file not in WHOLE or attempt.cfg is None or cause is None:
        return named
    quoted = set(re.findall(r"'([^'\s]{2,})'", str(cause)))
    key = next((key for key, value in plan.overrides.items() if isinstance(value, str) and value in quoted), None)
    section = _section(cause) or problem.file
    return dataclasses.replace(named, file=key or _needless(plan, attempt.cfg, problem.what, section) or section)


def _in_short(text: str) -> str:
    return " ".join(text.split())[:400]


def _needless(plan: TrialPlan, cfg: CfgNode, what: str, section: str) -> str | None:
    """The last override without which a problem is another one or none, or a key of a file that causes it."""
    deadline = time.monotonic() + MAX_SEARCH_SECONDS
    defaults = dict(_flat(get_cfg()))
    changed = {key: value for key, value in _flat(cfg) if value != defaults.get(key, value)}
    in_files = [key for key in changed if key not in plan.overrides and key.startswith(section)]
    for key in (*reversed(plan.overrides), *in_files):
        others = {name: value for name, value in plan.overrides.items() if name != key}
        if key in in_files:
            others[key] = defaults[key]
        found = _attempt(dataclasses.replace(plan, overrides=others)).problem
        if found is None or (key not in in_files and _in_short(found.what) != _in_short(what)):
            return key
        if time.monotonic() > deadline:
            break
    return None


def _flat(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _section(error: BaseException) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)
    return next((SECTIONS[file] for each in reversed(frames) if (file := Path(each.filename).name) in SECTIONS), None)


def main() -> None:
    """Reads plans from standard input, and writes a JSON list of problems to standard output."""
    # Libraries print to standard output; what they print must not mix with the answer.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    problems = rehearse([TrialPlan.from_dict(values) for values in json.load(sys.stdin)])
    with answer:
        json.dump([dataclasses.asdict(problem) for problem in problems], answer)


if __name__ == "__main__":
    main()
