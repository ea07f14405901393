"""Details of an evaluation that never was: curves, confusions and detections of made-up quality."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycocotools import mask as rle

from trainers.contract.evaluation_details import (
    DETAILS_FOLDER,
    NUM_POINTS,
    ClassCurve,
    Confusion,
    EvaluationDetails,
    ImageErrors,
)
from trainers.contract.plan import DatasetPlan


def made_curve(name: str, num_objects: int, quality: float) -> ClassCurve:
    """A curve that ends at the recall `quality` (0-1), with precision and scores falling along it."""
    points = round(quality * (NUM_POINTS - 1)) + 1 if num_objects and quality else 0
    along = [point / (NUM_POINTS - 1) for point in range(points)]
    return ClassCurve(
        name,
        num_objects,
        tuple(round(1 - 0.4 * x * x, 4) for x in along),
        tuple(round(0.99 - 0.9 * x, 4) for x in along),
    )


def made_details(
    val: DatasetPlan, iteration: int, quality: float, noise: random.Random, names: Sequence[str] = ()
) -> EvaluationDetails:
    """An evaluation of a generated data set, some of whose objects are found at some distance.

    Args:
        val: The data set.
        iteration: Of the evaluation.
        quality: 0 for a model that finds nothing, 1 for one that finds all.
        noise: What differs between classes and objects.
        names: Classes instead of the data set's own.
    """
    truth = json.loads(Path(val.annotations).read_text())
    classes = tuple(names) or tuple(each["name"] for each in truth["categories"])
    objects = [noise.randrange(5, 200) for _ in classes]
    reached = [min(1.0, max(0.0, quality * noise.uniform(0.4, 1.2))) for _ in classes]
    background = len(classes)
    counts = []
    for true, (number, share) in enumerate(zip(objects, reached, strict=True)):
        found = round(number * share)
        other = noise.randrange(len(classes))
        mistaken = (number - found) // 3 if other != true else 0
        counts += [(true, true, found), (true, other, mistaken)] if other != true else [(true, true, found)]
        counts += [(true, background, number - found - mistaken), (background, true, noise.randrange(9))]
    ids = sorted(image["id"] for image in truth["images"])
    files = {image["id"]: image["file_name"] for image in truth["images"]}
    worst = tuple(ImageErrors(image, files[image], 3 - at, 2) for at, image in enumerate(ids[-3:]))
    shown = {*ids[:3], *(image.image_id for image in worst)}
    return EvaluationDetails(
        iteration=iteration,
        classes=classes,
        curves={
            part: tuple(made_curve(*row) for row in zip(classes, objects, (factor * r for r in reached), strict=True))
            for part, factor in (("box", 1.0), ("mask", 0.9))
        },
        confusion=Confusion(0.5, 0.5, tuple(row for row in counts if row[2])),
        worst_images=worst,
        sample_ids=tuple(ids[:3]),
        detections=tuple(_detections(truth, shown, quality, noise)),
    )


def _detections(truth: dict[str, Any], shown: set[int], quality: float, noise: random.Random) -> list[dict[str, Any]]:
    """Annotated objects that are found, moved the more the worse the model is."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    found = []
    for annotation in [each for each in truth["annotations"] if each["image_id"] in shown]:
        if noise.random() > quality + 0.2:
            continue
        height, width = sizes[annotation["image_id"]]
        x, y = (noise.gauss(0, 14 * (1 - quality)) + 1 for _ in range(2))
        moved = [
            [value + (x, y)[place % 2] for place, value in enumerate(polygon)] for polygon in annotation["segmentation"]
        ]
        mask = rle.merge(rle.frPyObjects(moved, height, width))
        left, top, across, down = annotation["bbox"]
        found.append(
            {
                "image_id": annotation["image_id"], "category_id": annotation["category_id"],
                "score": round(min(0.99, 0.5 + quality / 2 * noise.random()), 2),
                "bbox": [left + x, top + y, across, down],
                "segmentation": {"size": [height, width], "counts": mask["counts"].decode()},
            }
        )  # fmt: skip
    return found


def leave_details(folder: Path, details: EvaluationDetails) -> dict[str, Any]:
    """Writes details into a trial's folder; returns the fields of the event that go with them."""
    name = f"{DETAILS_FOLDER}/{details.iteration:07d}.json"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(details.to_json())
    ap = {
        f"{part}_ap/{curve.name}": 100 * sum(curve.precision) / NUM_POINTS * 0.6 if curve.num_objects else None
        for part, curves in details.curves.items()
        for curve in curves
    }
    return {"details_file": name, "class_ap": ap}
