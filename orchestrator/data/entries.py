"""The entries of a COCO file, whose values may be of any type: what counts as an id or a number, how one is shown."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

import msgspec

from trainers.contract.annotations import MAX_ID

REGENERATE = "Correct the entry, or remove it and write the file again"


NULL = msgspec.Raw(b"null")
"""What a field holds that is missing, of those that are left as bytes."""


MAX_SAMPLED = 10_000
"""Annotations whose masks are measured, evenly spaced in the file: half a second."""


class Annotation(msgspec.Struct, gc=False):
    """An annotation as it is in the file: any field may be of any type, or missing: the value then is that given here.

    `segmentation` and `keypoints` are left as bytes where msgspec read them: as Python numbers, COCO's polygons take
    4 GiB.
    """

    id: Any = None
    image_id: Any = None
    category_id: Any = None
    bbox: Any = None
    area: Any = None
    iscrowd: Any = msgspec.UNSET
    """Unlike a missing one, `null` makes detectron2 take an object for a crowd."""
    ignore: Any = 0
    segmentation: msgspec.Raw = NULL
    keypoints: msgspec.Raw = NULL
    num_keypoints: Any = None


class Problem(NamedTuple):
    """What is wrong with one mask or image file, as in a finding."""

    code: str
    what: str
    hint: str


@dataclass
class ImageEntry:
    """An image as the annotation file has it; width and height in pixels."""

    id: int
    file_name: str
    width: int
    height: int


@dataclass
class SplitSummary:
    """What one annotation file holds, and what checks against a model need to know of it.

    Objects are the annotations that are not crowd regions.
    """

    annotations: str
    """Path of the file."""
    images: str
    """Path of the image folder."""
    sha256: str
    """Of the annotation file."""
    num_images: int = 0
    num_annotations: int = 0
    num_crowd: int = 0
    num_images_with_objects: int = 0
    """Images with at least one object: what detectron2 trains on."""
    categories: dict[int, str] = field(default_factory=dict)
    """Id to name, by id."""
    num_polygons: int = 0
    """Objects whose mask is a list of polygons."""
    num_rle: int = 0
    """Objects whose mask is run-length encoded."""
    num_without_mask: int = 0
    first_rle: int | None = None
    """Id of the first object with a run-length encoded mask."""
    first_without_mask: int | None = None
    """Its id."""
    objects_of_category: dict[int, int] = field(default_factory=dict)
    """Objects that are trained on or scored, by category id."""
    objects_of_points: dict[int, int] = field(default_factory=dict)
    """Objects by the number of their keypoints."""
    num_broken_keypoints: int = 0
    """Objects whose keypoints are not triples of x, y and visibility, or, in a validation set, labelled and nowhere."""
    num_images_checked: int = 0
    """Image files that were opened."""


def is_id(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer of 64 bits."""
    return type(value) is int and -MAX_ID < value < MAX_ID


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number of sensible size, NaN or infinity; a boolean is not."""
    return type(value) is float or is_id(value)


def sample(number: int) -> range:
    """The indices of at most `MAX_SAMPLED` of that many annotations, evenly spaced."""
    return range(0, number, max(-(-number // MAX_SAMPLED), 1))


def decoded(field: Any) -> Any:
    """The value of a field that may have been left as bytes."""
    if type(field) is not msgspec.Raw:
        return field
    try:
        return msgspec.json.decode(field)
    except msgspec.DecodeError:
        return json.loads(bytes(field))  # which reads 1e999, as infinity


def shorten(value: Any) -> str:
    """Shows a value of unknown size in at most 80 characters."""
    if isinstance(value, list):
        value = value[:8]
    text = repr(value) if type(value) is not int or is_id(value) else "a huge integer"
    return text if len(text) <= 80 else text[:77] + "…"
