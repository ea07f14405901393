"""Checks the annotations of a COCO file: ids, boxes, masks, and what detectron2 and COCO's scorer make of their flaws.

What detectron2 itself leaves out or cuts is a warning, with the number of objects; so is what COCO's scorer scores all
the same. What ends either, or changes a result unseen, is an error.

Values may be of any type. Each column is first reduced to the values of the right type and then checked as a whole:
COCO's 860,000 annotations take seconds, and no input ends in a traceback.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.duplicates import check_duplicates
from orchestrator.data.entries import (
    REGENERATE,
    Annotation,
    ImageEntry,
    Problem,
    SplitSummary,
    is_id,
    is_number,
    shorten,
)
from orchestrator.data.keypoints import check_keypoints
from orchestrator.data.mask_boxes import check_mask_boxes
from orchestrator.data.masks import MaskKind, check_mask
from orchestrator.data.scoring_fields import check_areas, check_scoring_fields
from orchestrator.findings import FindingList

EDGE_TOLERANCE = 2.0
"""Pixels a box may reach over the image's edge: COCO's own are rounded to hundredths, other tools' to whole pixels."""

SHARE_TOLERANCE = 0.01
"""By which shares of an image's width or height may leave 0 to 1: tools round position and size each for itself."""

MIN_NORMALISED = 0.9
"""Share of the boxes from which they are taken for shares of the image."""

MIN_CROWDS, MAX_CROWD_SHARE = 10, 0.1
"""Crowds from which they are many, and the share of the annotations that they may have: of COCO's, 1 % are crowds."""

CROWD_HINT = "Set iscrowd to 0 (CVAT and Datumaro write 1 for painted masks)"


def check_objects(
    entries: list[Annotation],
    images: list[ImageEntry],
    summary: SplitSummary,
    findings: FindingList,
    *,
    for_scoring: bool,
) -> None:
    """Checks all annotation entries against their images and categories, and counts them in `summary`.

    Args:
        entries: The annotations.
        images: The well-formed image entries.
        summary: Its categories are set.
        findings: Added to.
        for_scoring: Whether it is a validation set: COCO's scorer decides what a flaw is.
    """
    file = summary.annotations
    size_of = {image.id: (image.width, image.height) for image in images}
    known = np.array(sorted(size_of), dtype=np.int64)
    usable = _check_ids(entries, size_of, file, findings)
    image_ids = np.array([entry.image_id for entry in usable], dtype=np.int64)
    category_ids = np.array([entry.category_id for entry in usable], dtype=np.int64)
    _check_categories(usable, category_ids, summary, findings)

    crowd = np.array([entry.iscrowd in (1, True) for entry in usable], dtype=bool)
    summary.num_crowd = int(crowd.sum())
    check_scoring_fields(usable, file, findings, for_scoring=for_scoring)
    sizes = [size_of[image_id] for image_id in image_ids.tolist()]
    has_box, is_sound, are_normalised = _check_boxes(usable, sizes, file, findings, for_scoring=for_scoring)
    is_dropped = _check_masks(usable, crowd, sizes, summary, findings, for_scoring=for_scoring)
    check_keypoints(usable, crowd, summary, findings, for_scoring=for_scoring)
    check_duplicates(usable, has_box & ~crowd, file, findings, for_scoring=for_scoring)
    off_box = check_mask_boxes(usable, is_sound & ~crowd, sizes, file, findings, for_scoring=for_scoring)
    if for_scoring:
        check_areas(usable, range(len(usable)) if are_normalised else off_box, file, findings)
        is_used = ~crowd
    else:
        is_used = ~crowd & ~is_dropped
    summary.num_images_with_objects = len(np.unique(image_ids[is_used]))
    used_ids, counts = np.unique(category_ids[is_used & has_box], return_counts=True)
    summary.objects_of_category = dict(zip(used_ids.tolist(), counts.tolist(), strict=True))
    _check_use(summary, known, image_ids[crowd], image_ids[is_used], findings, for_scoring=for_scoring)


def _check_ids(entries: list[Annotation], known: Collection[int], file: str, findings: FindingList) -> list[Annotation]:
    """Checks that ids are integers and no annotation's comes twice; returns the usable ones of known images."""
    usable: list[Annotation] = []
    seen: set[int] = set()
    for index, entry in enumerate(entries):
        place = f"annotation {entry.id}" if is_id(entry.id) else f"annotations[{index}]"
        is_orphan = not isinstance(entry.image_id, list | dict | None) and entry.image_id not in known
        if not (is_id(entry.id) and is_id(entry.category_id) and (is_orphan or is_id(entry.image_id))):
            fields = {"id": entry.id, "image_id": entry.image_id, "category_id": entry.category_id}
            wrong = (
                f"its {key} is {shorten(value)}, not an integer" for key, value in fields.items() if not is_id(value)
            )
            findings.error("annotation_entry", file, place, ", ".join(wrong), REGENERATE)
            continue
        if entry.id in seen:
            hint = "Give each annotation a different id: detectron2 refuses a file in which one comes twice"
            findings.error("duplicate_annotation_id", file, place, "another annotation has this id", hint)
        seen.add(entry.id)
        if is_orphan:
            what = f"its image_id {shorten(entry.image_id)} is not an image of this file; detectron2 leaves it out"
            findings.warning("annotation_orphan", file, place, what, "Add the image, or remove the annotation")
        else:
            usable.append(entry)
    return usable


def _check_categories(
    entries: list[Annotation], category_ids: NDArray[np.int64], summary: SplitSummary, findings: FindingList
) -> None:
    categories = np.array(list(summary.categories), dtype=np.int64)
    span = f"{len(categories)} ids, {categories.min()} to {categories.max()}" if len(categories) else "it has none"
    for index in np.flatnonzero(~np.isin(category_ids, categories)).tolist():
        what = f"its category_id {category_ids[index]} is not a category of this file ({span})"
        place = f"annotation {entries[index].id}"
        findings.error("category_unknown", summary.annotations, place, what, "Correct it, or add the category")


def _check_boxes(
    entries: list[Annotation], sizes: list[tuple[int, int]], file: str, findings: FindingList, *, for_scoring: bool
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], bool]:
    """Checks the boxes.

    Returns of which of them something is left when detectron2 has cut them at the edge, which lie in an image of known
    size and have no finding, and whether they are in shares of the image.
    """
    good: list[int] = []
    for index, entry in enumerate(entries):
        box = entry.bbox
        if type(box) is list and len(box) == 4 and all(map(is_number, box)):
            good.append(index)
        else:
            what, hint = f"its bbox is {shorten(box)}, not four numbers", "Write [x, y, width, height] in pixels"
            findings.error("box_entry", file, f"annotation {entry.id}", what, hint)
    values = np.array([entries[index].bbox for index in good], dtype=np.float64).reshape(-1, 4)
    bounds = np.array([sizes[index] for index in good], dtype=np.float64).reshape(-1, 2)
    x, y, width, height = values.T
    in_image = bounds[:, 0] > 0
    finite = np.isfinite(x) & np.isfinite(y) & np.isfinite(width) & np.isfinite(height)
    with np.errstate(invalid="ignore", over="ignore"):
        over = np.maximum.reduce([-x, -y, x + width - bounds[:, 0], y + height - bounds[:, 1]])
        empty = finite & ((width <= 0) | (height <= 0))
        outside = in_image & ((x >= bounds[:, 0]) | (y >= bounds[:, 1]) | (x + width <= 0) | (y + height <= 0))
    beyond = finite & ~empty & in_image & (over > EDGE_TOLERANCE)

    def report(code: str, found: NDArray[np.bool_], what: str, hint: str) -> None:
        level = findings.error if code == "box_not_finite" and for_scoring else findings.warning
        for place in np.flatnonzero(found).tolist():
            index = good[place]
            shown = what.format(box=shorten(entries[index].bbox), size="{} x {}".format(*sizes[index]))
            level(code, file, f"annotation {entries[index].id}", shown, hint)

    effect = "COCO's scorer would match it with anything" if for_scoring else "detectron2 leaves such an object out"
    report("box_not_finite", ~finite, f"its bbox holds NaN or infinity: {{box}}; {effect}", REGENERATE)
    effect = "it can never be found" if for_scoring else "detectron2 leaves the object out"
    hint = "Remove it, or write width and height above 0; are these corners (x0, y0, x1, y1)?"
    report("box_empty", empty, f"its bbox {{box}} has no area (x, y, width, height); {effect}", hint)
    hint = "Cut it at the edge; are these corners (x0, y0, x1, y1), or for an image of another size?"
    effect = "it can hardly be found" if for_scoring else "detectron2 leaves the object out"
    report("box_outside", beyond & outside, f"its bbox {{box}} lies outside its {{size}} image; {effect}", hint)
    effect = "it is scored with the part outside" if for_scoring else "detectron2 cuts it at the edge"
    report("box_over_edge", beyond & ~outside, f"its bbox {{box}} reaches out of its {{size}} image; {effect}", hint)
    is_normalised = _check_units(values[finite & ~empty], file, findings)
    has_box, is_sound = np.zeros((2, len(entries)), dtype=bool)
    has_box[good] = finite & ~empty & ~outside
    is_sound[good] = finite & ~empty & ~beyond & in_image & (not is_normalised)
    return has_box, is_sound, is_normalised


def _check_units(boxes: NDArray[np.float64], file: str, findings: FindingList) -> bool:
    """Whether boxes are in shares of the image; a few of others among them, or rounding errors, change nothing."""
    start, size = boxes[:, :2], boxes[:, 2:]
    in_pixel = ((start >= -SHARE_TOLERANCE) & (size <= 1 + SHARE_TOLERANCE - start)).all(axis=1)
    is_normalised = len(boxes) > 0 and bool(in_pixel.mean() >= MIN_NORMALISED)
    if is_normalised:
        number = f"all {len(boxes):,}" if in_pixel.all() else f"{in_pixel.sum():,} of {len(boxes):,}"
        example = shorten(boxes[in_pixel][0].tolist())
        what = f"{number} boxes lie in the first pixel of their image, {example} for one"
        hint = "Write pixels: these look like shares of the image's width and height"
        findings.warning("box_normalised", file, "bbox", what, hint)
    return is_normalised


def _check_masks(
    entries: list[Annotation],
    crowd: NDArray[np.bool_],
    sizes: list[tuple[int, int]],
    summary: SplitSummary,
    findings: FindingList,
    *,
    for_scoring: bool,
) -> NDArray[np.bool_]:
    """Checks the masks; returns which objects detectron2 leaves out because no polygon of theirs is one."""
    ids: dict[MaskKind, list[int]] = {"polygons": [], "rle": [], "none": [], "unknown": []}
    is_dropped = np.zeros(len(entries), dtype=bool)
    for index, (entry, is_crowd, size) in enumerate(zip(entries, crowd.tolist(), sizes, strict=True)):
        checked = check_mask(entry.segmentation, size)
        is_dropped[index] = checked.drops_object
        if not is_crowd and (for_scoring or not checked.drops_object):
            ids[checked.kind].append(entry.id)
        if (problem := checked.problem) is None:
            continue
        report = findings.warning if checked.is_dropped else findings.error
        effect = _effect(problem, drops_object=checked.drops_object, for_scoring=for_scoring)
        what = f"{problem.what}; {effect}" if checked.is_dropped else problem.what
        report(problem.code, summary.annotations, f"annotation {entry.id}", what, problem.hint)
    summary.num_polygons = len(ids["polygons"])
    summary.num_rle, summary.first_rle = len(ids["rle"]), next(iter(ids["rle"]), None)
    summary.num_without_mask, summary.first_without_mask = len(ids["none"]), next(iter(ids["none"]), None)
    return is_dropped


def _effect(problem: Problem, *, drops_object: bool, for_scoring: bool) -> str:
    """What becomes of a polygon, or of an object all of whose polygons are such, that detectron2 leaves out."""
    if not for_scoring:
        return f"detectron2 leaves out the {'object' if drops_object else 'polygon'}"
    if problem.code == "polygon_odd":
        return "it is scored without its last number"
    return "the object counts as missed" if drops_object else "it is scored without it"


def _check_use(
    summary: SplitSummary,
    known: NDArray[np.int64],
    crowd_images: NDArray[np.int64],
    object_images: NDArray[np.int64],
    findings: FindingList,
    *,
    for_scoring: bool,
) -> None:
    """Checks that images and classes have objects that are used."""
    file = summary.annotations
    without = np.setdiff1d(known, object_images)
    only_crowd = np.intersect1d(without, crowd_images)
    if not summary.num_images_with_objects:
        if len(only_crowd):
            effect = "no AP could be computed" if for_scoring else "detectron2 would have nothing to train on"
            what = f"no image has an object that is not a crowd: {effect}"
            hint = f"{CROWD_HINT}, or add objects that are none"
            findings.error("crowd_only", file, f"image {only_crowd[0]}", what, hint)
        else:
            what = "no image has a usable object: every annotation has one of the other faults"
            findings.error("no_objects", file, "annotations", what, "Correct the annotations")
        return
    if summary.num_crowd >= MIN_CROWDS and summary.num_crowd > MAX_CROWD_SHARE * summary.num_annotations:
        effect = "they are not counted when missed" if for_scoring else "they are not trained on"
        what = f"{summary.num_crowd:,} of {summary.num_annotations:,} annotations are crowds: {effect}"
        hint = f"{CROWD_HINT}; nothing, if each is a group of objects that cannot be separated"
        findings.warning("crowd_many", file, "annotations", what, hint)
    if len(without) and not for_scoring:
        crowds = f", {len(only_crowd):,} of them crowds only" if len(only_crowd) else ""
        what = (
            f"{len(without):,} of {len(known):,} images have no object{crowds}; detectron2 leaves them out of training"
        )
        hint = "Nothing, if that is intended; DATALOADER.FILTER_EMPTY_ANNOTATIONS=false trains on all"
        findings.warning("images_without_objects", file, f"image {without[0]}", what, hint)
    empty = {key: name for key, name in summary.categories.items() if key not in summary.objects_of_category}
    if empty:
        shown = ", ".join(f"{key} {shorten(name)}" for key, name in list(empty.items())[:3])
        more = f" and {len(empty) - 3:,} more" if len(empty) > 3 else ""
        effect = "no AP of such a class is measured" if for_scoring else "no model can learn such a class"
        have = "has" if len(empty) == 1 else "have"
        what = f"{len(empty):,} of {len(summary.categories):,} categories {have} no object: {shown}{more}; {effect}"
        hint = "Remove the category (and lower NUM_CLASSES), or add objects; nothing, if that is intended"
        findings.warning("category_empty", file, "categories", what, hint)
