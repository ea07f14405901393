"""AP and curves of each class are those of pycocotools where it scores one class, or one threshold, alone."""

from __future__ import annotations

import copy
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.builders.scoring import CATEGORIES, IOU_TYPES, SCORERS, detections_near, make_truth
from trainers.recipes import Scorer
from trainers.scoring import score_classes
from trainers.scoring_input import IouType


def alone(truth: dict[str, Any], found: list[dict[str, Any]], iou_type: IouType, category: int) -> COCOeval:
    """The evaluation of one class by pycocotools."""
    kept = copy.deepcopy(found)
    for detection in kept:
        if iou_type == "segm":
            del detection["bbox"]  # as detectron2 does
    with redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(kept), iou_type)
        evaluation.params.catIds = [category]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_ap_of_each_class_is_that_of_pycocotools_run_class_by_class(
    tmp_path: Path, scorer: Scorer, iou_type: IouType
) -> None:
    truth = make_truth()
    found = detections_near(truth["annotations"])
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    scored = score_classes(tmp_path / "truth.json", found, iou_type, scorer)
    assert list(scored.class_ap) == [f"kind {category}" for category in CATEGORIES]
    assert scored.class_ap["kind 90"] is None, "no object of it"
    for category, curve in zip(CATEGORIES, scored.curves, strict=True):
        evaluation = alone(truth, found, iou_type, category)
        ap = evaluation.stats[0]
        expected = None if ap < 0 else pytest.approx(100 * ap, abs=1e-9)
        assert scored.class_ap[f"kind {category}"] == expected
        precision, scores = (evaluation.eval[name][0, :, 0, 0, -1] for name in ("precision", "scores"))
        number = int((precision > 0).sum())
        assert len(curve.precision) == len(curve.scores) == number and (category == 90) == (number == 0)
        np.testing.assert_allclose(curve.precision, precision[:number], atol=1e-4)
        np.testing.assert_allclose(curve.scores, scores[:number], atol=1e-4)
        assert curve.num_objects == sum(
            a["category_id"] == category and not a["iscrowd"] and (iou_type != "keypoints" or a["num_keypoints"] > 0)
            for a in truth["annotations"]
        )
    measured = [ap for ap in scored.class_ap.values() if ap is not None]
    assert scored.figures["ap"] == pytest.approx(np.mean(measured), abs=1e-6)


def test_the_best_threshold_is_where_f1_is_highest(tmp_path: Path) -> None:
    box = {"category_id": 1, "bbox": [0.0, 0.0, 10.0, 10.0]}
    truth = {
        "images": [{"id": n, "height": 50, "width": 50, "file_name": f"{n}.png"} for n in (1, 2)],
        "annotations": [box | {"id": n, "image_id": n, "area": 100.0, "iscrowd": 0} for n in (1, 2)],
        "categories": [{"id": 1, "name": "square"}],
    }
    found = [
        box | {"image_id": 1, "score": 0.9},
        box | {"image_id": 1, "score": 0.8, "bbox": [30.0, 30.0, 10.0, 10.0]},
        box | {"image_id": 2, "score": 0.7},
    ]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (curve,) = score_classes(tmp_path / "truth.json", found, "bbox").curves
    # Up to half of the objects with precision 1; all of them with one false detection: 2 of 3.
    assert curve.precision[50] == 1.0 and curve.precision[51] == curve.precision[100] == pytest.approx(2 / 3, abs=1e-4)
    assert (curve.scores[50], curve.scores[51]) == (0.9, 0.7)
    assert curve.f1[50] == pytest.approx(2 / 3) and curve.f1[100] == pytest.approx(0.8, abs=1e-4)
    assert curve.best == (pytest.approx(0.8, abs=1e-4), 0.7)


def test_classes_without_a_name_or_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    truth = make_truth(num_images=8)
    truth["categories"] = [{"id": 1, "name": "cat"}, {"id": 3, "name": "cat"}, {"id": 17}, {"id": 90, "name": "a/b"}]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    scored = score_classes(tmp_path / "truth.json", [], "bbox")
    assert list(scored.class_ap) == ["cat (1)", "cat (3)", "17", "a/b"]
    assert [curve.best for curve in scored.curves] == [None] * 4
