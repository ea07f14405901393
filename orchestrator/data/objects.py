"""Checks the annotations of a COCO file: ids, boxes, masks, and the fields that COCO's scorer reads.

Values may be of any type. Each column is first reduced to the values of the right type and then checked as a whole:
COCO's 860,000 annotations take seconds, and no input ends in a traceback.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.data.entries import REGENERATE, Annotation, is_id, is_number, shorten
from orchestrator.data.masks import MaskKind, check_mask

if TYPE_CHECKING:
    from orchestrator.data.entries import ImageEntry, SplitSummary
    from orchestrator.findings import FindingList

EDGE_TOLERANCE = 2.0
"""Pixels a box may reach over the image's edge: COCO's own are rounded to hundredths, other tools' to whole pixels."""


def check_objects(
    entries: list[Annotation],
    images: list[ImageEntry],
    summary: SplitSummary,
    findings: FindingList,
    *,
    may_hold_nan: bool,
    for_scoring: bool,
) -> None:
    """Checks all annotation entries against their images and categories, and counts them in `summary`."""
    file = summary.annotations
    usable: list[Annotation] = []
    for index, entry in enumerate(entries):
        if is_id(entry.id) and is_id(entry.image_id) and is_id(entry.category_id):
            usable.append(entry)
        else:
            fields = {"id": entry.id, "image_id": entry.image_id, "category_id": entry.category_id}
            wrong = (
                f"its {key} is {shorten(value)}, not an integer" for key, value in fields.items() if not is_id(value)
            )
            place = f"annotation {entry.id}" if is_id(entry.id) else f"annotations[{index}]"
            findings.error("annotation_entry", file, place, ", ".join(wrong), REGENERATE)
    ids = [entry.id for entry in usable]
    for annotation_id, times in Counter(ids).items():
        if times > 1:
            what = f"{times} annotations have this id"
            hint = "Give each annotation a different id: detectron2 and COCO's scorer treat two with one id as one"
            findings.error("duplicate_annotation_id", file, f"annotation {annotation_id}", what, hint)
    if for_scoring and 0 in ids:
        what = "has id 0, which means 'no match' to COCO's scorer (pycocotools): its object can never be found"
        findings.warning("annotation_id_zero", file, "annotation 0", what, "Number annotations from 1")

    image_ids = np.array([entry.image_id for entry in usable], dtype=np.int64)
    known = np.array(sorted({image.id for image in images}), dtype=np.int64)
    for index in np.flatnonzero(~np.isin(image_ids, known)).tolist():
        what = f"its image_id {image_ids[index]} is not an image of this file"
        hint = "Add the image, or remove the annotation"
        findings.error("annotation_orphan", file, f"annotation {ids[index]}", what, hint)
    category_ids = np.array([entry.category_id for entry in usable], dtype=np.int64)
    categories = np.array(list(summary.categories), dtype=np.int64)
    span = f"{len(categories)} ids, {categories.min()} to {categories.max()}" if len(categories) else "it has none"
    for index in np.flatnonzero(~np.isin(category_ids, categories)).tolist():
        what = f"its category_id {category_ids[index]} is not a category of this file ({span})"
        findings.error("category_unknown", file, f"annotation {ids[index]}", what, "Correct it, or add the category")

    crowd = np.array([entry.iscrowd in (1, True) for entry in usable], dtype=bool)
    summary.num_crowd = int(crowd.sum())
    _check_counting(usable, file, findings, for_scoring=for_scoring, may_hold_nan=may_hold_nan)
    size_of = {image.id: (image.width, image.height) for image in images}
    sizes = [size_of.get(image_id, (0, 0)) for image_id in image_ids.tolist()]
    _check_boxes(usable, sizes, file, findings)
    _check_masks(usable, crowd.tolist(), sizes, summary, findings, may_hold_nan=may_hold_nan)

    with_objects = np.unique(image_ids[~crowd])
    summary.num_images_with_objects = int(np.isin(known, with_objects).sum())
    only_crowd = np.setdiff1d(np.intersect1d(image_ids[crowd], known), with_objects)
    if len(only_crowd) and not summary.num_images_with_objects:
        what = "no image has an object that is not a crowd: detectron2 would have nothing to train on"
        findings.error("crowd_only", file, f"image {only_crowd[0]}", what, "Add objects with iscrowd 0")
    elif len(only_crowd):
        what = f"{len(only_crowd):,} of {len(known):,} images have crowds only; detectron2 leaves them out of training"
        findings.warning("crowd_only", file, f"image {only_crowd[0]}", what, "Nothing, if that is intended")


def _check_counting(
    entries: list[Annotation], file: str, findings: FindingList, *, for_scoring: bool, may_hold_nan: bool
) -> None:
    """Checks `iscrowd` and `area`, which COCO's scorer needs of every annotation."""
    report = findings.error if for_scoring else findings.warning
    for entry in entries:
        crowd, area = entry.iscrowd, entry.area
        if crowd not in (0, 1) or type(crowd) not in (int, bool):
            if crowd is not None:
                what = f"its iscrowd is {shorten(crowd)}, not 0 or 1"
                findings.error("annotation_entry", file, f"annotation {entry.id}", what, REGENERATE)
            elif for_scoring:
                hint = 'Write "iscrowd": 0'
                findings.error("iscrowd_missing", file, f"annotation {entry.id}", "has no iscrowd", hint)
        if not is_number(area) or (may_hold_nan and not math.isfinite(area)) or area < 0:
            what = "has no area" if area is None else f"its area is {shorten(area)}"
            hint = "Write the mask's area in pixels, or the box's: COCO's scorer sorts objects into sizes by it"
            report("area_missing", file, f"annotation {entry.id}", what, hint)


def _check_boxes(entries: list[Annotation], sizes: list[tuple[int, int]], file: str, findings: FindingList) -> None:
    good: list[tuple[Annotation, tuple[int, int]]] = []
    for entry, size in zip(entries, sizes, strict=True):
        box = entry.bbox
        if type(box) is list and len(box) == 4 and all(map(is_number, box)):
            good.append((entry, size))
        else:
            what, hint = f"its bbox is {shorten(box)}, not four numbers", "Write [x, y, width, height] in pixels"
            findings.error("box_entry", file, f"annotation {entry.id}", what, hint)
    values = np.array([entry.bbox for entry, _ in good], dtype=np.float64).reshape(-1, 4)
    x, y, width, height = values.T
    finite = np.isfinite(values).all(axis=1)
    for index in np.flatnonzero(~finite).tolist():
        entry, _ = good[index]
        what = f"its bbox holds NaN or infinity: {shorten(entry.bbox)}"
        findings.error("box_not_finite", file, f"annotation {entry.id}", what, REGENERATE)
    empty = finite & ((width <= 0) | (height <= 0))
    for index in np.flatnonzero(empty).tolist():
        entry, _ = good[index]
        what = f"its bbox {shorten(entry.bbox)} has no area (x, y, width, height)"
        hint = "Remove it, or write width and height above 0; are these corners (x0, y0, x1, y1)?"
        findings.error("box_empty", file, f"annotation {entry.id}", what, hint)
    bounds = np.array([size for _, size in good], dtype=np.float64).reshape(-1, 2)
    with np.errstate(invalid="ignore", over="ignore"):
        over = np.maximum.reduce([-x, -y, x + width - bounds[:, 0], y + height - bounds[:, 1]])
    beyond = finite & ~empty & (bounds[:, 0] > 0) & (over > EDGE_TOLERANCE)
    for index in np.flatnonzero(beyond).tolist():
        entry, (w, h) = good[index]
        what = f"its bbox {shorten(entry.bbox)} reaches out of its {w} x {h} image"
        hint = "Cut it at the edge; are these corners (x0, y0, x1, y1), or for an image of another size?"
        findings.error("box_outside", file, f"annotation {entry.id}", what, hint)


def _check_masks(
    entries: list[Annotation],
    crowd: list[bool],
    sizes: list[tuple[int, int]],
    summary: SplitSummary,
    findings: FindingList,
    *,
    may_hold_nan: bool,
) -> None:
    ids: dict[MaskKind, list[int]] = {"polygons": [], "rle": [], "none": [], "unknown": []}
    for entry, is_crowd, size in zip(entries, crowd, sizes, strict=True):
        kind, problem = check_mask(entry.segmentation, size, may_hold_nan=may_hold_nan)
        if problem is not None:
            findings.error(problem.code, summary.annotations, f"annotation {entry.id}", problem.what, problem.hint)
        if not is_crowd:
            ids[kind].append(entry.id)
    summary.num_polygons = len(ids["polygons"])
    summary.num_rle, summary.first_rle = len(ids["rle"]), next(iter(ids["rle"]), None)
    summary.num_without_mask, summary.first_without_mask = len(ids["none"]), next(iter(ids["none"]), None)
