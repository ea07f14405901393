"""Checks the masks of COCO annotations: polygons, and run-length encodings before compiled code trusts them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from orchestrator.data.entries import REGENERATE, Problem, decoded, is_number, shorten
from trainers.contract.annotations import MAX_ID

MIN_CODE, MAX_CODE = 48, 111
"""Codes of the characters that pycocotools' compressed counts are made of: six bits each, from '0' on."""

MaskKind = Literal["polygons", "rle", "none", "unknown"]


class MaskCheck(NamedTuple):
    """What `check_mask` found."""

    kind: MaskKind
    """How the mask is written."""
    problem: Problem | None = None
    """What is wrong with it."""
    is_dropped: bool = False
    """Whether detectron2 and the scorer leave out the polygons with the problem, and go on without them."""
    drops_object: bool = False
    """Whether detectron2 leaves out the whole object, as no polygon remains."""


def check_mask(segmentation: Any, image_size: tuple[int, int]) -> MaskCheck:
    """Finds out how a mask is written, and what is wrong with it.

    Args:
        segmentation: The field of the annotation, as its bytes in the file or as a value.
        image_size: As in `check_rle`.
    """
    if type(segmentation) is msgspec.Raw and _are_valid_polygons(bytes(segmentation)):
        return MaskCheck("polygons")
    segmentation = decoded(segmentation)
    if not segmentation:  # detectron2 takes all that is empty for none
        return MaskCheck("none")
    if type(segmentation) is list:
        return _check_polygons(segmentation)
    if type(segmentation) is dict:
        hint = 'Write {"size": [height, width], "counts": …} as pycocotools encodes it'
        what = check_rle(segmentation, image_size)
        return MaskCheck("rle", Problem("rle_invalid", what, hint) if what else None)
    what = f"its segmentation is {shorten(segmentation)}: neither a list of polygons nor RLE"
    return MaskCheck("unknown", Problem("mask_entry", what, REGENERATE))


def mask_area(segmentation: Any) -> float | None:
    """The area of a mask without problems, in pixels, polygons added up; None where there is none."""
    segmentation = decoded(segmentation)
    if not segmentation:
        return None
    if type(segmentation) is list:
        return sum(map(_polygon_area, segmentation))
    return float(_runs(segmentation)[1::2].sum())


def mask_extent(segmentation: Any) -> tuple[float, float, float, float] | None:
    """The least and largest x and y (x0, y0, x1, y1) of a mask without problems; None where it covers nothing."""
    segmentation = decoded(segmentation)
    if not segmentation:
        return None
    if type(segmentation) is list:
        x, y = np.concatenate([_polygon_corners(polygon) for polygon in segmentation]).T
        return float(x.min()), float(y.min()), float(x.max()), float(y.max())
    ends = np.cumsum(_runs(segmentation))
    starts, ends = ends[:-1:2], ends[1::2]
    starts, last = starts[ends > starts], ends[ends > starts] - 1
    if not len(starts):
        return None
    height = int(segmentation["size"][0])
    if (starts // height < last // height).any():  # A run from one column into the next covers both edges.
        top, bottom = 0, height
    else:
        top, bottom = int((starts % height).min()), int((last % height).max()) + 1
    return float(starts.min() // height), float(top), float(last.max() // height + 1), float(bottom)


def _runs(mask: dict[str, Any]) -> NDArray[np.int64]:
    """The run lengths of an RLE without problems."""
    counts = mask["counts"]
    runs = decode_counts(counts) if type(counts) is str else np.array(counts, dtype=np.int64)
    return np.zeros(0, dtype=np.int64) if runs is None else runs


def _polygon_corners(corners: list[float]) -> NDArray[np.float64]:
    """Their x and y in rows; of an odd number of coordinates, the last does not count."""
    return np.array(corners[: len(corners) // 2 * 2], dtype=np.float64).reshape(-1, 2)


def _polygon_area(corners: list[float]) -> float:
    """The shoelace formula."""
    x, y = _polygon_corners(corners).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def check_rle(mask: dict[str, Any], image_size: tuple[int, int]) -> str:
    """What is wrong with a mask `{"size": [height, width], "counts": list or text}`, or "".

    `image_size` is the width and height of its image in pixels; (0, 0) where they are not known.
    """
    size, counts = mask.get("size"), mask.get("counts")
    if isinstance(counts, str) and isinstance(size, list):
        size = [int(v) if type(v) is float and v.is_integer() else v for v in size]  # as pycocotools reads it
    if type(size) is not list or len(size) != 2 or not all(type(v) is int and 0 < v < 2**24 for v in size):
        return f"its RLE size is {str(size)[:40]}, not [height, width]"
    if image_size != (0, 0) and (size[1], size[0]) != image_size:
        return f"its RLE is for an image of {size[1]} x {size[0]}, the image has {image_size[0]} x {image_size[1]}"
    if isinstance(counts, str):
        runs = decode_counts(counts)
        if runs is None:
            return "its RLE counts are not a text that pycocotools could have written"
        total = int(runs.sum())
    elif type(counts) is list and all(type(count) is int and count >= 0 for count in counts):
        total = sum(counts)
    else:
        return f"its RLE counts are a {type(counts).__name__} that holds something else than run lengths"
    if total != size[0] * size[1]:
        shown = f"{total:,}" if total < 2**53 else "far more"
        return f"its RLE covers {shown} pixels, the image has {size[0] * size[1]:,}"
    return ""


def decode_counts(text: str) -> NDArray[np.int64] | None:
    """The run lengths of compressed counts; None where the text is none, or holds a negative run.

    The encoding (pycocotools, `maskApi.c`, `rleToString`): each run is written in groups of five bits, lowest first,
    with a bit for "more follow"; from the fourth run on, the difference to the run two before.
    """
    if not text:
        return np.zeros(0, dtype=np.int64)
    if not text.isascii():
        return None
    codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64)
    last = ((codes - MIN_CODE) & 32) == 0
    if codes.min() < MIN_CODE or codes.max() > MAX_CODE or not last[-1]:
        return None
    codes -= MIN_CODE
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        return None
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    # Undo the differences: runs 1, 3, 5 … and 2, 4, 6 … are two cumulative sums; run 0 stands alone.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return None if (runs < 0).any() else runs


def _are_valid_polygons(raw: bytes) -> bool:
    """Whether JSON is a list of well-formed polygons, decided without parsing its numbers."""
    if raw[:2] != b"[[" or raw[-2:] != b"]]" or b"e" in raw or b"E" in raw:
        return False
    for polygon in raw[2:-2].translate(None, b" \n\r\t").split(b"],["):
        num_values = polygon.count(b",") + 1
        if num_values < 6 or num_values % 2 or polygon.translate(None, b"0123456789.,-"):
            return False
    return True


def _check_polygons(polygons: list[Any]) -> MaskCheck:
    for number, polygon in enumerate(polygons):
        what, hint = "", REGENERATE
        if type(polygon) is not list:
            what = f"polygon {number} is {shorten(polygon)}, not a list"
            if is_number(polygon):
                hint = "Write [[x0, y0, …]], a list in a list, also for one polygon (VIA 2 leaves the outer one out)"
        elif not set(map(type, polygon)) <= {int, float}:
            what = f"polygon {number} holds something that is not a number"
        elif not all(-MAX_ID < value < MAX_ID for value in polygon):
            what = f"polygon {number} holds NaN, infinity or a huge number"
            return MaskCheck("polygons", Problem("polygon_not_finite", what, REGENERATE))
        if what:
            return MaskCheck("polygons", Problem("polygon_entry", what, hint))
    lengths = [len(polygon) for polygon in polygons]
    dropped = [number for number, length in enumerate(lengths) if length < 6 or length % 2]
    if not dropped:
        return MaskCheck("polygons")
    number = dropped[0]
    hint = "Remove the polygon, or the whole annotation if it is the only one"
    if len(lengths) > 2 and set(lengths) == {2}:
        code, what = "polygon_short", f"its {len(lengths)} polygons have 2 numbers each: points as pairs"
        hint = "Write one polygon of all points, [[x0, y0, x1, y1, …]] for [[x0, y0], [x1, y1], …]"
    elif lengths[number] < 6:
        code, what = "polygon_short", f"polygon {number} has {lengths[number]} numbers: three corners take 6"
    else:
        code, what = "polygon_odd", f"polygon {number} has an odd number of coordinates ({lengths[number]})"
    drops_object = len(dropped) == len(lengths)
    return MaskCheck("polygons", Problem(code, what, hint), is_dropped=True, drops_object=drops_object)
