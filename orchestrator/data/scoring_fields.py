"""Checks the fields of annotations that COCO's scorer reads: iscrowd, ignore, id, and area, also against the mask."""

from __future__ import annotations

import math
from collections.abc import Collection

import msgspec

from orchestrator.data.entries import Annotation, is_number, sample, shorten
from orchestrator.data.masks import check_mask, mask_area
from orchestrator.findings import FindingList

NOTHING = frozenset({"", "0", "0.0", "false", "no", "none", "null", "nan"})
"""What tools write, text or not, for a field that says nothing: pandas makes null or NaN of a missing one."""

MAX_AREA_RATIO = 1.5
AREA_TOLERANCE = 50.0
"""Pixels by which an area may differ whatever the ratio: tools count the pixels of small objects in several ways."""


def check_scoring_fields(entries: list[Annotation], file: str, findings: FindingList, *, for_scoring: bool) -> None:
    """Checks `iscrowd` and `ignore`, which detectron2 reads too, and what COCO's scorer needs of every annotation."""
    for entry in entries:
        crowd, place = entry.iscrowd, f"annotation {entry.id}"
        if crowd is msgspec.UNSET or (crowd is None and for_scoring):
            if for_scoring:
                what = "has no iscrowd, which pycocotools needs; it is scored as a single object"
                findings.warning("iscrowd_missing", file, place, what, 'Write "iscrowd": 0')
        elif type(crowd) not in (int, bool, float) or crowd not in (0, 1):
            what = f"its iscrowd is {shorten(crowd)}, not 0 or 1: detectron2 takes the object for a crowd"
            hint = 'Write "iscrowd": 0, or 1 for a group of objects that cannot be separated'
            findings.error("annotation_entry", file, place, what, hint, group=f"{file}: iscrowd")
        if entry.ignore != 0:
            shown = shorten(entry.ignore)
            what = f'its field "ignore" is {shown}: detectron2 refuses the file'
            is_empty = shown.strip("'\" ").lower() in NOTHING
            hint = "Take the field out, or write 0" if is_empty else 'Write "iscrowd": 1, or remove the annotation'
            findings.error("annotation_ignore", file, place, what, hint, group=f"{file}: {hint}")
    if for_scoring:
        _check_area_and_id(entries, file, findings)


def _check_area_and_id(entries: list[Annotation], file: str, findings: FindingList) -> None:
    hint = "Write the mask's area in pixels, or the box's: COCO's scorer sorts objects into sizes by it"
    for entry in entries:
        area, place = entry.area, f"annotation {entry.id}"
        if not is_number(area) or not math.isfinite(area):
            what = "has no area" if area is None else f"its area is {shorten(area)}"
            what += "; it is scored with that of its mask or box, pycocotools alone would end"
            findings.warning("area_missing", file, place, what, hint)
        elif area < 0:
            what = f"its area is {shorten(area)}: COCO's scorer never counts the object"
            findings.warning("area_negative", file, place, what, hint)
        if entry.id == 0:
            what = "has id 0, which means 'no match' to pycocotools: scored by it, the object could never be found"
            hint_0 = "Number annotations from 1, for other scorers; this program renumbers them before it scores"
            findings.warning("annotation_id_zero", file, place, what, hint_0)


def check_areas(entries: list[Annotation], excluded: Collection[int], file: str, findings: FindingList) -> None:
    """Compares areas with those of the masks, or of the boxes where there are none.

    `excluded` are indices of entries whose masks are wrong themselves.
    """
    looked_at = sample(len(entries))
    for index in looked_at:
        entry = entries[index]
        if index in excluded:
            continue
        if entry.iscrowd in (1, True) or not is_number(entry.area) or not 0 <= entry.area < math.inf:
            continue  # a crowd is never missed, whatever its size
        actual, thing = _actual_area(entry)
        if actual is None:
            continue
        small, large = sorted((float(entry.area), actual))
        # A box's area is the most that an object in it has, not the least.
        is_fine = large <= MAX_AREA_RATIO * small + AREA_TOLERANCE or (thing == "box" and entry.area < actual)
        if not is_fine:
            looked = f" (one annotation in {looked_at.step} is looked at)" if looked_at.step > 1 else ""
            what = f"its area is {shorten(entry.area)}, its {thing} covers {actual:,.0f} pixels{looked}"
            hint = "Write the mask's area in pixels: COCO's scorer sorts objects into small, medium and large by it"
            findings.warning("area_differs", file, f"annotation {entry.id}", what, hint)


def _actual_area(entry: Annotation) -> tuple[float | None, str]:
    checked = check_mask(entry.segmentation, (0, 0))
    if checked.problem is None and (area := mask_area(entry.segmentation)) is not None:
        return area, "mask"
    box = entry.bbox
    if type(box) is list and len(box) == 4 and all(map(is_number, box)) and all(map(math.isfinite, box)):
        return max(0.0, box[2]) * max(0.0, box[3]), "box"
    return None, ""
