"""Values of a COCO file, of which nothing may be assumed: what counts as an id or a number, and how one is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeGuard

import msgspec

MAX_ID = 2**53
"""Beyond it, JSON readers other than Python's no longer keep integers apart."""

REGENERATE = "Correct the entry, or take it out and write the file again"


class Annotation(msgspec.Struct, gc=False):
    """An annotation as it stands in the file: any field may be missing (None) or of any type.

    `segmentation` stays the bytes of the file where msgspec read it: as Python numbers, COCO's polygons take 4 GiB.
    """

    id: Any = None
    image_id: Any = None
    category_id: Any = None
    bbox: Any = None
    area: Any = None
    iscrowd: Any = None
    segmentation: msgspec.Raw = msgspec.Raw(b"null")


@dataclass
class ImageEntry:
    """An image as the annotation file has it; width and height in pixels."""

    id: int
    file_name: str
    width: int
    height: int


@dataclass
class SplitSummary:
    """What one annotation file holds; also what checks against a model need to know of it.

    Attributes:
        annotations: Path of the file.
        images: Path of the image folder.
        num_images: Images listed.
        num_annotations: Objects and crowd regions.
        num_crowd: Crowd regions among them.
        num_images_with_objects: Images with at least one object that is no crowd: what detectron2 trains on.
        categories: Id to name, by id.
        num_polygons: Objects (no crowds) whose mask is a list of polygons.
        num_rle: Objects (no crowds) whose mask is run-length encoded.
        num_without_mask: Objects (no crowds) without a mask.
        first_rle: Id of the first such object, None without one.
        first_without_mask: Likewise.
        num_images_checked: Image files looked at.
        sha256: Of the annotation file.
    """

    annotations: str
    images: str
    num_images: int = 0
    num_annotations: int = 0
    num_crowd: int = 0
    num_images_with_objects: int = 0
    categories: dict[int, str] = field(default_factory=dict)
    num_polygons: int = 0
    num_rle: int = 0
    num_without_mask: int = 0
    first_rle: int | None = None
    first_without_mask: int | None = None
    num_images_checked: int = 0
    sha256: str = ""


def is_id(value: Any) -> TypeGuard[int]:
    """Tells whether a value can be an id: an integer that every JSON reader keeps exactly."""
    return type(value) is int and -MAX_ID < value < MAX_ID


def is_number(value: Any) -> TypeGuard[float]:
    """Tells whether a value is a number of sensible size or NaN or infinity; a boolean is none."""
    return type(value) is float or (type(value) is int and -MAX_ID < value < MAX_ID)


def find_duplicates(ids: list[int]) -> list[int]:
    """Gives the ids that occur more than once, in order."""
    import numpy as np

    values, counts = np.unique(np.array(ids, dtype=np.int64), return_counts=True)
    repeated: list[int] = values[counts > 1].tolist()
    return repeated


def shorten(value: Any) -> str:
    """Shows a value of unknown size in at most 80 characters."""
    if isinstance(value, list):
        value = value[:8]
    text = repr(value) if not isinstance(value, int) or is_id(value) else "a huge integer"
    return text if len(text) <= 80 else text[:77] + "…"
