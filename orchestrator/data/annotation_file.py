"""Parses a COCO annotation file and checks its lists, images and categories; `objects` checks its annotations."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import msgspec

from orchestrator.data.entries import REGENERATE, Annotation, ImageEntry, Problem, is_id, shorten
from orchestrator.data.objects import check_objects

if TYPE_CHECKING:
    from orchestrator.data.entries import SplitSummary
    from orchestrator.findings import FindingList


class _Document(msgspec.Struct):
    annotations: list[Annotation]
    images: Any = None
    categories: Any = None


def parse_annotations(content: bytes) -> tuple[Any, bool] | Problem:
    """Parses an annotation file; a Problem where it is not JSON, with the byte.

    Returns:
        What it holds, and whether that may include NaN or Infinity, which JSON does not have but Python reads.
    """
    again = "Copy or download it again"
    if not content.strip():
        return Problem("json_invalid", "the file is empty", again)
    try:
        document = msgspec.json.decode(content, type=_Document)
        return {key: getattr(document, key) for key in document.__struct_fields__}, False
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # Not JSON, or not a list of objects: Python's reader accepts more, and knows where it stopped.
    try:
        return json.loads(content), True
    except UnicodeDecodeError as error:
        return Problem("json_invalid", f"not UTF-8 text: byte {error.start:,} of {len(content):,}", again)
    except RecursionError:
        return Problem("json_invalid", "nested too deeply to be annotations", "Name another file")
    except ValueError as error:
        position, reason = getattr(error, "pos", 0), getattr(error, "msg", str(error))
        text = content.decode("utf-8", errors="replace")
        place = f"{reason} at byte {len(text[:position].encode()):,} of {len(content):,}"
        # Cut in the middle of a text, or with no more than the beginning of a number or a word left.
        rest = text[position:].strip()
        if reason.startswith("Unterminated string") or (len(rest) <= 8 and not rest.endswith(("}", "]"))):
            return Problem("json_truncated", f"the file ends in the middle: {place}", f"{again}: the end is missing")
        return Problem("json_invalid", f"not JSON: {place}", "Correct that place")


def check_annotations(
    document: Any, summary: SplitSummary, findings: FindingList, *, may_hold_nan: bool, for_scoring: bool
) -> list[ImageEntry]:
    """Checks a parsed annotation file, fills in the counts of `summary`, and returns the well-formed image entries.

    Args:
        document: What `parse_annotations` returned.
        summary: Its paths are set.
        findings: Added to.
        may_hold_nan: Whether numbers have to be checked for NaN and infinity.
        for_scoring: Whether it is a validation set, for which COCO's scorer needs more.
    """
    file = summary.annotations
    if not isinstance(document, dict):
        hint = 'COCO\'s format is {"images": […], "annotations": […], "categories": […]}'
        findings.error("json_structure", file, "", f"holds a {type(document).__name__}, not an object", hint)
        return []
    parts = {key: _entries(document, key, file, findings) for key in ("images", "annotations", "categories")}
    images = _check_images(parts["images"], file, findings)
    summary.num_images = len(parts["images"])
    summary.categories = _check_categories(parts["categories"], file, findings)
    if not parts["images"]:
        findings.error("split_empty", file, "", "lists no image", "Name a file that does")
    elif not parts["annotations"]:
        purpose = "nothing can be scored" if for_scoring else "nothing can be learned"
        findings.error("split_empty", file, "", f"lists no annotation: {purpose}", "Name a file that does")
    fields = Annotation.__struct_fields__
    annotations = [
        entry if isinstance(entry, Annotation) else Annotation(**{key: entry.get(key) for key in fields})
        for entry in parts["annotations"]
    ]
    summary.num_annotations = len(annotations)
    if annotations:
        check_objects(annotations, images, summary, findings, may_hold_nan=may_hold_nan, for_scoring=for_scoring)
    return images


def _entries(document: dict[str, Any], key: str, file: str, findings: FindingList) -> list[Any]:
    entries = document.get(key)
    if not isinstance(entries, list):
        found = "is missing" if entries is None else f"is a {type(entries).__name__}"
        findings.error("json_structure", file, key, f"the list {key!r} {found}", f'Write "{key}": [{{…}}, …]')
        return []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict | Annotation):
            what = f"entry {index} of {key!r} is a {type(entry).__name__}, not an object"
            findings.error("json_structure", file, f"{key}[{index}]", what, REGENERATE)
    return [entry for entry in entries if isinstance(entry, dict | Annotation)]


def _check_images(entries: list[dict[str, Any]], file: str, findings: FindingList) -> list[ImageEntry]:
    images: list[ImageEntry] = []
    for index, entry in enumerate(entries):
        image_id = entry.get("id")
        if not is_id(image_id):
            what = f"its id is {shorten(image_id)}, not an integer"
            findings.error("image_id", file, f"images[{index}]", what, REGENERATE)
            continue
        name, width, height = entry.get("file_name"), entry.get("width"), entry.get("height")
        if not isinstance(name, str) or not name:
            what = f"its file_name is {shorten(name)}"
            findings.error("image_entry", file, f"image {image_id}", what, REGENERATE)
        elif not (is_id(width) and is_id(height) and width > 0 and height > 0):
            what = f"its width and height are {shorten(width)} and {shorten(height)}, not numbers of pixels"
            findings.error("image_entry", file, f"image {image_id}", what, REGENERATE)
        else:
            images.append(ImageEntry(image_id, name, width, height))
    names: defaultdict[int, list[str]] = defaultdict(list)
    for image in images:
        names[image.id].append(image.file_name)
    for image_id, same in names.items():
        if len(same) > 1:
            what = f"{len(same)} images have this id: {shorten(same)}"
            findings.error("duplicate_image_id", file, f"image {image_id}", what, "Give each image a different id")
    if len({image.file_name for image in images}) < len(images):
        seen: dict[str, int] = {}
        for image in images:
            if image.file_name in seen:
                what = f"its file {shorten(image.file_name)} is image {seen[image.file_name]}'s too"
                hint = "Merge the two entries: each would be trained on or scored without the other's objects"
                findings.warning("duplicate_file_name", file, f"image {image.id}", what, hint)
            seen.setdefault(image.file_name, image.id)
    return images


def _check_categories(entries: list[dict[str, Any]], file: str, findings: FindingList) -> dict[int, str]:
    categories: dict[int, str] = {}
    for index, entry in enumerate(entries):
        category_id, name = entry.get("id"), entry.get("name")
        if not is_id(category_id) or not isinstance(name, str):
            what = f"its id is {shorten(category_id)} and its name {shorten(name)}, not an integer and a text"
            findings.error("category_entry", file, f"categories[{index}]", what, REGENERATE)
        elif category_id in categories:
            what = f"two categories have this id: {shorten(categories[category_id])} and {shorten(name)}"
            hint = "Give each category a different id"
            findings.error("duplicate_category_id", file, f"category {category_id}", what, hint)
        else:
            categories[category_id] = name
    if not entries:
        findings.error("split_empty", file, "categories", "lists no category", "Name a file that does")
    return dict(sorted(categories.items()))
