"""What COCO scoring reads of an annotation file, and nothing else, as one document for either scorer.

A file's other fields (`info`, dates, urls, `supercategory`, …) never reach a scorer, so their values cannot matter.
Ids are renumbered from 1 in their order: pycocotools takes annotation id 0 for "no match" and the last of two
annotations of one id for both, and hotcoco reads no negative id.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from pycocotools import mask as coco_mask

from trainers.contract.annotations import AnnotationFileError, read_annotations
from trainers.contract.targets import class_names

IouType = Literal["bbox", "segm", "keypoints"]
Entry = dict[str, Any]

MIN_POLYGON_NUMBERS = 6
"""Three points, as in detectron2's loader; pycocotools fails on an object that begins with fewer."""
MAX_COORDINATE = 1e6
"""Pixels: pycocotools walks along every edge of a polygon, and one of 1e9 or NaN pixels takes all memory."""


class ScoringInputError(ValueError):
    """Annotations or detections that no scorer can score."""


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """An annotation file as the scorers get it."""

    document: dict[str, list[Entry]]
    """COCO's lists `images`, `annotations` and `categories` with the fields that scoring needs, and ids from 1."""
    image_ids: dict[Any, int]
    """The document's id of each image of the file."""
    category_ids: dict[Any, int]
    """The same of each category, in their order."""
    class_names: dict[Any, str]
    """A different name for each category, by the file's id."""
    file_names: dict[Any, str]
    """File of each image, by the file's id; empty where it names none."""


def ground_truth(path: Path, iou_type: IouType) -> GroundTruth:
    """Reads an annotation file for scoring.

    Like pycocotools, it leaves out annotations of images or categories that the file does not list, and takes the last
    of two images or categories of one id. Beyond what pycocotools reads, a missing `iscrowd` is 0, as in detectron2's
    loader; a missing `area` is the mask's or else the box's, as in detectron2's `convert_to_coco_json`; a missing
    `num_keypoints` is counted, and an object without `keypoints` has none that is labelled; polygons of fewer than
    three points are left out of mask scoring, where an object without a usable mask counts as missed.

    Args:
        path: The annotation JSON.
        iou_type: What is scored; fields that only another type needs are not looked at, unless `area` is missing.

    Raises:
        OSError: The file cannot be read.
        ScoringInputError: It is not in COCO's format, an object has no box, or no object has a mask or keypoints.
    """
    try:
        content = read_annotations(path.read_bytes(), orjson.loads).document
    except AnnotationFileError as error:
        raise ScoringInputError(f"{path}: {error}") from error
    images, categories = _by_id(content, "images", path), _by_id(content, "categories", path)
    image_ids, category_ids = _numbered(images), _numbered(categories)
    scored = {key: {"id": number, **_size(images[key], iou_type, path)} for key, number in image_ids.items()}
    annotations: list[Entry] = []
    for index, entry in enumerate(_entries(content, "annotations", path)):
        try:
            image_id, category_id = entry["image_id"], entry["category_id"]
            if image_id in image_ids and category_id in category_ids:
                ids = {"image_id": image_ids[image_id], "category_id": category_ids[category_id]}
                fields = _fields(entry, scored[image_id], iou_type)
                annotations.append({"id": len(annotations) + 1, **ids, **fields})
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ScoringInputError(f"{path}: annotations[{index}] cannot be scored: {reason}") from error
    document = {
        "images": list(scored.values()),
        "annotations": annotations,
        "categories": [{"id": number, "name": str(number)} for number in category_ids.values()],
    }
    if iou_type == "segm":
        _complete_masks(document, path)
    elif iou_type == "keypoints":
        _complete_keypoints(annotations, path)
    names = class_names({key: str(categories[key].get("name", key)) for key in category_ids})
    files = {key: str(image.get("file_name", "")) for key, image in images.items()}
    return GroundTruth(document, image_ids, category_ids, names, files)


def _entries(content: Any, key: str, path: Path) -> list[Any]:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ScoringInputError(f"{path}: holds no list {key!r}")
    return entries


def _by_id(content: Any, key: str, path: Path) -> dict[Any, Entry]:
    try:
        return {entry["id"]: entry for entry in _entries(content, key, path)}
    except (KeyError, TypeError) as error:
        raise ScoringInputError(f"{path}: an entry of {key!r} has no usable id") from error


def _numbered(entries: dict[Any, Entry]) -> dict[Any, int]:
    """Numbers from 1 in the order of the ids, which decides between detections of equal score."""
    try:
        return {key: number for number, key in enumerate(sorted(entries), start=1)}
    except TypeError:  # texts and numbers, which pycocotools cannot sort
        return {key: number for number, key in enumerate(entries, start=1)}


def _size(image: Entry, iou_type: IouType, path: Path) -> Entry:
    """Height and width, which only masks need."""
    height, width = _number(image.get("height")), _number(image.get("width"))
    if height and width:
        return {"height": int(height), "width": int(width)}
    if iou_type == "segm":
        raise ScoringInputError(f"{path}: image {image['id']!r} has no height and width, which its masks need")
    return {}


def _fields(entry: Entry, image: Entry, iou_type: IouType) -> Entry:
    """The fields of an annotation that scoring needs; the mask is None where none can be used."""
    values: Entry = {"iscrowd": int(bool(_number(entry.get("iscrowd"))))}
    if iou_type == "segm":
        values["segmentation"] = _mask(entry.get("segmentation"))
    else:
        values["bbox"] = _box(entry)
    if iou_type == "keypoints":
        values["keypoints"] = keypoints = [float(value) for value in entry.get("keypoints") or ()]
        labelled = _number(entry.get("num_keypoints"))
        values["num_keypoints"] = sum(value > 0 for value in keypoints[2::3]) if labelled is None else int(labelled)
    area = None if isinstance(entry.get("area"), str) else _number(entry.get("area"))
    return values | {"area": _measured_area(entry, image) if area is None else area}


def _number(value: Any) -> float | None:
    """A finite number; None for what is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _box(entry: Entry) -> list[float]:
    box = [float(value) for value in entry["bbox"]]
    if len(box) != 4:
        raise ValueError(f"its bbox has {len(box)} numbers, not 4")
    if not all(map(math.isfinite, box)):
        raise ValueError(f"its bbox {box} is not finite")
    return box


def _mask(segmentation: Any) -> list[list[float]] | Entry | None:
    """Usable polygons, or compressed RLE; None where there is neither."""
    try:
        if isinstance(segmentation, dict):
            size, counts = [int(length) for length in segmentation["size"]], segmentation["counts"]
            if isinstance(counts, list):
                if sum(counts) != size[0] * size[1]:
                    return None
                return _compressed(size, counts)
            return {"size": size, "counts": counts} if isinstance(counts, str) else None
        return [polygon for part in segmentation if (polygon := _polygon(part))] or None
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        return None


def _compressed(size: list[int], counts: list[int]) -> Entry:
    rle = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)
    return {"size": size, "counts": rle["counts"].decode("ascii")}


def _polygon(part: Any) -> list[float] | None:
    numbers = np.asarray(part, dtype=np.float64)[: len(part) // 2 * 2]
    usable = numbers.ndim == 1 and len(numbers) >= MIN_POLYGON_NUMBERS and np.abs(numbers).max() < MAX_COORDINATE
    return numbers.tolist() if usable else None


def polygons_rle(polygons: list[list[float]], height: int, width: int) -> Entry:
    """The mask of an object of one or several polygons; counts are bytes."""
    rle: Entry = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return rle


def _measured_area(entry: Entry, image: Entry) -> float:
    mask = _mask(entry.get("segmentation"))
    if isinstance(mask, list):
        mask = polygons_rle(mask, image["height"], image["width"]) if "height" in image else None
    if mask is not None:
        return float(coco_mask.area(mask))
    _, _, width, height = _box(entry)
    return width * height


def _complete_masks(document: dict[str, list[Entry]], path: Path) -> None:
    """Gives objects without a usable mask an empty one, which no detection matches."""
    without = [annotation for annotation in document["annotations"] if annotation["segmentation"] is None]
    if without and len(without) == len(document["annotations"]):
        raise ScoringInputError(f"{path}: no object has a mask (segmentation)")
    for annotation in without:
        image = document["images"][annotation["image_id"] - 1]
        size = [image["height"], image["width"]]
        annotation["segmentation"] = _compressed(size, [size[0] * size[1]])


def _complete_keypoints(annotations: list[Entry], path: Path) -> None:
    """Gives objects without keypoints as many as the others have, none of them labelled."""
    if not annotations:
        return
    lengths = {len(annotation["keypoints"]) for annotation in annotations} - {0}
    if len(lengths) != 1 or (length := lengths.pop()) % 3:
        raise ScoringInputError(f"{path}: objects have no keypoints, or of differing number: {sorted(lengths)}")
    for annotation in annotations:
        if not annotation["keypoints"]:
            annotation |= {"keypoints": [0.0] * length, "num_keypoints": 0}
