"""COCO's twelve figures: the native scorer gives what pycocotools gives, and both what detectron2 would."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from trainers.scoring import FIGURES, score

if TYPE_CHECKING:
    from pathlib import Path

    from trainers.recipes import Scorer
    from trainers.scoring import IouType

HEIGHT, WIDTH = 240, 320
CATEGORIES = (1, 3, 17, 90)  # with gaps, as COCO's
SCORERS: tuple[Scorer, ...] = ("pycocotools", "hotcoco")
IOU_TYPES: tuple[IouType, ...] = ("bbox", "segm")


def ellipse(box: np.ndarray[Any, Any], corners: int = 12) -> list[float]:
    x, y, width, height = box
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([x + width / 2 * (1 + np.cos(angle)), y + height / 2 * (1 + np.sin(angle))], 1).ravel().tolist()


def random_box(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    width, height = rng.uniform(5, 140, 2)
    return np.array([rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height), width, height])


def write_truth(path: Path, num_images: int = 25, seed: int = 0) -> list[dict[str, Any]]:
    """Writes annotations with crowds, gapped ids and images without any; returns the annotations."""
    rng = np.random.default_rng(seed)
    images = [{"id": 7 * i + 1, "height": HEIGHT, "width": WIDTH, "file_name": f"{i}.jpg"} for i in range(num_images)]
    annotations: list[dict[str, Any]] = []
    for image in images[:-2]:
        for _ in range(rng.integers(1, 8)):
            box = random_box(rng)
            polygon = [ellipse(box)]
            rle = coco_mask.merge(coco_mask.frPyObjects(polygon, HEIGHT, WIDTH))
            crowd = bool(rng.random() < 0.15)
            counts = {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": int(rng.choice(CATEGORIES[:3])),
                    "bbox": box.tolist(),
                    "area": float(coco_mask.area(rle)),
                    "iscrowd": int(crowd),
                    "segmentation": counts if crowd else polygon,
                }
            )
    categories = [{"id": category, "name": f"kind {category}"} for category in CATEGORIES]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return annotations


def detections_near(annotations: list[dict[str, Any]], seed: int = 1) -> list[dict[str, Any]]:
    """Detections around the annotations, some of them wrong, with many equal scores."""
    rng = np.random.default_rng(seed)
    found = []
    for annotation in annotations:
        for _ in range(rng.integers(0, 5)):
            box = np.clip(np.array(annotation["bbox"]) + rng.normal(0, 4, 4), [0, 0, 2, 2], [WIDTH, HEIGHT, 200, 200])
            rle = coco_mask.merge(coco_mask.frPyObjects([ellipse(box)], HEIGHT, WIDTH))
            same = rng.random() < 0.8
            found.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": annotation["category_id"] if same else int(rng.choice(CATEGORIES)),
                    "bbox": box.tolist(),
                    "score": round(float(rng.random()), 1),
                    "segmentation": {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()},
                }
            )
    return found


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
@pytest.mark.parametrize(("iou_type", "task"), [("bbox", "bbox"), ("segm", "segm")])
def test_the_figures_are_those_of_detectron2s_evaluator(
    tmp_path: Path, scorer: Scorer, iou_type: IouType, task: str
) -> None:
    from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
    from pycocotools.coco import COCO

    path = tmp_path / "truth.json"
    found = detections_near(write_truth(path))
    copies = json.loads(json.dumps(found))
    theirs = _evaluate_predictions_on_coco(COCO(str(path)), copies, task).stats * 100
    ours = score(path, found, iou_type, scorer)
    assert [ours[name] for name in FIGURES] == pytest.approx(theirs.tolist(), abs=1e-6)


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
