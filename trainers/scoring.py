"""COCO scoring of boxes, masks and keypoints, by pycocotools or, with equal results, by native code.

A detection that has a box besides its mask counts with its *box's* area when masks are scored, which changes the small,
medium and large figures. detectron2 drops the box first; so does this module, with either scorer. Keypoints count with
the box's area, as detectron2's do.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainers.class_scores import Scored, by_class
from trainers.contract.targets import FIGURES, KEYPOINT_FIGURES
from trainers.recipes import Scorer
from trainers.scoring_input import GroundTruth, IouType, ScoringInputError, ground_truth, polygons_rle

logger = logging.getLogger(__name__)

Detection = Mapping[str, Any]
"""A detection in COCO's result format: image_id, category_id, score, bbox (x, y, width, height), and segmentation (RLE)
or keypoints (x, y, score of each)."""

NUM_EXAMPLES = 10
"""Objects, about, that a dry scoring takes for detections."""


def score(
    annotations: str | Path,
    detections: Sequence[Detection] | str | Path,
    iou_type: IouType,
    scorer: Scorer = "hotcoco",
    sigmas: Sequence[float] | None = None,
) -> dict[str, float | None]:
    """Scores detections against a COCO annotation file over all of its images and categories.

    The annotations are read once per file and IoU type, as `ground_truth` describes, and cached by the file's name,
    size and time. Detections of categories that the file does not list are left out, as by pycocotools. Without any
    detection the figures are COCO's for a model that finds nothing: 0 wherever there was something to find.

    Args:
        annotations: The annotation JSON.
        detections: Detections in COCO's result format, with the data set's own ids, or the path of a JSON file
            holding such a list. They are not changed. `counts` of an RLE may be text or bytes.
        iou_type: `bbox`, `segm` or `keypoints`.
        scorer: `pycocotools` (the reference) or `hotcoco` (native, all cores). Equal to 1e-6. If hotcoco fails,
            pycocotools scores, and a warning is logged.
        sigmas: Spread of each keypoint for the OKS, detectron2's `TEST.KEYPOINT_OKS_SIGMAS`; none for COCO's 17.

    Returns:
        AP and AR by the names in FIGURES, or KEYPOINT_FIGURES, on the 0–100 scale; None where the data has nothing of
        that kind.

    Raises:
        OSError: A file cannot be read.
        ScoringInputError: A ValueError: the annotations cannot be scored, a detection names an image that they do not
            have, or its keypoints are not as many as theirs or the sigmas.
        KeyError: A detection lacks a field.
    """
    found: Sequence[Detection] = (
        json.loads(Path(detections).read_bytes()) if isinstance(detections, (str, Path)) else detections
    )
    return score_classes(annotations, found, iou_type, scorer, sigmas).figures


def score_classes(
    annotations: str | Path,
    detections: Sequence[Detection],
    iou_type: IouType,
    scorer: Scorer = "hotcoco",
    sigmas: Sequence[float] | None = None,
) -> Scored:
    """The same with what was found of each class; arguments and errors are those of `score`."""
    return _score(Path(annotations), detections, iou_type, scorer, sigmas)[0]


def dry_score(
    annotations: str | Path,
    iou_types: Collection[IouType],
    scorer: Scorer = "hotcoco",
    sigmas: Sequence[float] | None = None,
) -> list[str]:
    """Scores a few detections made of a validation file's own objects, to find out early whether it can be scored.

    Args:
        annotations: The annotation JSON.
        iou_types: What will be scored.
        scorer: As for `score`.
        sigmas: As for `score`.

    Returns:
        Warnings, each a sentence without a full stop: that pycocotools has to step in for hotcoco, and why.

    Raises:
        OSError: The file cannot be read.
        ScoringInputError: A ValueError: the annotations cannot be scored.
    """
    warnings: list[str] = []
    for iou_type in iou_types:
        warnings += _score(Path(annotations), None, iou_type, scorer, sigmas)[1]
    return warnings


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An annotation file, read by a scorer."""

    coco: Any
    image_ids: dict[Any, int]
    category_ids: dict[Any, int]
    num_objects: dict[str, int]
    """Of each class by its name: those that can be found."""
    num_keypoints: int
    examples: list[Detection]
    """A few of its objects, as detections."""


def _score(
    annotations: Path,
    detections: Sequence[Detection] | None,
    iou_type: IouType,
    scorer: Scorer,
    sigmas: Sequence[float] | None,
) -> tuple[Scored, list[str]]:
    """Figures and warnings; detections None for examples of the annotations' own objects."""
    try:
        return _score_with(scorer, annotations, detections, iou_type, sigmas), []
    except (OSError, ScoringInputError):
        raise
    except BaseException as error:
        # hotcoco's native code panics with a BaseException.
        if scorer == "pycocotools" or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        reason = f"{type(error).__name__}: {error}"
        problem = f"{annotations}: pycocotools scores it, with equal figures but slowly, as hotcoco cannot ({reason})"
        logger.warning("%s", problem)
    return _score_with("pycocotools", annotations, detections, iou_type, sigmas), [problem]


def _score_with(
    scorer: Scorer,
    annotations: Path,
    detections: Sequence[Detection] | None,
    iou_type: IouType,
    sigmas: Sequence[float] | None,
) -> Scored:
    path = annotations.absolute()
    stat = path.stat()
    # Both libraries print their progress, and hotcoco warns of sigmas that are not COCO's.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="hotcoco: kpt_oks_sigmas")
        truth = _loaded(path, stat.st_size, stat.st_mtime_ns, iou_type, scorer)
        found = truth.examples if detections is None else detections
        category_ids = [truth.category_ids.get(detection["category_id"], 0) for detection in found]
        if 0 in category_ids:
            found = [detection for detection, number in zip(found, category_ids, strict=True) if number]
            category_ids = [number for number in category_ids if number]
        image_ids = [truth.image_ids.get(detection["image_id"], 0) for detection in found]
        if 0 in image_ids:
            unknown = {detection["image_id"] for detection in found} - truth.image_ids.keys()
            raise ScoringInputError(f"{path}: detections of images that are not in it: {list(unknown)[:5]}")
        evaluation = _SCORERS[scorer](truth.coco, found, image_ids, category_ids, iou_type)
        if detections is None and scorer == "pycocotools":  # all 5,000 images of COCO would take 10 s
            evaluation.params.imgIds = image_ids
        if iou_type == "keypoints":
            _set_sigmas(evaluation, sigmas, found, truth.num_keypoints, path)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = zip(KEYPOINT_FIGURES if iou_type == "keypoints" else FIGURES, evaluation.stats, strict=True)
    return Scored(
        {name: None if value < 0 else float(value) * 100.0 for name, value in figures},
        *by_class(evaluation.eval, truth.num_objects),
    )


@functools.lru_cache(maxsize=4)
def _loaded(path: Path, size: int, mtime_ns: int, iou_type: IouType, scorer: Scorer) -> _Loaded:  # noqa: ARG001
    """The annotations; size and time are in the key of the cache alone."""
    truth = ground_truth(path, iou_type)
    annotations = truth.document["annotations"]
    num_keypoints = len(annotations[0]["keypoints"]) // 3 if iou_type == "keypoints" and annotations else 0
    numbers = Counter(
        each["category_id"] for each in annotations if not each["iscrowd"] and each.get("num_keypoints", 1)
    )
    num_objects = {truth.class_names[key]: numbers[number] for key, number in truth.category_ids.items()}
    examples = _examples(truth)
    if scorer == "hotcoco":
        coco = importlib.import_module("hotcoco").COCO(truth.document)
    else:
        coco = _pycocotools_coco(truth.document)
    return _Loaded(coco, truth.image_ids, truth.category_ids, num_objects, num_keypoints, examples)


def _examples(truth: GroundTruth) -> list[Detection]:
    """Detections of some of the objects, spread over the file."""
    annotations = truth.document["annotations"]
    image_ids = {number: image_id for image_id, number in truth.image_ids.items()}
    category_ids = {number: category_id for category_id, number in truth.category_ids.items()}
    examples: list[Detection] = []
    for annotation in annotations[:: max(1, len(annotations) // NUM_EXAMPLES)]:
        shape: dict[str, Any] = {
            key: annotation[key] for key in ("bbox", "keypoints", "segmentation") if key in annotation
        }
        if isinstance(mask := shape.get("segmentation"), list):
            image = truth.document["images"][annotation["image_id"] - 1]
            shape["segmentation"] = polygons_rle(mask, image["height"], image["width"])
        image_id, category_id = image_ids[annotation["image_id"]], category_ids[annotation["category_id"]]
        examples.append({"image_id": image_id, "category_id": category_id, "score": 0.5, **shape})
    return examples


def _set_sigmas(
    evaluation: Any, sigmas: Sequence[float] | None, found: Sequence[Detection], num_keypoints: int, path: Path
) -> None:
    if sigmas:
        evaluation.params.kpt_oks_sigmas = np.array(sigmas)
    numbers = {len(evaluation.params.kpt_oks_sigmas), *(len(detection["keypoints"]) // 3 for detection in found)}
    if num_keypoints:
        numbers.add(num_keypoints)
    if len(numbers) > 1:
        raise ScoringInputError(
            f"{path}: objects have {num_keypoints} keypoints, detections and OKS sigmas {sorted(numbers)}: "
            "TEST.KEYPOINT_OKS_SIGMAS needs one sigma for each keypoint"
        )


def _pycocotools_coco(document: dict[str, Any]) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = document
    coco.createIndex()
    return coco


def _with_pycocotools(
    truth: Any, detections: Sequence[Detection], image_ids: list[int], category_ids: list[int], iou_type: IouType
) -> Any:
    from pycocotools.cocoeval import COCOeval

    # loadRes writes into the dicts it is given, and takes a box's area before a mask's.
    copies = [
        {"image_id": image_id, "category_id": category_id, **{key: detection[key] for key in _USED[iou_type]}}
        for detection, image_id, category_id in zip(detections, image_ids, category_ids, strict=True)
    ]
    # loadRes looks at the first detection
    found = truth.loadRes(copies) if copies else _pycocotools_coco({**truth.dataset, "annotations": []})
    return COCOeval(truth, found, iou_type)


def _with_hotcoco(
    truth: Any, detections: Sequence[Detection], image_ids: list[int], category_ids: list[int], iou_type: IouType
) -> Any:
    from hotcoco import COCOeval
    from hotcoco.mask import area

    # Columns instead of a list of dicts: reading 100,000 dicts field by field takes longer than scoring them.
    rows = np.zeros((len(detections), 7), dtype=np.float64)
    if detections:
        rows[:, 0] = image_ids
        rows[:, 5] = [detection["score"] for detection in detections]
        rows[:, 6] = category_ids
        if iou_type != "segm":
            rows[:, 1:5] = [detection["bbox"] for detection in detections]
    rles = [detection["segmentation"] for detection in detections] if iou_type == "segm" else None
    found = truth.load_res(rows, segmentation=rles)
    # load_res numbers detections from 1 in their order, and gives them their boxes' areas.
    if rles:
        found.update_anns(ids=np.arange(1, len(rles) + 1), area=np.asarray(area(rles), dtype=np.float64))
    elif detections and iou_type == "keypoints":
        found.update_anns([{"id": n, "keypoints": d["keypoints"]} for n, d in enumerate(detections, start=1)])
    return COCOeval(truth, found, iou_type)


_USED: dict[IouType, tuple[str, ...]] = {
    "bbox": ("score", "bbox"),
    "segm": ("score", "segmentation"),
    "keypoints": ("score", "bbox", "keypoints"),
}
"""Fields of a detection besides its ids."""

_SCORERS = {"pycocotools": _with_pycocotools, "hotcoco": _with_hotcoco}
