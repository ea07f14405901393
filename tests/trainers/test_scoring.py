"""COCO's figures: the native scorer gives what pycocotools gives, and both what detectron2 would."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from pycocotools import mask as coco_mask

from tests.builders.scoring import HEIGHT, NUM_KEYPOINTS, SCORERS, WIDTH, detections_near, write_truth
from trainers.contract.targets import FIGURES, KEYPOINT_FIGURES
from trainers.scoring import dry_score, score

if TYPE_CHECKING:
    from pathlib import Path

    from trainers.recipes import Scorer
    from trainers.scoring_input import IouType

IOU_TYPES: tuple[IouType, ...] = ("bbox", "segm")
SIGMAS = [0.05 + 0.01 * number for number in range(NUM_KEYPOINTS)]


@pytest.mark.parametrize("iou_type", IOU_TYPES)
@pytest.mark.parametrize("seed", range(4))
def test_both_scorers_give_the_same_twelve_figures(tmp_path: Path, iou_type: IouType, seed: int) -> None:
    path = tmp_path / "truth.json"
    found = detections_near(write_truth(path, seed=seed), seed=100 + seed)
    reference, native = (score(path, found, iou_type, scorer) for scorer in SCORERS)
    assert list(reference) == list(FIGURES)
    for name, value in reference.items():
        assert native[name] == pytest.approx(value, abs=1e-6), name
    assert 1 < (reference["ap"] or 0) < 99


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(
    ("iou_type", "sigmas"), [("bbox", None), ("segm", None), ("keypoints", None), ("keypoints", SIGMAS)]
)
def test_the_figures_are_those_of_detectron2s_evaluator(
    tmp_path: Path, scorer: Scorer, iou_type: IouType, sigmas: list[float] | None
) -> None:
    from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
    from pycocotools.coco import COCO

    path = tmp_path / "truth.json"
    found = detections_near(write_truth(path))
    copies = json.loads(json.dumps(found))
    theirs = _evaluate_predictions_on_coco(COCO(str(path)), copies, iou_type, kpt_oks_sigmas=sigmas).stats * 100
    ours = score(path, found, iou_type, scorer, sigmas)
    assert list(ours) == list(KEYPOINT_FIGURES if iou_type == "keypoints" else FIGURES)
    assert list(ours.values()) == pytest.approx(theirs.tolist(), abs=1e-6)
    assert 1 < theirs[0] < 99


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_a_perfect_detector_scores_100_and_absent_sizes_are_not_measured(
    tmp_path: Path, scorer: Scorer, iou_type: IouType
) -> None:
    path = tmp_path / "truth.json"
    polygon = [10.0, 10.0, 210.0, 10.0, 210.0, 210.0, 10.0, 210.0]  # 40,000 square pixels: large
    rle = coco_mask.frPyObjects([polygon], HEIGHT, WIDTH)[0]
    box = [10.0, 10.0, 200.0, 200.0]
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 40000.0, "iscrowd": 0}
    truth = {
        "images": [{"id": 1, "height": HEIGHT, "width": WIDTH, "file_name": "1.jpg"}],
        "annotations": [annotation | {"segmentation": [polygon]}],
        "categories": [{"id": 1, "name": "square"}],
    }
    path.write_text(json.dumps(truth))
    found = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9, "segmentation": rle}]
    figures = score(path, found, iou_type, scorer)
    whole = ("ap", "ap50", "ap75", "apl", "ar1", "ar10", "ar100", "arl")
    assert {name: figures[name] for name in whole} == pytest.approx(dict.fromkeys(whole, 100.0))
    assert [figures[name] for name in ("aps", "apm", "ars", "arm")] == [None] * 4


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_a_model_that_finds_nothing_scores_0(tmp_path: Path, scorer: Scorer, iou_type: IouType) -> None:
    path = tmp_path / "truth.json"
    write_truth(path)
    assert score(path, [], iou_type, scorer)["ap"] == 0.0


@pytest.mark.parametrize("scorer", SCORERS)
def test_detections_are_left_as_they_were(tmp_path: Path, scorer: Scorer) -> None:
    path = tmp_path / "truth.json"
    found = detections_near(write_truth(path))
    before = json.dumps(found)
    for iou_type in IOU_TYPES:
        score(path, found, iou_type, scorer)
    assert json.dumps(found) == before


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_file_of_detections_scores_like_the_list(tmp_path: Path, scorer: Scorer) -> None:
    path, detections = tmp_path / "truth.json", tmp_path / "found.json"
    found = detections_near(write_truth(path))
    detections.write_text(json.dumps(found))
    assert score(path, detections, "segm", scorer) == score(path, found, "segm", scorer)


@pytest.mark.parametrize("scorer", SCORERS)
def test_rewritten_annotations_are_read_again(tmp_path: Path, scorer: Scorer) -> None:
    path = tmp_path / "truth.json"
    found = detections_near(write_truth(path, num_images=25))
    first = score(path, found, "bbox", scorer)
    write_truth(path, num_images=26, seed=5)
    assert score(path, found, "bbox", scorer) != first


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_detection_of_an_unknown_image_is_an_error(tmp_path: Path, scorer: Scorer) -> None:
    path = tmp_path / "truth.json"
    found = detections_near(write_truth(path))
    with pytest.raises(ValueError, match="not in it"):
        score(path, [found[0] | {"image_id": 12345}], "bbox", scorer)


@pytest.mark.parametrize("scorer", SCORERS)
def test_detections_of_classes_that_the_file_does_not_list_count_for_nothing(tmp_path: Path, scorer: Scorer) -> None:
    path = tmp_path / "truth.json"
    found = detections_near(write_truth(path))
    unknown = [found[0] | {"category_id": 12345, "score": 1.0}]
    assert score(path, found + unknown, "bbox", scorer) == score(path, found, "bbox", scorer)
    assert score(path, unknown, "bbox", scorer)["ap"] == 0.0


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_keypoint_needs_a_sigma(tmp_path: Path, scorer: Scorer) -> None:
    path = tmp_path / "truth.json"
    found = detections_near(write_truth(path))
    with pytest.raises(ValueError, match=r"17 keypoints, .*sigmas \[5, 17\].*TEST\.KEYPOINT_OKS_SIGMAS"):
        score(path, found, "keypoints", scorer, SIGMAS[:5])
    with pytest.raises(ValueError, match=r"TEST\.KEYPOINT_OKS_SIGMAS"):
        dry_score(path, ["keypoints"], scorer, SIGMAS[:5])


class PanicException(BaseException):
    """What native code raises by that name."""


class _BrokenScorer:
    """Stands in for hotcoco: refuses the annotations, or fails when it evaluates."""

    def __init__(self, error: BaseException, late: bool) -> None:
        self.error, self.late = error, late
        self.mask = SimpleNamespace(area=None)

    def COCO(self, document: dict[str, Any]) -> Any:  # noqa: N802
        if not self.late:
            raise self.error
        return self

    def load_res(self, *_: Any, **__: Any) -> Any:
        raise self.error

    COCOeval = None


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", [ValueError("invalid type"), PanicException("index out of bounds")])
def test_pycocotools_scores_what_hotcoco_refuses_and_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException, late: bool
) -> None:
    path = tmp_path / "truth.json"
    found = detections_near(write_truth(path))
    expected = score(path, found, "bbox", "pycocotools")
    broken = _BrokenScorer(error, late)
    monkeypatch.setitem(sys.modules, "hotcoco", broken)
    monkeypatch.setitem(sys.modules, "hotcoco.mask", broken.mask)
    assert score(path, found, "bbox", "hotcoco") == expected
    reason = f"as hotcoco cannot ({type(error).__name__}: {error})"
    assert reason in caplog.text
    (warning,) = dry_score(path, ["bbox"], "hotcoco")
    assert warning.startswith(str(path)) and reason in warning


def test_an_interrupted_scoring_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "truth.json"
    found = detections_near(write_truth(path))
    monkeypatch.setitem(sys.modules, "hotcoco", _BrokenScorer(KeyboardInterrupt(), late=False))
    with pytest.raises(KeyboardInterrupt):
        score(path, found, "bbox", "hotcoco")


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_dry_scoring_of_a_good_file_has_nothing_to_say(tmp_path: Path, scorer: Scorer) -> None:
    path = tmp_path / "truth.json"
    write_truth(path)
    assert dry_score(path, ["bbox", "segm", "keypoints"], scorer) == []


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_dry_scoring_says_what_cannot_be_scored(tmp_path: Path, scorer: Scorer) -> None:
    path = tmp_path / "truth.json"
    annotations = write_truth(path)
    for annotation in annotations:
        annotation["segmentation"] = []
    document = json.loads(path.read_text()) | {"annotations": annotations}
    path.write_text(json.dumps(document))
    assert dry_score(path, ["bbox"], scorer) == []
    with pytest.raises(ValueError, match="no object has a mask"):
        dry_score(path, ["bbox", "segm"], scorer)
