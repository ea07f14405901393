"""Draws a small detection data set in COCO's layout: filled shapes on a noisy ground, the demo's data.

Every image depends only on the seed, its split and its index, so the files are the same bytes however many processes
drew them. The set is drawn into a temporary folder and renamed: a folder that holds `generated.json` is complete.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from orchestrator.data.layout import Dataset, coco_layout
from orchestrator.data.progress_bar import OnProgress
from orchestrator.data.shapes import ShapesParameters, draw_image, name_shape
from trainers.contract.cpus import num_usable_cpus

PARAMETERS_FILE = "generated.json"
JPEG_QUALITY = 92
SPLITS = ("train2017", "val2017")
CHUNK_IMAGES = 200
"""Images per work item of a process: enough for the cost of passing work to it not to matter."""


def generate(
    to: Path,
    *,
    size: int | tuple[int, int] = 128,
    shapes_per_image: tuple[int, int] = (1, 4),
    replace: bool = False,
    num_processes: int | None = None,
    on_progress: OnProgress = lambda *_: None,
    **parameters: Any,
) -> Dataset:
    """Draws a data set of shapes into `to`, unless it already holds the same one, and returns where its files are.

    Args:
        to: The new folder; its parents are made too.
        size: Side of a square image, or (width, height), pixels.
        shapes_per_image: Fewest and most shapes of an image.
        replace: Whether a generated set with other parameters in `to` may be replaced. A folder that this function did
            not make is never replaced.
        num_processes: Processes that draw; None takes the machine's CPUs for large sets, else one.
        on_progress: Called with the number of images written of a split, and of all of it.
        parameters: Other fields of `ShapesParameters`.

    Raises:
        ValueError: A parameter is out of its range.
        FileExistsError: `to` holds something else: other files, or a set with other parameters and no `replace`.
        OSError: It cannot be written, or is larger than what is free.
    """
    width, height = (size, size) if isinstance(size, int) else size
    fewest, most = shapes_per_image
    wanted = ShapesParameters(width=width, height=height, min_shapes=fewest, max_shapes=most, **parameters)
    to = Path(to).absolute()
    if _is_present(to, wanted, replace=replace):
        return coco_layout(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    _require_room(to.parent, wanted)
    partial = to.parent / f".{to.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        (partial / "annotations").mkdir(parents=True)
        for split, num_images in zip(SPLITS, (wanted.num_train, wanted.num_val), strict=True):
            _write_split(partial, split, num_images, wanted, num_processes, on_progress)
        text = json.dumps(asdict(wanted), indent=2) + "\n"
        (partial / PARAMETERS_FILE).write_text(text, encoding="utf-8")
        _put_in_place(partial, to, wanted, replace=replace)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return coco_layout(to)


def _is_present(to: Path, parameters: ShapesParameters, *, replace: bool) -> bool:
    """Whether `to` holds this set; raises FileExistsError where it holds something that may not be replaced."""
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return False
    try:
        found = json.loads((to / PARAMETERS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        what = f"{to} exists and was not generated (it has no readable {PARAMETERS_FILE}): name another folder"
        raise FileExistsError(what) from None
    wanted = asdict(parameters)
    if found == wanted:
        return True
    if replace:
        return False
    other = [
        f"{key} {found.get(key)!r} there, {wanted[key]!r} asked" for key in wanted if found.get(key) != wanted[key]
    ]
    what = f"{to} holds a generated set with other parameters ({', '.join(other)}): name another folder, or replace it"
    raise FileExistsError(what)


def _put_in_place(partial: Path, to: Path, parameters: ShapesParameters, *, replace: bool) -> None:
    """Renames the finished folder; where another process has made the same set meanwhile, that one is kept."""
    try:
        partial.rename(to)
    except OSError:
        if _is_present(to, parameters, replace=replace):
            return
        old = to.parent / f".{to.name}.{uuid.uuid4().hex[:8]}.old"
        to.rename(old)
        partial.rename(to)
        shutil.rmtree(old, ignore_errors=True)


def _require_room(folder: Path, parameters: ShapesParameters) -> None:
    """Raises OSError where the images, each as large as the first one, take more than what is free."""
    limit = parameters.distinct_images or math.inf
    number = sum(min(num_images, limit) for num_images in (parameters.num_train, parameters.num_val))
    needed = number * len(_draw_jpeg(0, 0, parameters)[0])
    free = shutil.disk_usage(folder).free
    if needed > free:
        gib, of = (f"{size / 2**30:,.1f} GiB" for size in (needed, free))
        raise OSError(errno.ENOSPC, f"{number:,} images take about {gib}, {of} are free", str(folder))


def _write_split(
    root: Path, split: str, num_images: int, parameters: ShapesParameters, processes: int | None, advance: OnProgress
) -> None:
    import orjson

    folder = root / split
    folder.mkdir()
    num_drawn = min(num_images, parameters.distinct_images or num_images)
    chunks = [
        (str(folder), SPLITS.index(split), start, min(start + CHUNK_IMAGES, num_drawn), parameters)
        for start in range(0, num_drawn, CHUNK_IMAGES)
    ]
    processes = processes or (num_usable_cpus() if num_drawn >= 2000 else 1)
    drawn: list[list[dict[str, Any]]] = []
    for chunk in _run_chunks(chunks, processes):
        drawn.extend(chunk)
        advance(len(drawn), num_images)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(num_images):
        name = f"{index + 1:012d}.jpg"
        if index >= num_drawn:
            os.link(folder / f"{index % num_drawn + 1:012d}.jpg", folder / name)
            advance(index + 1, num_images)
        images.append({"id": index + 1, "file_name": name, "width": parameters.width, "height": parameters.height})
        for shape in drawn[index % num_drawn]:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **shape})
    document = {
        "info": {"description": "Drawn shapes", "version": str(parameters.version)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": index + 1, "name": name_shape(index), "supercategory": "shape"}
            for index in range(parameters.num_classes)
        ],
    }
    (root / "annotations" / f"instances_{split}.json").write_bytes(orjson.dumps(document))


def _run_chunks(chunks: list[tuple[str, int, int, int, ShapesParameters]], processes: int) -> Iterator[Any]:
    if processes == 1 or len(chunks) < 2:
        yield from map(_draw_chunk, chunks)
        return
    # Not fork: the caller may already run threads (Ray's, a progress bar's), whose locks a fork would copy.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_draw_chunk, chunks)


def _draw_chunk(chunk: tuple[str, int, int, int, ShapesParameters]) -> list[list[dict[str, Any]]]:
    folder, split, start, stop, parameters = chunk
    drawn = []
    for index in range(start, stop):
        data, shapes = _draw_jpeg(split, index, parameters)
        (Path(folder) / f"{index + 1:012d}.jpg").write_bytes(data)
        drawn.append(shapes)
    return drawn


def _draw_jpeg(split: int, index: int, parameters: ShapesParameters) -> tuple[bytes, list[dict[str, Any]]]:
    import cv2
    import numpy as np

    image, shapes = draw_image(np.random.default_rng([parameters.seed, split, index]), parameters)
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not done:
        raise OSError(f"image {index} could not be encoded as JPEG")
    return data.tobytes(), shapes
