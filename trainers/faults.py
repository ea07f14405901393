"""Injects faults for tests and `make chaos`: without `$BENCHMARK_FAULTS`, nothing here does anything.

The variable names a JSON file that lists faults. A fault happens when the loop marks the beginning of a part of an
iteration, so the loop itself contains no code for it. Each fault is logged next to the file before it happens, because
a test whose fault never fired proves nothing.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
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

    kind: Literal["kill", "crash", "freeze", "stall", "hold", "raise", "out_of_memory", "nan"]
    """`kill` (SIGKILL), `crash` (SIGSEGV), `freeze` (SIGSTOP), `stall` (the training thread sleeps), `hold` (it sleeps
    until the file is gone), `raise` (an exception that nobody expects), `out_of_memory`, `nan` (in the images of the
    batch)."""
    rank: int
    iteration: int
    """Iterations done."""
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
    listed = [Fault(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
    return Injector(path, [f for f in listed if f.rank == rank and f.attempt in (None, attempt)])


def _with_nan(batch: Batch) -> Batch:
    if isinstance(batch.inputs, PaddedBatch):
        return replace(batch, inputs=replace(batch.inputs, images=_nan_like(batch.inputs.images)))
    return replace(batch, inputs=[{**record, "image": _nan_like(record["image"])} for record in batch.inputs])


def _nan_like(images: torch.Tensor) -> torch.Tensor:
    return torch.full_like(images, torch.nan, dtype=torch.float32)


class Injector(Activity):
    """An `Activity` that causes a fault when its place in the loop is entered."""

    def __init__(self, path: Path, faults: list[Fault]) -> None:
        super().__init__()
        self._path, self._faults = path, faults

    def enter(self, section: Section, part: str = "") -> None:
        """Marks the beginning of a section, or of a part of a step, and causes its fault if there is one."""
        super().enter(section, part)
        for fault in self._faults:
            place = (fault.section, fault.part if section == "step" else part, fault.iteration)
            if fault.kind != "nan" and place == (section, part, self.iteration):
                self._happen(fault)

    def poison(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the images of those that have a `nan` fault made NaN."""
        for batch in batches:
            poisoned = batch
            for fault in self._faults:
                if fault.kind == "nan" and fault.iteration == self.iteration:
                    self._note(fault)
                    poisoned = _with_nan(batch)
            yield poisoned

    def _happen(self, fault: Fault) -> None:
        self._note(fault)
        signals = {"kill": signal.SIGKILL, "crash": signal.SIGSEGV, "freeze": signal.SIGSTOP}
        if fault.kind in signals:
            os.kill(os.getpid(), signals[fault.kind])
            time.sleep(1)  # the interpreter handles a signal to its own process a little later
        elif fault.kind == "stall":
            time.sleep(3600)
        elif fault.kind == "hold":
            while self._path.exists():
                time.sleep(0.1)
        elif fault.kind == "out_of_memory":
            torch.empty(1 << 48, dtype=torch.uint8)
        else:
            raise RuntimeError("a fault on purpose")

    def _note(self, fault: Fault) -> None:
        with self._path.with_suffix(".fired").open("a", encoding="utf-8") as notes:
            notes.write(json.dumps({**asdict(fault), "time": time.time()}) + "\n")
