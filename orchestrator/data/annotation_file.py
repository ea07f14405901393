"""Parses a COCO annotation file and checks its lists, images and categories; `objects` checks its annotations."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import msgspec
import orjson

from orchestrator.data.entries import REGENERATE, Annotation, ImageEntry, SplitSummary, is_id, is_number, shorten
from orchestrator.data.objects import check_objects
from orchestrator.findings import FindingList
from trainers.contract.annotations import AnnotationFile, read_annotations, to_utf8


class _Document(msgspec.Struct):
    annotations: list[Annotation]
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]


def parse_annotations(content: bytes) -> AnnotationFile:
    """Reads an annotation file as the common reader does, in a fifth of the memory where no id needs a conversion.

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
            return AnnotationFile(document, 0, "")
        del parsed
    return read_annotations(text, orjson.loads)


def _has_integers(document: _Document) -> bool:
    """Whether all ids and sizes are integers already."""
    return (
        all(is_id(image.get(key)) for image in document.images for key in ("id", "width", "height"))
        and all(is_id(category.get("id")) for category in document.categories)
        and all(is_id(each.id) and is_id(each.image_id) and is_id(each.category_id) for each in document.annotations)
    )


def check_annotations(
    parsed: AnnotationFile, summary: SplitSummary, findings: FindingList, *, for_scoring: bool
) -> list[ImageEntry]:
    """Checks a parsed annotation file, fills in the counts of `summary`, and returns the well-formed image entries.

    Args:
        parsed: What `parse_annotations` returned.
        summary: Its paths are set.
        findings: Added to.
        for_scoring: Whether it is a validation set, for which COCO's scorer needs more.
    """
    file, document = summary.annotations, parsed.document
    if parsed.num_converted:
        what = f"{parsed.num_converted:,} ids or sizes, such as {parsed.example[:80]}"
        what += ", are text, decimals or among huge integers; read as integers"
        hint = "Nothing, for this program; other tools may refuse them, or sort them as text"
        findings.warning("ids_converted", file, "ids", what, hint)
    if not isinstance(document, dict):
        hint = 'COCO\'s format is {"images": […], "annotations": […], "categories": […]}'
        findings.error("json_structure", file, "", f"holds a {type(document).__name__}, not an object", hint)
        return []
    if (kind := _other_kind(document)) is not None:
        known = re.fullmatch(r"(?:panoptic|captions)_(.+)", Path(file).name)
        hint = f"Name the file of boxes and masks, in COCO's naming instances_{known[1] if known else '….json'}"
        findings.error("annotation_kind", file, "annotations", f"holds {kind}, not objects", hint)
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
        check_objects(annotations, images, summary, findings, for_scoring=for_scoring)
    return [image for image in images if image.width]


def _other_kind(document: dict[str, Any]) -> str | None:
    """What the entries of a file for another of COCO's tasks are; None for objects, whatever is wrong with them."""
    entries = document.get("annotations")
    if isinstance(entries, list) and entries and all(isinstance(each, dict) and "bbox" not in each for each in entries):
        for field, kind in {"segments_info": "panoptic segments", "caption": "captions"}.items():
            if all(field in each for each in entries):
                return kind
    return None


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
    """Returns the images that have an id; the width of one whose entry is wrong is 0."""
    images: list[ImageEntry] = []
    first_of_id: dict[int, ImageEntry] = {}
    first_of_name: dict[str, ImageEntry] = {}
    for index, entry in enumerate(entries):
        image_id, name, width, height = (entry.get(key) for key in ("id", "file_name", "width", "height"))
        place = f"image {image_id}" if is_id(image_id) else f"images[{index}]"
        if not is_id(image_id):
            findings.error("image_id", file, place, f"its id is {shorten(image_id)}, not an integer", REGENERATE)
            continue
        image = ImageEntry(image_id, "", 0, 0)
        if not isinstance(name, str) or not name:
            in_lvis = isinstance(entry.get("coco_url"), str)
            hint = "Write the last two parts of its coco_url, by which LVIS names images" if in_lvis else REGENERATE
            findings.error("image_entry", file, place, f"its file_name is {shorten(name)}", hint)
        elif not (is_id(width) and is_id(height) and width > 0 and height > 0):
            what = f"its width and height are {shorten(width)} and {shorten(height)}, not numbers of pixels"
            findings.error("image_entry", file, place, what, REGENERATE)
        else:
            image = ImageEntry(image_id, name, width, height)
            if (first := first_of_name.setdefault(posixpath.normpath(name), image)) is not image:
                what = f"its file {shorten(name)} is image {first.id}'s too"
                hint = "Merge the two entries: each would be trained on or scored without the other's objects"
                findings.warning("duplicate_file_name", file, place, what, hint)
        if (first := first_of_id.setdefault(image_id, image)) is not image:
            what = f"two images have this id: {shorten(first.file_name)} and {shorten(image.file_name)}"
            findings.error("duplicate_image_id", file, place, what, "Give each image a different id")
        images.append(image)
    return images


def _check_categories(entries: list[dict[str, Any]], file: str, findings: FindingList) -> dict[int, str]:
    categories: dict[int, str] = {}
    first_of_name: dict[str, int] = {}
    for index, entry in enumerate(entries):
        category_id, name = entry.get("id"), entry.get("name")
        is_text = is_number(name) or (isinstance(name, str) and name == name.encode(errors="ignore").decode())
        text = str(name) if is_text else ""
        if not is_id(category_id) or not is_text:
            what = f"its id is {shorten(category_id)} and its name {shorten(name)}, not an integer and a text"
            findings.error("category_entry", file, f"categories[{index}]", what, REGENERATE)
        if not is_id(category_id):
            continue
        place = f"category {category_id}"
        if category_id in categories:
            what = f"two categories have this id: {shorten(categories[category_id])} and {shorten(name)}"
            findings.error("duplicate_category_id", file, place, what, "Give each category a different id")
            continue
        categories[category_id] = text
        if is_text and (first := first_of_name.setdefault(text.strip().casefold(), category_id)) != category_id:
            what = f"the categories {first} and {category_id} have the same name, {shorten(name)}"
            hint = "Merge them, or rename one: the model learns to tell them apart, and their AP goes by one name"
            findings.warning("category_name", file, place, what, hint)
    if not entries:
        findings.error("split_empty", file, "categories", "lists no category", "Name a file that does")
    return dict(sorted(categories.items()))
