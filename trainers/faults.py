"""Injects faults for tests and `make chaos`: without `$BENCHMARK_FAULTS`, nothing here does anything.

The variable names a JSON file that lists faults, and is read again when it changes. A fault happens when the loop marks
the beginning of a part of an iteration, so the loop itself contains no code for it. Each fault is logged next to the
file before it happens, because a test whose fault never fired proves nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from trainers.batching import Batch
from trainers.contract.events import Section
from trainers.pulse import Activity
from trainers.speedups.padded_batch import PaddedBatch

VARIABLE = "BENCHMARK_FAULTS"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    kind: Literal[
        "kill", "crash", "abort", "freeze", "terminate", "interrupt", "stall", "hold", "deadlock", "hold_gil", "raise",
        "raise_async", "exit", "gpu_error", "out_of_memory", "nan",
    ]  # fmt: skip
    """Signals to its own process: `kill` (SIGKILL), `crash` (SIGSEGV), `abort` (SIGABRT), `freeze` (SIGSTOP),
    `terminate` (SIGTERM), `interrupt` (SIGINT). What never returns: `stall` (the training thread sleeps), `hold` (it
    sleeps until the file is gone), `deadlock` (it waits for its own lock), `hold_gil` (C code that keeps all Python
    threads waiting). Exceptions: `raise` (one that nobody expects), `raise_async` (raised by another thread), `exit`
    (SystemExit), `gpu_error` (torch's of a GPU that failed), `out_of_memory`. `nan`: in the images of the batch."""
    rank: int
    iteration: int | None
    """Iterations done; None for the next that comes to its place."""
    attempt: int | None = 0
    """None for every one."""
    section: Section = "step"
    part: str = "forward"
    """Part of a step; not read in other sections."""


def fired(path: Path) -> list[dict[str, Any]]:
    """What has fired so far, with the `time` at which it did (Unix seconds)."""
    notes = path.with_suffix(".fired")
    return [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()] if notes.exists() else []


def from_environment(rank: int, attempt: int) -> Injector | None:
    """The faults of this rank in this attempt; None where none are configured."""
    path = Path(os.environ.get(VARIABLE, ""))
    if not path.is_file():
        return None
    return Injector(path, rank, attempt)


def _with_nan(batch: Batch) -> Batch:
    if isinstance(batch.inputs, PaddedBatch):
        return replace(batch, inputs=replace(batch.inputs, images=_nan_like(batch.inputs.images)))
    return replace(batch, inputs=[{**record, "image": _nan_like(record["image"])} for record in batch.inputs])


def _nan_like(images: torch.Tensor) -> torch.Tensor:
    return torch.full_like(images, torch.nan, dtype=torch.float32)


def _deadlock() -> None:
    lock = threading.Lock()
    with lock, lock:
        pass


def _raise(error: BaseException) -> None:
    raise error


def _raise_async() -> None:
    here = ctypes.c_ulong(threading.get_ident())
    raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc
    other = threading.Thread(target=raise_in_thread, args=(here, ctypes.py_object(RuntimeError)))
    other.start()
    other.join()


SIGNALS = {
    "kill": signal.SIGKILL,
    "crash": signal.SIGSEGV,
    "abort": signal.SIGABRT,
    "freeze": signal.SIGSTOP,
    "terminate": signal.SIGTERM,
    "interrupt": signal.SIGINT,
}

HAPPENINGS: dict[str, Callable[[], object]] = {
    "stall": lambda: time.sleep(3600),
    "deadlock": _deadlock,
    "hold_gil": lambda: ctypes.PyDLL(None).sleep(3600),
    "raise": lambda: _raise(RuntimeError("a fault on purpose")),
    "raise_async": _raise_async,
    "exit": lambda: _raise(SystemExit(1)),
    "gpu_error": lambda: _raise(RuntimeError("CUDA error: an illegal memory access was encountered")),
    "out_of_memory": lambda: torch.empty(1 << 48, dtype=torch.uint8),
}


class Injector(Activity):
    """An `Activity` that causes a fault when its place in the loop is entered."""

    def __init__(self, path: Path, rank: int, attempt: int) -> None:
        super().__init__()
        self._path, self._rank, self._attempt = path, rank, attempt
        self._read = 0  # the file as of this time (ns)
        self._faults: list[Fault] = []

    def enter(self, section: Section, part: str = "") -> None:
        """Marks the beginning of a section, or of a part of a step, and causes its fault if there is one."""
        super().enter(section, part)
        for fault in self._due():
            place = (fault.section, fault.part if section == "step" else part)
            if fault.kind != "nan" and place == (section, part):
                self._happen(fault)

    def poison(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the images of those that have a `nan` fault made NaN."""
        for batch in batches:
            poisoned = batch
            for fault in self._due():
                if fault.kind == "nan":
                    self._note(fault)
                    poisoned = _with_nan(batch)
            yield poisoned

    def _due(self) -> list[Fault]:
        """The faults of this iteration, by the file as it is now."""
        with suppress(FileNotFoundError):  # a worker that was held may go on
            changed = self._path.stat().st_mtime_ns
            if changed != self._read:
                listed = [Fault(**values) for values in json.loads(self._path.read_text(encoding="utf-8"))]
                own = [fault for fault in listed if fault.rank == self._rank]
                self._read, self._faults = changed, [f for f in own if f.attempt in (None, self._attempt)]
        return [fault for fault in self._faults if fault.iteration in (None, self.iteration)]

    def _happen(self, fault: Fault) -> None:
        self._note(fault)
        if fault.iteration is None:
            self._faults.remove(fault)
        if fault.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault.kind])
            if fault.kind != "interrupt":  # Ray's workers ignore that one; others are handled a little later
                time.sleep(3600)
        elif fault.kind == "hold":
            while self._path.exists():
                time.sleep(0.1)
        else:
            HAPPENINGS[fault.kind]()

    def _note(self, fault: Fault) -> None:
        with self._path.with_suffix(".fired").open("a", encoding="utf-8") as notes:
            notes.write(json.dumps({**asdict(fault), "time": time.time()}) + "\n")
