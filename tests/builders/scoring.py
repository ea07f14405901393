"""Annotations of small data sets to score against, detections of them, and their figures by either scorer."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from trainers.recipes import Scorer
from trainers.scoring import score
from trainers.scoring_input import IouType

Document = dict[str, Any]
Figures = dict[str, float | None]
SCORERS: tuple[Scorer, ...] = ("pycocotools", "hotcoco")
IOU_TYPES: tuple[IouType, ...] = ("bbox", "segm", "keypoints")

HEIGHT, WIDTH = 240, 320
CATEGORIES = (1, 3, 17, 90)  # with gaps, as COCO's
NUM_KEYPOINTS = 17


def ellipse(box: np.ndarray[Any, Any], corners: int = 12) -> list[float]:
    """A polygon in a box."""
    x, y, width, height = box
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([x + width / 2 * (1 + np.cos(angle)), y + height / 2 * (1 + np.sin(angle))], 1).ravel().tolist()


def random_box(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """A box in the image: x, y, width, height."""
    width, height = rng.uniform(5, 140, 2)
    return np.array([rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height), width, height])


def make_truth(num_images: int = 25, seed: int = 0) -> dict[str, Any]:
    """A document with crowds, keypoints, gapped ids and images without objects."""
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
    points = np.random.default_rng(seed + 1000)
    for annotation in annotations:
        keypoints = _keypoints(points, annotation["bbox"])
        keypoints[:, 2] = points.integers(0, 3, NUM_KEYPOINTS) * (points.random() < 0.8)
        annotation["keypoints"] = keypoints.ravel().tolist()
        annotation["num_keypoints"] = int((keypoints[:, 2] > 0).sum())
    categories = [{"id": category, "name": f"kind {category}"} for category in CATEGORIES]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_truth(path: Path, num_images: int = 25, seed: int = 0) -> list[dict[str, Any]]:
    """Writes `make_truth`'s document; returns its annotations."""
    document = make_truth(num_images, seed)
    path.write_text(json.dumps(document))
    annotations: list[dict[str, Any]] = document["annotations"]
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
                    "keypoints": _near(rng, annotation).ravel().tolist(),
                }
            )
    return found


def both(path: Path, document: Document, iou_type: IouType, found: list[dict[str, Any]] | None = None) -> Figures:
    """Writes a document; its figures, the same by both scorers, of FOUND or other detections."""
    found = FOUND if found is None else found
    path.write_text(json.dumps(document), encoding="utf-8")
    reference, native = (score(path, found, iou_type, scorer) for scorer in SCORERS)
    assert native == pytest.approx(reference, abs=1e-6)
    return reference


def raw(document: Document, iou_type: IouType, found: list[dict[str, Any]] | None = None) -> list[float]:
    """Figures of plain pycocotools, 0–100, as detectron2 calls it."""
    found = copy.deepcopy(FOUND if found is None else found)
    with redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(document)
        truth.createIndex()
        for detection in found:
            if iou_type == "segm":
                del detection["bbox"]
        evaluation = COCOeval(truth, truth.loadRes(found), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100.0 * value for value in evaluation.stats]


def changed(**lists: Callable[[dict[str, Any]], Any]) -> Document:
    """TRUTH with a function called on each entry of the named lists."""
    document = copy.deepcopy(TRUTH)
    for key, change in lists.items():
        for entry in document[key]:
            change(entry)
    return document


def some(change: Callable[[dict[str, Any]], Any]) -> Document:
    """TRUTH with every third object changed."""
    document = copy.deepcopy(TRUTH)
    for entry in document["annotations"][::3]:
        change(entry)
    return document


def _keypoints(rng: np.random.Generator, box: list[float]) -> np.ndarray[Any, Any]:
    x, y, width, height = box
    return np.stack([x + rng.random(NUM_KEYPOINTS) * width, y + rng.random(NUM_KEYPOINTS) * height, np.ones(17)], 1)


def _near(rng: np.random.Generator, annotation: dict[str, Any]) -> np.ndarray[Any, Any]:
    keypoints = np.array(annotation["keypoints"]).reshape(-1, 3) + rng.normal(
        0, rng.uniform(0.5, 6), (NUM_KEYPOINTS, 3)
    )
    keypoints[:, 2] = rng.random(NUM_KEYPOINTS)
    return keypoints


TRUTH = make_truth(num_images=8)
FOUND = detections_near(TRUTH["annotations"])
