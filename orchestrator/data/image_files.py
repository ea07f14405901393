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
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from PIL import Image

from orchestrator.data.entries import Problem

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

FoundFile = tuple[int, int, bool]
"""What a folder's listing says of a file: size in bytes, time of change in ns, whether it is a link."""

Task = tuple[int, str, str, int, int]
"""Image id, file name, path, width, height."""


def list_files(root: Path) -> dict[str, FoundFile]:
    """Lists all files below `root` by relative name, linked folders as links. Raises OSError if one is unreadable."""
    found: dict[str, FoundFile] = {}
    folders = [(str(root), "")]
    while folders:
        folder, prefix = folders.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append((entry.path, f"{prefix}{entry.name}/"))
                    continue
                status = entry.stat(follow_symlinks=False)
                found[prefix + entry.name] = (status.st_size, status.st_mtime_ns, entry.is_symlink())
    return found


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
    tasks: list[Task] = []
    missing: list[ImageEntry] = []
    real_root = os.path.realpath(root)
    for image in images:
        name = image.file_name
        problem = check_name(name)
        if problem is None and name in listing and not listing[name][2]:
            tasks.append((image.id, name, f"{root}/{name}", image.width, image.height))
        elif problem is None:
            real = os.path.realpath(root / name)
            if os.path.commonpath([real, real_root]) != real_root:
                what = f"file_name {name!r} leaves {root} by a link, to {real}"
                problem = Problem("path_link", what, "Copy the file into the folder; links out of it are not followed")
            elif Path(real).is_file():
                tasks.append((image.id, name, real, image.width, image.height))
            else:
                missing.append(image)
        if problem:
            findings.error(problem.code, file, f"image {image.id}", problem.what, problem.hint)
    _report_missing(missing, len(images), root, listing, findings)
    names = {task[0]: task[1] for task in tasks}
    for image_id, problem in _inspect_all(tasks, verify, on_progress):
        level = findings.warning if problem.code == "exif_ambiguous" else findings.error
        level(problem.code, f"{root}/{names[image_id]}", f"image {image_id}", problem.what, problem.hint)
    return len(tasks)


def check_name(name: str) -> Problem | None:
    """Refuses a `file_name` that is not a path inside the image folder: absolute, with `..`, or not a path at all."""
    hint = "Write it relative to the image folder"
    if "\0" in name or len(name) > 4000 or any("\ud800" <= character <= "\udfff" for character in name):
        return Problem("path_invalid", f"file_name {name[:80]!r} cannot be a path", hint)
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        return Problem("path_absolute", f"file_name {name!r} is absolute", hint)
    if ".." in name and ".." in name.replace("\\", "/").split("/"):
        return Problem("path_parent", f"file_name {name!r} leaves the image folder with '..'", hint)
    return None


def _report_missing(
    missing: list[ImageEntry], num_images: int, root: Path, listing: dict[str, FoundFile], findings: FindingList
) -> None:
    if len(missing) == num_images > 1:
        content = f"it holds {len(listing):,} other files, such as {min(listing)!r}" if listing else "it is empty"
        what = f"none of the {num_images:,} images is in this folder, {missing[0].file_name!r} for one; {content}"
        hint = "Name the folder that the file_name entries are relative to"
        findings.error("image_missing", str(root), "all images", what, hint)
        return
    folded = {name.casefold(): name for name in listing} if missing else {}
    for image in missing:
        path = f"{root}/{image.file_name}"
        near = folded.get(image.file_name.casefold())
        hint = f"Rename {near!r}, which differs in case only" if near else FETCH_AGAIN
        findings.error("image_missing", path, f"image {image.id}", "the file does not exist", hint)


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
