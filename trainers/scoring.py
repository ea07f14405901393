"""COCO scoring of boxes and masks: the twelve figures, by pycocotools or, with equal results, by native code.

A detection that has a box besides its mask counts with its *box's* area when masks are scored, which changes the small,
medium and large figures. detectron2 drops the box first; so does this module, with either scorer.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainers.recipes import Scorer

IouType = Literal["bbox", "segm"]
Detection = Mapping[str, Any]
"""A detection in COCO's result format: image_id, category_id, bbox (x, y, width, height), score, segmentation (RLE)."""

FIGURES = ("ap", "ap50", "ap75", "aps", "apm", "apl", "ar1", "ar10", "ar100", "ars", "arm", "arl")
"""The order of COCOeval's `stats` (pycocotools/cocoeval.py, `summarize`)."""


def score(
    annotations: str | Path,
    detections: Sequence[Detection] | str | Path,
    iou_type: IouType,
    scorer: Scorer = "hotcoco",
) -> dict[str, float | None]:
    """Scores detections against a COCO annotation file over all of its images and categories.

    The annotations are read once per file and cached by its name, size and time. Without any detection the figures are
    COCO's for a model that finds nothing: 0 wherever there was something to find.

    Args:
        annotations: The annotation JSON.
        detections: Detections in COCO's result format, with the data set's own category ids, or the path of a JSON
            file holding such a list. They are not changed. `counts` of an RLE may be text or bytes.
        iou_type: `bbox` or `segm`.
        scorer: `pycocotools` (the reference) or `hotcoco` (native, all cores). Equal to 1e-6.

    Returns:
        AP and AR by the names in FIGURES on the 0–100 scale; None where the data has nothing of that kind.

    Raises:
        ValueError: A detection names an image that the annotations do not have.
        KeyError: A detection lacks a field.
    """
    found: Sequence[Detection] = (
        json.loads(Path(detections).read_bytes()) if isinstance(detections, (str, Path)) else detections
    )
    path = Path(annotations).absolute()
    stat = path.stat()
    truth, known = _ground_truth(str(path), stat.st_size, stat.st_mtime_ns, scorer)
    if unknown := {detection["image_id"] for detection in found} - known:
        raise ValueError(f"{path}: detections of images that are not in it: {sorted(unknown)[:5]}")
    with contextlib.redirect_stdout(io.StringIO()):  # both libraries print their progress
        evaluation = _SCORERS[scorer](truth, found, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = zip(FIGURES, evaluation.stats, strict=True)
    return {name: None if value < 0 else float(value) * 100.0 for name, value in figures}


@functools.lru_cache(maxsize=2)
def _ground_truth(path: str, size: int, mtime_ns: int, scorer: Scorer) -> tuple[Any, frozenset[int]]:  # noqa: ARG001
    """A scorer's object of the annotations, and the images' ids; size and time are in the key of the cache alone."""
    package = importlib.import_module("hotcoco" if scorer == "hotcoco" else "pycocotools.coco")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = package.COCO(path)
    return truth, frozenset(truth.getImgIds())


def _with_pycocotools(truth: Any, detections: Sequence[Detection], iou_type: IouType) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # loadRes writes into the dicts it is given, and takes a box's area before a mask's.
    unused = "bbox" if iou_type == "segm" else "segmentation"
    copies = [{key: value for key, value in detection.items() if key != unused} for detection in detections]
    if copies:
        found = truth.loadRes(copies)
    else:  # loadRes looks at the first detection
        found = COCO()
        found.dataset = {**truth.dataset, "annotations": []}
        found.createIndex()
    return COCOeval(truth, found, iou_type)


def _with_hotcoco(truth: Any, detections: Sequence[Detection], iou_type: IouType) -> Any:
    from hotcoco import COCOeval
    from hotcoco.mask import area

    # Columns instead of a list of dicts: reading 100,000 dicts field by field takes longer than scoring them.
    rows = np.empty((len(detections), 7), dtype=np.float64)
    if detections:
        rows[:, 0] = [detection["image_id"] for detection in detections]
        rows[:, 1:5] = [detection["bbox"] for detection in detections]
        rows[:, 5] = [detection["score"] for detection in detections]
        rows[:, 6] = [detection["category_id"] for detection in detections]
    if iou_type == "bbox":
        return COCOeval(truth, truth.load_res(rows), iou_type)
    rles = [detection["segmentation"] for detection in detections]
    found = truth.load_res(rows, segmentation=rles)
    if rles:
        # load_res numbers detections from 1 in their order and gives them their boxes' areas.
        found.update_anns(ids=np.arange(1, len(rles) + 1), area=np.asarray(area(rles), dtype=np.float64))
    return COCOeval(truth, found, iou_type)


_SCORERS = {"pycocotools": _with_pycocotools, "hotcoco": _with_hotcoco}
