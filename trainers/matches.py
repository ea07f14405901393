"""Matches detections with annotated objects by their boxes: which class was taken for which, and on which images."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from trainers.contract.evaluation_details import MIN_SCORE, Confusion, ImageErrors
from trainers.scoring_input import ground_truth

MIN_IOU = 0.5
"""Least overlap of two boxes that match."""

NUM_WORST = 6
"""Images with the most errors that are named."""


@dataclass(frozen=True, slots=True)
class ImageObjects:
    """N annotated objects of one image."""

    boxes: NDArray[np.float64]
    """(N, 4): x, y, width, height in pixels."""
    classes: NDArray[np.int64]
    """(N,): numbers from 0, in the order of the category ids."""
    crowds: NDArray[np.bool_]
    """(N,): whether it is a crowd region, in which detections count for nothing."""


NO_OBJECTS = ImageObjects(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, np.bool_))


@dataclass(frozen=True, slots=True)
class Objects:
    """The objects of an annotation file; ids are the file's."""

    by_image: dict[Any, ImageObjects]
    """Of the images that have any."""
    file_names: dict[Any, str]
    """Of all images, in the file's order."""
    class_numbers: dict[Any, int]
    """Number from 0 of each category."""
    class_names: tuple[str, ...]
    """Of the classes, by their numbers."""


@dataclass(frozen=True, slots=True)
class Matches:
    """Confusions of detections of one score or more, and the images with the most errors."""

    confusion: Confusion
    worst_images: tuple[ImageErrors, ...]


def read_objects(annotations: str | Path) -> Objects:
    """The objects of an annotation file, as boxes are scored on them; read once while the file stays the same.

    Raises:
        OSError: The file cannot be read.
        ScoringInputError: It cannot be scored.
    """
    path = Path(annotations).absolute()
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _read(path: Path, size: int, mtime_ns: int) -> Objects:  # noqa: ARG001 - they are in the key of the cache alone
    truth = ground_truth(path, "bbox")
    image_ids = {number: key for key, number in truth.image_ids.items()}
    entries = defaultdict(list)
    for entry in truth.document["annotations"]:
        entries[image_ids[entry["image_id"]]].append(entry)
    by_image = {
        image_id: ImageObjects(
            np.array([each["bbox"] for each in found], dtype=np.float64),
            np.array([each["category_id"] - 1 for each in found], dtype=np.int64),
            np.array([each["iscrowd"] for each in found], dtype=np.bool_),
        )
        for image_id, found in entries.items()
    }
    numbers = {key: number - 1 for key, number in truth.category_ids.items()}
    return Objects(by_image, truth.file_names, numbers, tuple(truth.class_names[key] for key in numbers))


def match(
    objects: Objects, detections: Iterable[Mapping[str, Any]], min_score: float = MIN_SCORE, min_iou: float = MIN_IOU
) -> Matches:
    """Matches detections with objects as `Confusion` describes; categories that the file does not list are left out.

    Args:
        objects: What there is to find.
        detections: In COCO's result format.
        min_score: Detections below it are not counted.
        min_iou: Least overlap of the boxes.
    """
    found: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for detection in detections:
        if detection["score"] >= min_score and detection["category_id"] in objects.class_numbers:
            found[detection["image_id"]].append(detection)
    background = len(objects.class_names)
    counts: Counter[tuple[int, int]] = Counter()
    images = []
    for image_id, file_name in objects.file_names.items():
        each = sorted(found.get(image_id, ()), key=lambda detection: -detection["score"])
        boxes = np.array([detection["bbox"] for detection in each], dtype=np.float64).reshape(-1, 4)
        classes = np.array([objects.class_numbers[detection["category_id"]] for detection in each], dtype=np.int64)
        annotated = objects.by_image.get(image_id, NO_OBJECTS)
        pairs = Counter(match_image(annotated, boxes, classes, background, min_iou))
        counts += pairs
        missed = sum(number for (_, detected), number in pairs.items() if detected == background)
        false = sum(number for (true, detected), number in pairs.items() if detected not in (true, background))
        if missed or false:
            images.append(ImageErrors(image_id, file_name, missed, false))
    images.sort(key=lambda image: -(image.missed + image.false))
    confusions = tuple((true, detected, number) for (true, detected), number in sorted(counts.items()))
    return Matches(Confusion(min_iou, min_score, confusions), tuple(images[:NUM_WORST]))


def match_image(
    objects: ImageObjects, boxes: NDArray[np.float64], classes: NDArray[np.int64], background: int, min_iou: float
) -> Iterator[tuple[int, int]]:
    """True and detected class of everything on one image.

    Args:
        objects: What there is to find.
        boxes: Of M detections, those of the best scores first: (M, 4), x, y, width, height in pixels.
        classes: Of the detections, (M,).
        background: Class that stands for no object and no detection.
        min_iou: Least overlap of two boxes that match.
    """
    free = ~objects.crowds
    left: Sequence[int] = range(len(boxes))
    if len(boxes) and len(objects.boxes):
        ious: NDArray[np.float64] = coco_mask.iou(boxes, objects.boxes, objects.crowds.astype(np.uint8))
        same = classes[:, None] == objects.classes[None]
        in_crowd = ((ious >= min_iou) & same & objects.crowds).any(axis=1)
        for candidates in (np.where(same, ious, 0.0), ious):
            unmatched = []
            for number in left:
                overlaps = np.where(free, candidates[number], 0.0)
                best = int(overlaps.argmax())
                if overlaps[best] >= min_iou:
                    free[best] = False
                    yield int(objects.classes[best]), int(classes[number])
                elif not in_crowd[number]:
                    unmatched.append(number)
            left = unmatched
    for number in left:
        yield background, int(classes[number])
    for missed in objects.classes[free]:
        yield int(missed), background
