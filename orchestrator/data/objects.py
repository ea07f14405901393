"""Checks the annotations of a COCO file: ids, boxes, masks, and what COCO's scorer reads of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec

from orchestrator.data.rle import check_rle
from orchestrator.data.values import (
    MAX_ID,
    REGENERATE,
    Annotation,
    ImageEntry,
    SplitSummary,
    find_duplicates,
    is_id,
    is_number,
    shorten,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from orchestrator.findings import FindingList

    Integers = npt.NDArray[np.int64]

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
    import numpy as np

    file = summary.annotations
    usable: list[Annotation] = []
    for index, entry in enumerate(entries):
        if is_id(entry.id) and is_id(entry.image_id) and is_id(entry.category_id):
            usable.append(entry)
        else:
            wrong = {
                key: getattr(entry, key) for key in ("id", "image_id", "category_id") if not is_id(getattr(entry, key))
            }
            place = f"annotation {entry.id}" if is_id(entry.id) else f"annotations[{index}]"
            what = ", ".join(f"its {key} is {shorten(value)}, not an integer" for key, value in wrong.items())
            findings.error("annotation_entry", file, place, what, REGENERATE)
    ids = np.array([entry.id for entry in usable], dtype=np.int64)
    for annotation_id in find_duplicates(ids.tolist()):
        what = f"{int((ids == annotation_id).sum())} annotations have this id"
        hint = "Number the annotations anew: detectron2 and COCO's scorer take two with one id for one"
        findings.error("duplicate_annotation_id", file, f"annotation {annotation_id}", what, hint)
    if for_scoring and (ids == 0).any():
        what = "has id 0, which COCO's scorer (pycocotools) takes for 'no match': its object can never be found"
        findings.warning("annotation_id_zero", file, "annotation 0", what, "Number annotations from 1")

    image_ids = np.array([entry.image_id for entry in usable], dtype=np.int64)
    known = np.array(sorted({image.id for image in images}), dtype=np.int64)
    for index in np.flatnonzero(~np.isin(image_ids, known)).tolist():
        what = f"its image_id {image_ids[index]} is no image of this file"
        findings.error("annotation_orphan", file, f"annotation {ids[index]}", what, "Add the image, or take it out")
    category_ids = np.array([entry.category_id for entry in usable], dtype=np.int64)
    categories = np.array(list(summary.categories), dtype=np.int64)
    for index in np.flatnonzero(~np.isin(category_ids, categories)).tolist():
        what = f"its category_id {category_ids[index]} is no category of this file ({_span(summary.categories)})"
        findings.error("category_unknown", file, f"annotation {ids[index]}", what, "Correct it, or add the category")

    crowd = np.array([entry.iscrowd in (1, True) for entry in usable], dtype=bool)
    summary.num_crowd = int(crowd.sum())
    _check_counting(usable, ids, file, findings, for_scoring=for_scoring, may_hold_nan=may_hold_nan)
    size_of = {image.id: (image.width, image.height) for image in images}
    sizes = [size_of.get(image_id, (0, 0)) for image_id in image_ids.tolist()]
    _check_boxes(usable, ids, sizes, file, findings)
    _check_masks(usable, ids.tolist(), crowd.tolist(), sizes, summary, findings, may_hold_nan=may_hold_nan)

    with_objects = np.unique(image_ids[~crowd])
    summary.num_images_with_objects = int(np.isin(known, with_objects).sum())
    only_crowd = np.setdiff1d(np.intersect1d(image_ids[crowd], known), with_objects)
    if len(only_crowd) and not summary.num_images_with_objects:
        what = "no image has an object that is not a crowd: detectron2 would have nothing to train on"
        findings.error("crowd_only", file, f"image {only_crowd[0]}", what, "Add objects with iscrowd 0")
    elif len(only_crowd):
        what = f"{len(only_crowd):,} of {len(known):,} images have crowds only; detectron2 leaves them out of training"
        findings.warning("crowd_only", file, f"image {only_crowd[0]}", what, "Nothing, if that is meant")


def _check_counting(
    entries: list[Annotation],
    ids: Integers,
    file: str,
    findings: FindingList,
    *,
    for_scoring: bool,
    may_hold_nan: bool,
) -> None:
    """Checks `iscrowd` and `area`, which COCO's scorer reads of every annotation."""
    report = findings.error if for_scoring else findings.warning
    for index, entry in enumerate(entries):
        crowd, area = entry.iscrowd, entry.area
        if crowd not in (0, 1) or type(crowd) not in (int, bool):
            if crowd is not None:
                what = f"its iscrowd is {shorten(crowd)}, not 0 or 1"
                findings.error("annotation_entry", file, f"annotation {ids[index]}", what, REGENERATE)
            elif for_scoring:
                hint = 'Write "iscrowd": 0'
                findings.error("iscrowd_missing", file, f"annotation {ids[index]}", "has no iscrowd", hint)
        if not is_number(area) or (may_hold_nan and not math.isfinite(area)) or area < 0:
            what = "has no area" if area is None else f"its area is {shorten(area)}"
            hint = "Write the mask's area in pixels, or the box's: COCO's scorer sorts objects into sizes by it"
            report("area_missing", file, f"annotation {ids[index]}", what, hint)


def _check_boxes(
    entries: list[Annotation], ids: Integers, sizes: list[tuple[int, int]], file: str, findings: FindingList
) -> None:
    import numpy as np

    boxes = [entry.bbox for entry in entries]
    good = [type(box) is list and len(box) == 4 and all(map(is_number, box)) for box in boxes]
    for index, fine in enumerate(good):
        if not fine:
            what = f"its bbox is {shorten(boxes[index])}, not four numbers"
            findings.error("box_entry", file, f"annotation {ids[index]}", what, "Write [x, y, width, height] in pixels")
    kept = np.flatnonzero(np.array(good, dtype=bool))
    values = np.array([boxes[index] for index in kept.tolist()], dtype=np.float64).reshape(-1, 4)
    x, y, width, height = values.T
    finite = np.isfinite(values).all(axis=1)
    for index in np.flatnonzero(~finite).tolist():
        what = f"its bbox holds NaN or infinity: {shorten(boxes[kept[index]])}"
        findings.error("box_not_finite", file, f"annotation {ids[kept[index]]}", what, REGENERATE)
    empty = finite & ((width <= 0) | (height <= 0))
    for index in np.flatnonzero(empty).tolist():
        what = f"its bbox {shorten(boxes[kept[index]])} has no area (x, y, width, height)"
        hint = "Take it out, or write width and height above 0; are these corners (x0, y0, x1, y1)?"
        findings.error("box_empty", file, f"annotation {ids[kept[index]]}", what, hint)
    bounds = np.array([sizes[index] for index in kept.tolist()], dtype=np.float64).reshape(-1, 2)
    with np.errstate(invalid="ignore", over="ignore"):
        over = np.maximum.reduce([-x, -y, x + width - bounds[:, 0], y + height - bounds[:, 1]])
    beyond = finite & ~empty & (bounds[:, 0] > 0) & (over > EDGE_TOLERANCE)
    for index in np.flatnonzero(beyond).tolist():
        w, h = sizes[kept[index]]
        what = f"its bbox {shorten(boxes[kept[index]])} reaches out of its {w} x {h} image"
        hint = "Cut it at the edge; are these corners (x0, y0, x1, y1), or for an image of another size?"
        findings.error("box_outside", file, f"annotation {ids[kept[index]]}", what, hint)


def _check_masks(
    entries: list[Annotation],
    ids: list[int],
    crowd: list[bool],
    sizes: list[tuple[int, int]],
    summary: SplitSummary,
    findings: FindingList,
    *,
    may_hold_nan: bool,
) -> None:
    file = summary.annotations
    for index, entry in enumerate(entries):
        mask: Any = entry.segmentation
        if type(mask) is msgspec.Raw:
            raw = bytes(mask)
            if _are_fine_polygons(raw):
                summary.num_polygons += not crowd[index]
                continue
            mask = msgspec.json.decode(raw)
        if type(mask) is list and mask:
            problem = _polygon_problem(mask, may_hold_nan=may_hold_nan)
            if problem:
                findings.error(problem[0], file, f"annotation {ids[index]}", problem[1], problem[2])
            summary.num_polygons += not crowd[index]
        elif type(mask) is dict:
            reason = check_rle(mask, sizes[index])
            if reason:
                hint = 'Write {"size": [height, width], "counts": …} as pycocotools encodes it'
                findings.error("rle_invalid", file, f"annotation {ids[index]}", reason, hint)
            if not crowd[index]:
                summary.num_rle += 1
                summary.first_rle = ids[index] if summary.first_rle is None else summary.first_rle
        elif mask is None or mask == []:
            if not crowd[index]:
                summary.num_without_mask += 1
                if summary.first_without_mask is None:
                    summary.first_without_mask = ids[index]
        else:
            what = f"its segmentation is {shorten(mask)}: neither a list of polygons nor RLE"
            findings.error("mask_entry", file, f"annotation {ids[index]}", what, REGENERATE)


def _are_fine_polygons(raw: bytes) -> bool:
    """Tells, without making a number of it, whether valid JSON is a list of polygons that nothing is wrong with."""
    if raw[:2] != b"[[" or raw[-2:] != b"]]" or b"e" in raw or b"E" in raw:
        return False
    for polygon in raw[2:-2].translate(None, b" \n\r\t").split(b"],["):
        num_values = polygon.count(b",") + 1
        if num_values < 6 or num_values % 2 or polygon.translate(None, b"0123456789.,-"):
            return False
    return True


def _polygon_problem(polygons: list[Any], *, may_hold_nan: bool) -> tuple[str, str, str] | None:
    for number, polygon in enumerate(polygons):
        if type(polygon) is not list:
            flat = " (one polygon is [[x0, y0, …]], a list in a list)" if is_number(polygon) else ""
            return "polygon_entry", f"polygon {number} is {shorten(polygon)}, not a list{flat}", REGENERATE
        if not set(map(type, polygon)) <= {int, float}:
            return "polygon_entry", f"polygon {number} holds something that is not a number", REGENERATE
        if len(polygon) < 6:
            what = f"polygon {number} has {len(polygon)} numbers: three corners take 6"
            return "polygon_short", what, "Take the polygon out, or the whole annotation if it is the only one"
        if len(polygon) % 2:
            what = f"polygon {number} has an odd number of coordinates ({len(polygon)})"
            return "polygon_odd", what, "Write x and y of every corner"
        if may_hold_nan and not all(-MAX_ID < value < MAX_ID for value in polygon):
            return "polygon_not_finite", f"polygon {number} holds NaN, infinity or a huge number", REGENERATE
    return None


def _span(categories: dict[int, str]) -> str:
    if not categories:
        return "it has none"
    return f"{len(categories)} ids, {min(categories)} to {max(categories)}"
