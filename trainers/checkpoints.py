"""Checkpoints that survive: written aside, hashed, made valid by their manifest, read back only when they verify.

A checkpoint is a folder `iter_0001200/` with `state.pt` and `manifest.json`. The manifest is written last, aside and
renamed: a folder without one is an interrupted write and does not count. Ray's own checkpoint bookkeeping is not used;
its snapshot file is overwritten in place and its copies have no checksum.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow.fs
import torch

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.pt"


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is complete in storage.

    Attributes:
        iteration: Iterations trained when it was taken.
        path: Its folder.
        size_bytes: Size of the state.
        stall_seconds: How long training stood still for it.
        write_seconds: From the snapshot to the manifest.
    """

    iteration: int
    path: str
    size_bytes: int
    stall_seconds: float
    write_seconds: float


class CheckpointStore:
    """The checkpoints of one trial; writes in a thread of its own, one at a time.

    Args:
        uri: Folder on a local or shared file system, or a URI that pyarrow's file systems know (`s3://…`).
        keep: How many of the newest are kept besides the best.
        attempt: Number of the attempt, for the manifest.
        on_saved: Called from the writing thread for every checkpoint that is complete.
    """

    def __init__(self, uri: str, keep: int, attempt: int, on_saved: Callable[[Saved], None]) -> None:
        self._files, self._root = pyarrow.fs.FileSystem.from_uri(uri)
        self._keep, self._attempt, self._on_saved = keep, attempt, on_saved
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, iteration: int, state: dict[str, Any], score: float | None) -> None:
        """Takes a snapshot and returns; the write goes on beside training.

        Args:
            iteration: Iterations trained.
            state: Tensors and plain values, as `torch.load(weights_only=True)` reads back.
            score: What the best checkpoint is the best of; None where nothing was evaluated.

        Raises:
            OSError: The write before this one failed.
        """
        started = time.perf_counter()
        self.wait()
        snapshot = _to_cpu(state)
        stall_seconds = time.perf_counter() - started
        self._pending = self._writer.submit(self._write, iteration, snapshot, score, stall_seconds)

    def wait(self) -> None:
        """Waits for the write in progress; raises OSError where it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def load_newest(self) -> tuple[dict[str, Any], str] | None:
        """The newest checkpoint that verifies and its path; damaged ones are skipped with a warning."""
        for iteration in sorted(self._valid(), reverse=True):
            folder = self._folder(iteration)
            try:
                manifest = json.loads(self._read(f"{folder}/{MANIFEST}"))
                content = self._read(f"{folder}/{STATE}")
                if hashlib.sha256(content).hexdigest() != manifest["files"][STATE]["sha256"]:
                    raise ValueError("its SHA-256 is not the manifest's")
                return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), folder
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                logger.warning("checkpoint %s is damaged and is skipped: %s", folder, error)
        return None

    def _folder(self, iteration: int) -> str:
        return f"{self._root}/iter_{iteration:07d}"

    def _read(self, path: str) -> bytes:
        with self._files.open_input_stream(path) as stream:
            content: bytes = stream.read()
            return content

    def _write(self, iteration: int, state: dict[str, Any], score: float | None, stall_seconds: float) -> None:
        started = time.perf_counter()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        folder = self._folder(iteration)
        self._files.create_dir(folder)
        self._put(f"{folder}/{STATE}", content)
        manifest = {
            "iteration": iteration,
            "attempt": self._attempt,
            "time": time.time(),
            "score": score,
            "files": {STATE: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}},
        }
        self._put(f"{folder}/{MANIFEST}", json.dumps(manifest, indent=2).encode())
        self._on_saved(Saved(iteration, folder, len(content), stall_seconds, time.perf_counter() - started))
        self._prune()

    def _put(self, path: str, content: bytes) -> None:
        with self._files.open_output_stream(f"{path}.aside") as stream:
            stream.write(content)
        self._files.move(f"{path}.aside", path)

    def _valid(self) -> dict[int, float | None]:
        """Iteration and score of every checkpoint that has a readable manifest."""
        found: dict[int, float | None] = {}
        selector = pyarrow.fs.FileSelector(self._root, allow_not_found=True, recursive=True)
        for info in self._files.get_file_info(selector):
            if info.base_name != MANIFEST:
                continue
            try:
                manifest = json.loads(self._read(info.path))
                found[int(manifest["iteration"])] = manifest["score"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("checkpoint manifest %s is damaged and is skipped: %s", info.path, error)
        return found

    def _prune(self) -> None:
        valid = self._valid()
        kept = set(sorted(valid)[-self._keep :])
        scored = {iteration: score for iteration, score in valid.items() if score is not None}
        if scored:
            kept.add(max(scored, key=lambda iteration: (scored[iteration], iteration)))
        for iteration in set(valid) - kept:
            # The manifest goes first: a half-deleted checkpoint must not look valid.
            self._files.delete_file(f"{self._folder(iteration)}/{MANIFEST}")
            self._files.delete_dir(self._folder(iteration))


def _to_cpu(value: Any) -> Any:
    """A copy of a state that later training steps do not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_cpu(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_cpu(inner) for inner in value)
    return value


def state_sha256(state: dict[str, Any]) -> str:
    """Hash over every tensor and value of a state, the same for bit-identical states only."""
    digest = hashlib.sha256()

    def add(value: Any, place: str) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{place}:{value.dtype}:{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(value[key], f"{place}.{key}")
        elif isinstance(value, list | tuple):
            for index, inner in enumerate(value):
                add(inner, f"{place}.{index}")
        else:
            digest.update(f"{place}={value!r}".encode())

    add(state, "")
    return digest.hexdigest()
