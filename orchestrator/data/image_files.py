"""Checks all image files of an annotation file, in several processes where there are many."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

from orchestrator.data.entries import ImageEntry, Problem
from orchestrator.data.image_content import WARNINGS, inspect_image
from orchestrator.data.image_names import FoundFile, locate_images
from orchestrator.data.progress_bar import OnProgress
from orchestrator.findings import FindingList
from trainers.contract.cpus import num_usable_cpus

CHUNK_FILES = 250
PARALLEL_FROM = 1500
"""Files from which starting more processes (half a second) pays; a sixth of that where all are decoded."""

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
) -> dict[str, int]:
    """Checks the files of an annotation file's images, and returns the size in bytes of each by its path.

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
    paths = {image.id: path for image, path in located}
    tasks: list[Task] = [(image.id, image.file_name, path, image.width, image.height) for image, path in located]
    for image_id, problem in _inspect_all(tasks, verify, on_progress):
        report = findings.warning if problem.code in WARNINGS else findings.error
        report(problem.code, paths[image_id], f"image {image_id}", problem.what, problem.hint, group=str(root))
    sizes = {}
    for image, path in located:
        if known := listing.get(image.file_name):
            sizes[path] = known[0]
        else:
            with suppress(OSError):
                sizes[path] = Path(path).stat().st_size
    return sizes


def _inspect_all(tasks: list[Task], verify: bool, on_progress: OnProgress) -> Iterator[tuple[int, Problem]]:
    chunks = [(tasks[start : start + CHUNK_FILES], verify) for start in range(0, len(tasks), CHUNK_FILES)]
    if len(tasks) < (PARALLEL_FROM // 6 if verify else PARALLEL_FROM):
        for chunk in chunks:
            yield from _inspect_chunk(chunk)
        return
    # Not fork: the caller may already run threads, whose locks a fork would copy.
    with ProcessPoolExecutor(num_usable_cpus(), mp_context=get_context("spawn")) as pool:
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
