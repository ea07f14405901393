"""Measures a host: its CPUs at what loaders do and at matrix products, its shared memory and its storage."""

from __future__ import annotations

import os
import random
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from trainers.acceptance.cpu_time import Burst, run_burst
from trainers.contract.acceptance import Measured, ProbeRequest
from trainers.contract.cpus import usable_cpus

REPETITIONS = 3
"""How often each rate is measured."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where torch's loaders put their batches

PIECE_BYTES = 4 * 2**20
"""What is written or read with one call."""

MATRIX_SIZE, MATRICES = 512, 8
"""Side of the matrices of 1 MiB whose products a CPU computes, and how many in one call: milliseconds without Python,
whose lock would have threads wait for one that has no CPU."""

MAX_LISTED_FILES = 4096
"""Files of a data folder that are chosen from; listing all of COCO on network storage would take longer."""


def measure_host(request: ProbeRequest, keys: tuple[str, ...]) -> Iterator[Measured]:
    """Measures some quantities of this host.

    Rates of CPUs are those of as many threads as Ray gives CPUs, less what other processes were in the way (`Burst`).
    """
    cv2.setNumThreads(1)
    if "usable_cpus" in keys:
        yield Measured("usable_cpus", min(usable_cpus(), request.num_cpus))
    if "decode" in keys:
        yield from _rates("decode", _decoding(), request, 1.0, share="cpu_share" in keys)
    if "cpu_matrix" in keys:
        yield from _rates("cpu_matrix", _multiplication(), request, 1e9)
    if "shm_size" in keys:
        size = os.statvfs(SHARED_MEMORY)
        yield Measured("shm_size", size.f_blocks * size.f_frsize / 2**30)
    if "shm_write" in keys:
        yield _attempt("shm_write", lambda: _write_rate(SHARED_MEMORY, request) / 1e9)
    if "checkpoint_write" in keys:
        folder = request.checkpoint_folder
        yield _attempt("checkpoint_write", lambda: _write_rate(Path(_needed(folder)), request, sync=True) / 1e6)
    if "data_read" in keys:
        yield _attempt("data_read", lambda: _read_rate(request) / 1e6)


def _attempt(key: str, measure: Callable[[], float]) -> Measured:
    try:
        return Measured(key, measure())
    except OSError as error:
        return Measured(key, None, reason=str(error.strerror or error))


def _needed(folder: str | None) -> str:
    if folder is None:
        raise OSError("it is at an address, which is not measured")
    return folder


def _rates(
    key: str, work: Callable[[], float], request: ProbeRequest, unit: float, *, share: bool = False
) -> Iterator[Measured]:
    threads = max(1, min(request.num_cpus, len(os.sched_getaffinity(0))))
    bursts = _bursts(work, threads, request.seconds)
    yield Measured(key, statistics.median(burst.rate for burst in bursts) / unit)
    if share:
        yield Measured("cpu_share", max(burst.cpu_share for burst in bursts))


def _bursts(work: Callable[[], float], num_threads: int, seconds: float) -> list[Burst]:
    """A few bursts; fewer where a piece of work takes much longer than they should."""
    bursts: list[Burst] = []
    deadline = time.perf_counter() + 2 * seconds
    while len(bursts) < REPETITIONS and (not bursts or time.perf_counter() < deadline):
        bursts.append(run_burst(work, num_threads, seconds / REPETITIONS))
    return bursts


def _decoding() -> Callable[[], float]:
    """Decodes a JPEG of 640 x 480 and enlarges it to 1067 x 800, as the loader does with most of COCO: one image."""
    coarse = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    _, encoded = cv2.imencode(".jpg", cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC))

    def work() -> float:
        image: Any = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
        cv2.resize(image, (1067, 800), interpolation=cv2.INTER_LINEAR)
        return 1.0

    return work


def _multiplication() -> Callable[[], float]:
    """Products of matrices in fp32, by the calling thread alone: their floating-point operations."""
    left, right = torch.rand(2, MATRICES, MATRIX_SIZE, MATRIX_SIZE)

    def work() -> float:
        torch.set_num_threads(1)  # it holds for the calling thread; those of a pool would wait for one without a CPU
        torch.bmm(left, right)
        return 2.0 * MATRICES * MATRIX_SIZE**3

    return work


def _write_rate(folder: Path, request: ProbeRequest, *, sync: bool = False) -> float:
    """Bytes per second of writing a file, the best of a few; with `sync`, until it is on the storage."""
    piece = random.Random(0).randbytes(PIECE_BYTES)  # noqa: S311 - only not compressible
    path = folder / f".acceptance-{uuid.uuid4().hex}"

    def work() -> float:
        return _write(path, piece, request.num_bytes, sync=sync)

    try:
        return max(burst.rate for burst in _bursts(work, 1, request.seconds))
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path, piece: bytes, num_bytes: int, *, sync: bool) -> float:
    with path.open("wb", buffering=0) as file:
        for _ in range(0, num_bytes, len(piece)):
            file.write(piece)
        if sync:
            os.fsync(file.fileno())
    return float(num_bytes)


def _read_rate(request: ProbeRequest) -> float:
    """Bytes per second of reading files of the data, or one that was written for it, not from this host's memory.

    The kernel is asked to forget each file before it is read (`posix_fadvise`), which it does with what no other
    process uses. What a file server remembers, or a file system in memory, is still read at the speed of memory.

    Raises:
        OSError: There is nothing to read, or it cannot be read.
    """
    files = _data_files(request.data_folder) if request.data_folder else []
    written = None if files else Path(_needed(request.checkpoint_folder)) / f".acceptance-{uuid.uuid4().hex}"
    try:
        if written:
            piece = random.Random(1).randbytes(PIECE_BYTES)  # noqa: S311 - only not compressible
            _write(written, piece, request.num_bytes, sync=True)
        return max(
            burst.rate for burst in _bursts(lambda: _read([written] if written else files, request), 1, request.seconds)
        )
    finally:
        if written:
            written.unlink(missing_ok=True)


def _data_files(folder: str) -> list[Path]:
    """Some files of a folder, in an order of this process's own, so that hosts read different ones."""
    with os.scandir(folder) as entries:
        files = [Path(entry.path) for entry in islice(entries, MAX_LISTED_FILES) if entry.is_file()]
    random.SystemRandom().shuffle(files)
    return files


def _read(files: list[Path], request: ProbeRequest) -> float:
    """Reads files one after the other, until the time or the number of bytes is used up; returns the bytes."""
    num_bytes, deadline = 0, time.perf_counter() + request.seconds
    for path in files:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while piece := file.read(PIECE_BYTES):
                num_bytes += len(piece)
        if num_bytes >= request.num_bytes or time.perf_counter() > deadline:
            break
    if not num_bytes:
        raise OSError("the files of the data are empty")
    return float(num_bytes)
