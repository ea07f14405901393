"""Parses a COCO annotation file and checks its lists, images and categories; `objects` checks its annotations."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from orchestrator.data.entries import REGENERATE, Annotation, ImageEntry, is_id, shorten
from orchestrator.data.objects import check_objects
from trainers.contract.annotations import AnnotationFile, read_annotations, to_utf8

if TYPE_CHECKING:
    from orchestrator.data.entries import SplitSummary
    from orchestrator.findings import FindingList


class _Document(msgspec.Struct):
    annotations: list[Annotation]
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]


def parse_annotations(content: bytes) -> tuple[AnnotationFile, bool]:
    """Reads an annotation file as the common reader does, in a fifth of the memory where no id needs a conversion.

    Returns:
        What it holds, and whether that may include NaN or Infinity, which JSON does not have but Python reads.

    Raises:
        AnnotationFileError: It is not JSON.
    """
    text = to_utf8(content)
    try:
        parsed = msgspec.json.decode(text, type=_Document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # Not JSON, or not lists of objects: Python's reader accepts more, and knows where it stopped.
    else:
        if _has_integers(parsed):
            document = {key: getattr(parsed, key) for key in parsed.__struct_fields__}
            return AnnotationFile(document, 0, ""), False
        del parsed
    return read_annotations(text, orjson.loads), True


def _has_integers(document: _Document) -> bool:
    """Whether all ids and sizes are integers already."""
    return (
        all(type(image.get(key)) is int for image in document.images for key in ("id", "width", "height"))
        and all(type(category.get("id")) is int for category in document.categories)
        and all(
            type(each.id) is int and type(each.image_id) is int and type(each.category_id) is int
            for each in document.annotations
        )
    )


def check_annotations(
    parsed: AnnotationFile, summary: SplitSummary, findings: FindingList, *, may_hold_nan: bool, for_scoring: bool
) -> list[ImageEntry]:
    """Checks a parsed annotation file, fills in the counts of `summary`, and returns the well-formed image entries.

    Args:
        parsed: What `parse_annotations` returned.
        summary: Its paths are set.
        findings: Added to.
        may_hold_nan: Whether numbers have to be checked for NaN and infinity.
        for_scoring: Whether it is a validation set, for which COCO's scorer needs more.
    """
    file, document = summary.annotations, parsed.document
    if parsed.num_converted:
        what = f"{parsed.num_converted:,} ids or sizes are text or decimals, such as {parsed.example}; read as integers"
        hint = "Nothing, for this program; other tools may refuse them, or sort them as text"
        findings.warning("ids_converted", file, "ids", what, hint)
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
        findings.error("split_empty", file, "annotations", f"lists no annotation: {purpose}", "Name a file that does")
    fields = Annotation.__struct_fields__
    annotations = [
        entry if isinstance(entry, Annotation) else Annotation(**{key: entry[key] for key in fields if key in entry})
        for entry in parts["annotations"]
    ]
    summary.num_annotations = len(annotations)
    if annotations:
        check_objects(annotations, images, summary, findings, may_hold_nan=may_hold_nan, for_scoring=for_scoring)
    return images


def _entries(document: dict[str, Any], key: str, file: str, findings: FindingList) -> list[Any]:
    entries = document.get(key)
    if entries is None and key == "annotations":
        return []  # as good as an empty list, which is reported where it matters
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
    by_name: defaultdict[str, list[int]] = defaultdict(list)
    for category_id, name in categories.items():
        by_name[name.strip().casefold()].append(category_id)
    for same in by_name.values():
        if len(same) > 1:
            what = f"the categories {', '.join(map(str, same))} have the same name, {shorten(categories[same[0]])}"
            hint = "Merge them, or rename one: the model learns to tell them apart, and their AP goes by one name"
            findings.warning("category_name", file, f"category {same[1]}", what, hint)
    if not entries:
        findings.error("split_empty", file, "categories", "lists no category", "Name a file that does")
    return dict(sorted(categories.items()))
