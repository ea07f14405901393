"""Finds objects that a COCO file lists more than once under different ids, as merged exports do."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from orchestrator.data.entries import Annotation
from orchestrator.findings import FindingList


def check_duplicates(
    entries: list[Annotation], candidates: NDArray[np.bool_], file: str, findings: FindingList, *, for_scoring: bool
) -> None:
    """Compares image, category, box, mask and keypoints of the objects.

    Args:
        entries: The annotations.
        candidates: Which of them to look at: objects whose boxes are four numbers.
        file: The annotation file.
        findings: Added to.
        for_scoring: Whether it is a validation set.
    """
    effect = "a detection is for one, the other counts as missed" if for_scoring else "the object is trained on twice"
    objects = [entries[index] for index in np.flatnonzero(candidates).tolist()]
    # Masks are compared only where all else is equal: COCO's are 400 MB of text.
    keys = np.fromiter(map(_key, objects), np.int64, len(objects))
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    first_of_key: dict[int, Any] = {}
    for index in np.flatnonzero(sizes[group] > 1).tolist():
        entry = objects[index]
        key = hash((_key(entry), _text(entry.segmentation), _text(entry.keypoints)))
        if (first := first_of_key.setdefault(key, entry)) is not entry:
            what = f"image, category, box and mask are the same as annotation {first.id}'s: {effect}"
            hint = "Remove one of them; does the file come from two exports that overlap?"
            findings.warning("duplicate_object", file, f"annotation {entry.id}", what, hint)


def _key(entry: Annotation) -> int:
    return hash((entry.image_id, entry.category_id, *entry.bbox))


def _text(field: Any) -> bytes:
    """A field as text without white space, in which the parts of a merged file may differ."""
    return bytes(field).translate(None, b" \n\r\t") if type(field) is msgspec.Raw else repr(field).encode()
