"""Saves checkpoints in the background and loads the newest one that verifies against its hash.

A checkpoint is a folder `iter_0001200/` with `state-0.pt` (0: the attempt that wrote it) and `manifest.json`. The
manifest is written last: a folder without one is an interrupted write and does not count. A worker that lost its
connection and is still alive after its trial was started again cannot harm the new attempt: its files have other
names, and it finds itself replaced before it writes a manifest. Ray's checkpoint bookkeeping is not used, because it
overwrites its snapshot file in place and copies without a checksum.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import pickle
import re
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.fs
import torch

from trainers.contract.memory import is_out_of_memory
from trainers.contract.storage import ASIDE, folder_identity, is_unread, write_durably

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
OWNER = "attempt"
"""File with the number of the latest attempt that writes here."""

CONFIRM_RETRY_SECONDS = 1.0
"""How long after a refusal `before_valid` is called again for the last checkpoint."""


class StorageError(OSError):
    """A checkpoint could not be written or read."""


class CheckpointStore:
    """The checkpoints of one trial, written by a background thread, one at a time.

    Args:
        uri: Folder on a local or shared file system, or a URI that pyarrow's file systems know (`s3://…`).
        keep: How many of the newest are kept besides the best.
        attempt: Number of the attempt that writes.
        on_saved: Called from the writing thread for every checkpoint that is complete, with the fields of
            `CheckpointSaved` as keywords.
        on_failed: Called from the writing thread when one could not be written, and training goes on, with the fields
            of `CheckpointFailed`; None raises StorageError at the next save instead.
        on_skipped: Called when a damaged checkpoint is passed over, with the fields of `CheckpointSkipped`.
        before_valid: Called from the writing thread before a checkpoint becomes valid; returns whether it may. It makes
            sure that the driver has stored all earlier events, which a start from this checkpoint would not repeat.
    """

    def __init__(
        self,
        uri: str,
        keep: int,
        attempt: int,
        on_saved: Callable[..., None],
        on_failed: Callable[..., None] | None = None,
        on_skipped: Callable[..., None] = lambda **_: None,
        before_valid: Callable[[], bool] = lambda: True,
    ) -> None:
        self._files, self._root = pyarrow.fs.FileSystem.from_uri(uri)
        self._keep, self._attempt, self._before_valid = keep, attempt, before_valid
        self._on_saved, self._on_failed, self._on_skipped = on_saved, on_failed, on_skipped
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        self._awaited: set[int] = set()
        self._skipped: dict[int, Exception] = {}
        self._folder_identity: tuple[int, int] | None = None

    def save(
        self,
        iteration: int,
        state: dict[str, Any],
        score: float | None,
        since: float | None = None,
        awaited: Collection[int] = (),
        ending: bool = False,
    ) -> None:
        """Takes a snapshot and returns; it is written in the background.

        Args:
            iteration: Iterations trained.
            state: Tensors and plain values, as `torch.load(weights_only=True)` reads back.
            score: The higher the better; None where the model was not evaluated.
            since: When training began to be stalled for it (`time.perf_counter`); None for now.
            awaited: Iterations of which the checkpoints are kept until they are rated, or until another is saved.
            ending: Whether it is the last: `before_valid` is called until it may count, or another attempt writes here.

        Raises:
            StorageError: The previous write failed.
        """
        started = time.perf_counter() if since is None else since
        self.wait()
        snapshot = _to_cpu(state)
        taken = time.perf_counter()
        self._awaited = set(awaited)
        self._pending = [self._writer.submit(self._write, iteration, snapshot, score, ending, started, taken)]

    def wait(self) -> None:
        """Waits for what is being written; raises StorageError where it failed."""
        while self._pending:
            self._pending.pop(0).result()

    def rate(self, iteration: int, score: float) -> None:
        """Adds a score to an older checkpoint, if there still is one of that iteration, after the write in progress."""
        self._pending.append(self._writer.submit(self._rate, iteration, score))

    def take_over(self) -> None:
        """Makes this attempt the one that may write; an earlier one that is still alive notices and gives up.

        Raises:
            StorageError: Nothing can be written, and training may not go on without checkpoints.
        """
        try:
            _write_file(self._files, f"{self._root}/{OWNER}", str(self._attempt).encode())
            if isinstance(self._files, pyarrow.fs.LocalFileSystem):
                for aside in Path(self._root).glob(f"iter_*/*{ASIDE}"):
                    aside.unlink(missing_ok=True)  # of a process that was killed while it wrote
                self._folder_identity = folder_identity(self._root)
        except OSError as error:
            self._fail(0, error)

    def load_newest(self) -> tuple[dict[str, Any], str] | None:
        """The newest checkpoint that verifies and its path; damaged ones are skipped, which is reported.

        Raises:
            StorageError: The folder cannot be read; or no checkpoint loads, and one of them is not damaged but unread.
        """
        try:
            valid, skipped = self._valid()
        except OSError as error:
            raise StorageError(f"{self._root} cannot be read: {error}") from error
        found = None
        for iteration in sorted(valid, reverse=True):
            try:
                found = self.load(iteration)
                break
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
                if is_out_of_memory(error):  # no fault of the checkpoint
                    raise
                # Its traceback holds the content.
                self._skipped[iteration] = skipped[self._folder(iteration)] = error.with_traceback(None)
        unread = next(filter(is_unread, skipped.values()), None)
        if unread and not found:
            raise StorageError(f"no checkpoint under {self._root} can be read: {unread}") from unread
        for path, reason in skipped.items():
            message = f"{type(reason).__name__}: {reason}" if isinstance(reason, KeyError) else str(reason)
            logger.warning("checkpoint %s is damaged and is skipped: %s", path, message)
            self._on_skipped(path=path, message=message)
        return found

    def load(self, iteration: int) -> tuple[dict[str, Any], str]:
        """The checkpoint of an iteration and its path.

        Raises:
            OSError: It cannot be read.
            ValueError: It is damaged.
        """
        folder = self._folder(iteration)
        manifest = json.loads(self._read(f"{folder}/{MANIFEST}"))
        ((name, file),) = manifest["files"].items()
        content = self._read(f"{folder}/{name}")
        if hashlib.sha256(content).hexdigest() != file["sha256"]:
            raise ValueError("its SHA-256 is not the manifest's")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), folder

    def _folder(self, iteration: int) -> str:
        return f"{self._root}/iter_{iteration:07d}"

    def _read(self, path: str) -> bytes:
        with self._files.open_input_stream(path) as stream:
            content: bytes = stream.read()
            return content

    def _write(
        self, iteration: int, state: dict[str, Any], score: float | None, ending: bool, started: float, taken: float
    ) -> None:
        folder = self._folder(iteration)
        try:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            content = buffer.getvalue()
            name = f"state-{self._attempt}.pt"
            self._check_folder()
            _write_file(self._files, f"{folder}/{name}", content)
            manifest = {
                "iteration": iteration,
                "attempt": self._attempt,
                "time": time.time(),
                "score": score,
                "files": {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}},
            }
            while not self._before_valid():
                logger.warning("the checkpoint of iteration %d does not count: the driver lacks its events", iteration)
                if not ending:  # the next one makes up for it
                    return
                self._check_owner()
                time.sleep(CONFIRM_RETRY_SECONDS)
            self._check_owner()
            _write_file(self._files, f"{folder}/{MANIFEST}", json.dumps(manifest, indent=2).encode())
            self._skipped.pop(iteration, None)
        except OSError as error:
            self._fail(iteration, error)
            return
        self._on_saved(
            iteration=iteration,
            path=folder,
            size_bytes=len(content),
            stall_seconds=taken - started,
            write_seconds=time.perf_counter() - taken,
        )
        try:
            self._prune()
        except OSError as error:
            logger.warning("old checkpoints under %s could not be deleted: %s", self._root, error)

    def _rate(self, iteration: int, score: float) -> None:
        path = f"{self._folder(iteration)}/{MANIFEST}"
        try:
            self._check_owner()
            manifest = json.loads(self._read(path)) | {"score": score}
            _write_file(self._files, path, json.dumps(manifest, indent=2).encode())
        except (OSError, ValueError) as error:
            logger.info("there is no checkpoint of iteration %d to add a score to: %s", iteration, error)

    def _fail(self, iteration: int, error: OSError) -> None:
        message = f"the checkpoint of iteration {iteration} could not be written to {self._root}: {error}"
        logger.error(message)
        if self._on_failed is None or isinstance(error, StorageError):
            raise StorageError(message) from error
        self._on_failed(iteration=iteration, message=message)

    def _check_folder(self) -> None:
        """Makes sure that nothing is written into a folder that somebody put in the place of this trial's."""
        if self._folder_identity is not None and folder_identity(self._root) != self._folder_identity:
            raise FileNotFoundError(errno.ENOENT, "the folder was removed or replaced while the trial ran", self._root)

    def _check_owner(self) -> None:
        self._check_folder()
        try:
            owner = int(self._read(f"{self._root}/{OWNER}"))
        except (OSError, ValueError):  # lost or torn: no attempt has taken over since
            return
        if owner > self._attempt:
            raise StorageError(f"attempt {owner} writes here now; this one was given up")

    def _valid(self) -> tuple[dict[int, float | None], dict[str, Exception]]:
        """Iteration and score of every checkpoint that has a readable manifest; and why others have none, by path."""
        found, damaged = dict[int, float | None](), dict[str, Exception]()
        selector = pyarrow.fs.FileSelector(self._root, allow_not_found=True, recursive=True)
        for path in (info.path for info in self._files.get_file_info(selector) if info.base_name == MANIFEST):
            try:
                manifest = json.loads(self._read(path))
                found[int(manifest["iteration"])] = manifest["score"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                damaged[path] = error
        return found, damaged

    def _prune(self) -> None:
        """Deletes all but the newest, the best and the awaited, and the remains of interrupted writes.

        One that was skipped counts as neither until it is written again, and stays where it may be whole.
        """
        valid, damaged = self._valid()
        whole = valid.keys() - self._skipped.keys()
        kept = self._awaited | set(sorted(whole)[-self._keep :])
        scored = {iteration: score for iteration in whole if (score := valid[iteration]) is not None}
        if scored:
            kept.add(max(scored, key=lambda iteration: (scored[iteration], iteration)))
        for info in self._files.get_file_info(pyarrow.fs.FileSelector(self._root)):
            match = re.fullmatch(r"iter_(\d+)", info.base_name)
            if not match or int(match[1]) in kept or int(match[1]) > max(whole, default=0):
                continue
            if is_unread(damaged.get(f"{info.path}/{MANIFEST}", self._skipped.get(int(match[1])))):
                logger.warning("checkpoint %s is kept, because it could not be read", info.path)
                continue
            # The manifest goes first: a half-deleted checkpoint must not look valid.
            if int(match[1]) in valid:
                self._files.delete_file(f"{info.path}/{MANIFEST}")
            self._files.delete_dir(info.path)


def _write_file(files: pyarrow.fs.FileSystem, path: str, content: bytes) -> None:
    """Makes a file appear whole or not at all."""
    if not isinstance(files, pyarrow.fs.LocalFileSystem):
        with files.open_output_stream(path) as stream:  # an object appears when its upload is complete
            stream.write(content)
        return
    write_durably(Path(path), content)


def _to_cpu(value: Any) -> Any:
    """A copy of a state that later training steps do not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_cpu(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_cpu(inner) for inner in value)
    return value
