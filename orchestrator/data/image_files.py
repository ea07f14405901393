"""Checks image files against their annotation file: present, complete, of the given size, inside the image folder.

By default only a file's head and its last two bytes are read; a JPEG that does not end as one is then decoded, as all
files are with `verify`. Pillow decodes, as it does for detectron2, so that both refuse the same files.
"""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from orchestrator.data.entries import Problem
from orchestrator.data.image_names import FoundFile, locate_images

if TYPE_CHECKING:
    from collections.abc import Iterator

    from orchestrator.data.entries import ImageEntry
    from orchestrator.data.progress_bar import OnProgress
    from orchestrator.findings import FindingList

CHUNK_FILES = 250
PARALLEL_FROM = 1500
"""Files from which starting more processes (half a second) pays; a sixth of that where all are decoded."""

EXIF_ORIENTATION = 0x0112
TURNED = {5: "mirrored and turned by 90°", 6: "turned by 90°", 7: "mirrored and turned by 90°", 8: "turned by 90°"}
FLIPPED = {2: "mirrored", 3: "turned by 180°", 4: "mirrored upside down"}

FETCH_AGAIN = "Copy or download the image again, or remove it from the annotation file"

Task = tuple[int, str, str, int, int]
"""Image id, file name, path, width, height."""


def check_images(
    images: list[ImageEntry],
    file: str,
    root: Path,
    listing: dict[str, FoundFile],
    findings: FindingList,
    *,
    verify: bool,
    on_progress: OnProgress,
) -> int:
    """Checks the files of an annotation file's images, and returns how many were opened.

    Args:
        images: Its image entries.
        file: The annotation file, for findings about names in it.
        root: Folder that the names are relative to.
        listing: What `list_files` found there.
        findings: Added to.
        verify: Decode every image, not only read its head.
        on_progress: Called with the number of files done, and of all.
    """
    located = locate_images(images, file, root, listing, findings)
    tasks: list[Task] = [(image.id, image.file_name, path, image.width, image.height) for image, path in located]
    names = {task[0]: task[1] for task in tasks}
    for image_id, problem in _inspect_all(tasks, verify, on_progress):
        level = findings.warning if problem.code == "exif_ambiguous" else findings.error
        level(problem.code, f"{root}/{names[image_id]}", f"image {image_id}", problem.what, problem.hint)
    return len(tasks)


def _inspect_all(tasks: list[Task], verify: bool, on_progress: OnProgress) -> Iterator[tuple[int, Problem]]:
    chunks = [(tasks[start : start + CHUNK_FILES], verify) for start in range(0, len(tasks), CHUNK_FILES)]
    if len(tasks) < (PARALLEL_FROM // 6 if verify else PARALLEL_FROM):
        for chunk in chunks:
            yield from _inspect_chunk(chunk)
        return
    # Not fork: the caller may already run threads, whose locks a fork would copy.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = pool.map(_inspect_chunk, chunks)
        for index, chunk in enumerate(chunks):
            try:
                yield from next(results)
            except BrokenProcessPool:
                first, last = chunk[0][0], chunk[0][-1]
                what = f"the process that checked this and the files up to {last[1]!r} died"
                hint = "Open these files by hand, or look at the machine's memory"
                yield first[0], Problem("image_check_died", what, hint)
                return
            on_progress(min((index + 1) * CHUNK_FILES, len(tasks)), len(tasks))


def _inspect_chunk(chunk: tuple[list[Task], bool]) -> list[tuple[int, Problem]]:
    tasks, verify = chunk
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata in files that it reads nevertheless
        found = [(task[0], inspect_image(*task[2:], verify=verify)) for task in tasks]
    return [(image_id, problem) for image_id, problem in found if problem is not None]


def inspect_image(path: str, width: int, height: int, *, verify: bool) -> Problem | None:
    """Checks one image file against its annotated width and height in pixels; decodes it in any case if `verify`."""
    try:
        with Path(path).open("rb") as stream:
            if not stream.read(1):
                return Problem("image_corrupt", "the file is empty", FETCH_AGAIN)
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 2))
            ends_well = stream.read() == b"\xff\xd9"
            stream.seek(0)
            with Image.open(stream) as image:
                kind, size = image.format, image.size
                orientation = _read_orientation(image)
                if verify or (kind == "JPEG" and not ends_well):
                    image.convert("RGB")  # decodes it, as detectron2 does
    except MemoryError:
        return Problem("image_corrupt", "the image does not fit into memory", FETCH_AGAIN)
    except PermissionError as error:
        return Problem("image_unreadable", f"cannot be read: {error.strerror}", "Give the user of the run read access")
    except Exception as error:  # noqa: BLE001 - decoders of damaged files raise anything: OSError, SyntaxError, …
        truncated = "truncated" in str(error).lower() or isinstance(error, EOFError)
        what = f"the image is {'truncated' if truncated else 'corrupt'}: {_reason(error, path)}"
        return Problem("image_truncated" if truncated else "image_corrupt", what, FETCH_AGAIN)
    return _check_size(size, orientation, width, height)


def _read_orientation(image: Image.Image) -> int:
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - detectron2 too ignores EXIF data that cannot be read
        return 1


def _reason(error: Exception, path: str) -> str:
    text = str(error).replace(path, "the file").strip() or type(error).__name__
    return "no image format is recognised" if text.startswith("cannot identify") else text[:120]


def _check_size(size: tuple[int, int], orientation: int, width: int, height: int) -> Problem | None:
    shown = size[::-1] if orientation in TURNED else size
    if shown != (width, height):
        turned = f" once turned as its EXIF orientation {orientation} says" if orientation in TURNED else ""
        what = f"the image has {shown[0]} x {shown[1]} pixels{turned}; {width} x {height} are annotated"
        if orientation in TURNED and size == (width, height):
            hint = "Turn the pixels and drop the EXIF orientation, or annotate the turned image: detectron2 turns it"
            return Problem("exif_orientation", what, hint)
        return Problem("size_mismatch", what, "Correct width and height of its entry, or restore the annotated image")
    if orientation in FLIPPED or (orientation in TURNED and width == height):
        turn = FLIPPED.get(orientation) or TURNED[orientation]
        what = f"detectron2 shows it {turn}, as its EXIF orientation {orientation} says"
        hint = "Make sure that the annotations match, or save the image without EXIF orientation"
        return Problem("exif_ambiguous", what, hint)
    return None
