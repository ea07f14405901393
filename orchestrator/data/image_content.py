"""Checks what is in one image file: a whole image, of the annotated size, that detectron2 reads as what it shows.

By default a file's head and its end are read; where these do not show that it is whole, it is decoded, as all files
are with `verify`. Pillow decodes, as it does for detectron2, so that both refuse the same files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from orchestrator.data.entries import Problem
from trainers.contract.annotations import placeholder

HEAD_BYTES, TAIL_BYTES = 512, 12

EXIF_ORIENTATION = 0x0112
TURNED = {5: "mirrored and turned by 90°", 6: "turned by 90°", 7: "mirrored and turned by 90°", 8: "turned by 90°"}
FLIPPED = {2: "mirrored", 3: "turned by 180°", 4: "mirrored upside down"}
EXIF_KEYS = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})
"""Where Pillow finds an orientation in an image other than a TIFF."""

TAILS = {
    "JPEG": (b"\xff\xd9",), "MPO": (b"\xff\xd9",), "JPEG2000": (b"\xff\xd9",), "GIF": (b"\x00;",),
    "PNG": (b"IEND\xaeB`\x82",),
}  # fmt: skip
"""How whole files of a format end."""

TIFF_COMPRESSIONS = (1, 5, 8, 32946, 32773)
"""None, LZW, deflate and its older number, PackBits (TIFF 6.0, `Compression`)."""

HEIF_HEADS = {b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")}
"""How files of HEIF begin, after the size of their first box (ISO/IEC 23008-12, brands): photos of telephones."""

WARNINGS = ("exif_ambiguous", "image_large")
"""Codes of problems that do not keep detectron2 from reading the image."""

FETCH_AGAIN = "Copy or download the image again, or remove it from the annotation file"
TO_8_BITS = "Convert it to 8 bits, scaled by the range that your data uses, all images alike"
TILE_IT = "Cut it into tiles, or scale it down, and its annotations with it"


def inspect_image(path: str, width: int, height: int, *, verify: bool) -> Problem | None:
    """Checks one image file against its annotated width and height in pixels; decodes it in any case if `verify`."""
    head, num_bytes = b"", 0
    try:
        with Path(path).open("rb") as stream:
            head = stream.read(HEAD_BYTES)
            num_bytes = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, num_bytes - TAIL_BYTES))
            tail = stream.read()
            if problem := _check_head(head):
                return problem
            stream.seek(0)
            with Image.open(stream) as image:
                kind, size = image.format or "", image.size
                if verify or not _is_whole(image, kind, tail, head, num_bytes):
                    image.convert("RGB")  # decodes it, as detectron2 does
                orientation = _read_orientation(image)  # a PNG's may follow its pixels
                problem = _check_depth(image)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\((\d+) pixels", str(error))
        limit = round(2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6)  # Pillow warns from its limit on, and refuses twice that
        what = f"the image has {f'{int(pixels[1]):,}' if pixels else 'too many'} pixels: too large for Pillow"
        return Problem("image_too_large", f"{what} (limit {limit} million), and so for detectron2", TILE_IT)
    except MemoryError:
        return Problem("image_corrupt", "the image does not fit into memory", FETCH_AGAIN)
    except Exception as error:  # noqa: BLE001 - decoders of damaged files raise anything: OSError, SyntaxError, …
        if isinstance(error, OSError) and error.errno:  # the system's, not a decoder's
            hint = "Give the user of the run read access, or look after the disk it is on"
            return Problem("image_unreadable", f"cannot be read: {error.strerror}", hint)
        return _damage(error, path, head, num_bytes)
    return problem or _check_size(kind, size, orientation, width, height) or _check_pixels(size)


def _check_head(head: bytes) -> Problem | None:
    if not head:
        return Problem("image_corrupt", "the file is empty", FETCH_AGAIN)
    if (found := placeholder(head)) is not None:
        return Problem("image_placeholder", f"the file is {found[0]}", found[1])
    return None


def _is_whole(image: Image.Image, kind: str, tail: bytes, head: bytes, num_bytes: int) -> bool:
    """Whether a file's size or its last bytes show that nothing is missing; False where they do not say."""
    if kind in TAILS:
        return tail.endswith(TAILS[kind])
    if kind == "WEBP":
        return _riff_bytes(head) <= num_bytes
    if kind == "TIFF":
        tags: Any = getattr(image, "tag_v2", {})
        starts, counts = (tags.get(strips) or tags.get(tiles) or () for strips, tiles in ((273, 324), (279, 325)))
        ends = [start + count for start, count in zip(starts, counts, strict=False)]
        # Of other compressions, such as JPEG's, parts lie outside of the strips.
        return tags.get(259) in TIFF_COMPRESSIONS and bool(ends) and max(ends) <= num_bytes
    if kind == "BMP":
        (codec, _, offset, arguments), *_ = getattr(image, "tile", None) or [("", (), 0, ())]
        return bool(codec == "raw" and offset + arguments[1] * image.height <= num_bytes)
    return False


def _riff_bytes(head: bytes) -> int:
    """The size of a WebP file according to its own head."""
    return int.from_bytes(head[4:8], "little") + 8


def _check_depth(image: Image.Image) -> Problem | None:
    """Refuses an image of which detectron2's conversion to 8 bits would change the pixels: it cuts values at 255."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return None
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    if low >= 0 and high <= 255 and (pixels == np.round(pixels)).all():
        return None
    bits = f"{8 * pixels.dtype.itemsize} bits a pixel{' (floating point)' if image.mode == 'F' else ''}"
    effect = "cut them to whole numbers from 0" if high <= 255 else "read all above 255 as white"
    what = f"the image has {bits}, values from {low:g} to {high:g}: detectron2 would {effect}"
    return Problem("image_depth", what, TO_8_BITS)


def _check_pixels(size: tuple[int, int]) -> Problem | None:
    pixels, limit = size[0] * size[1], Image.MAX_IMAGE_PIXELS
    if limit is None or pixels <= limit:
        return None
    what = (
        f"the image has {pixels / 1e6:.0f} million pixels: each loader process holds {6 * pixels / 1e9:.1f} GB for it"
    )
    return Problem("image_large", what, f"{TILE_IT}; nothing, if that is intended")


def _read_orientation(image: Image.Image) -> int:
    if image.format != "TIFF" and not EXIF_KEYS & image.info.keys():
        return 1
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - detectron2 too ignores EXIF data that cannot be read
        return 1


def _damage(error: Exception, path: str, head: bytes, num_bytes: int) -> Problem:
    text = str(error).replace(path, "the file").strip() or type(error).__name__
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP" and _riff_bytes(head) > num_bytes:
        text = f"truncated after {num_bytes:,} of {_riff_bytes(head):,} bytes"
    truncated = "truncated" in text.lower() or isinstance(error, EOFError)
    if head[4:12] in HEIF_HEADS:
        what = "the image is HEIC or HEIF, which Pillow does not read"
        return Problem("image_corrupt", what, "Convert it to JPEG")
    if text.startswith("cannot identify"):
        is_tiff = head[:4] in (b"II*\0", b"MM\0*")
        text = "a TIFF of a kind that Pillow does not read" if is_tiff else "no image format is recognised"
    what = f"the image is {'truncated' if truncated else 'corrupt'}: {text[:120]}"
    return Problem("image_truncated" if truncated else "image_corrupt", what, FETCH_AGAIN)


def _check_size(kind: str, size: tuple[int, int], orientation: int, width: int, height: int) -> Problem | None:
    shown = size[::-1] if orientation in TURNED else size
    if shown != (width, height):
        turned = f" once turned as its EXIF orientation {orientation} says" if orientation in TURNED else ""
        what = f"the image has {shown[0]} x {shown[1]} pixels{turned}; {width} x {height} are annotated"
        if orientation in TURNED and size == (width, height):
            hint = "Turn the pixels and drop the EXIF orientation, or annotate the turned image: detectron2 turns it"
            return Problem("exif_orientation", what, hint)
        return Problem("size_mismatch", what, "Correct width and height of its entry, or restore the annotated image")
    turn = FLIPPED.get(orientation) or TURNED.get(orientation)
    if turn and kind == "TIFF":
        what = (
            f"its orientation {orientation} is applied by Pillow and again by detectron2, which shows it {turn} twice"
        )
    elif orientation in FLIPPED or (turn and width == height):
        what = f"detectron2 shows it {turn}, as its EXIF orientation {orientation} says"
    else:
        return None
    hint = "Make sure that the annotations match, or save the image without EXIF orientation"
    return Problem("exif_ambiguous", what, hint)
