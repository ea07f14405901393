"""The folder of a run that begins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.experiment.paths import absolute

if TYPE_CHECKING:
    from orchestrator.experiment.spec import Experiment


def new_run_dir(experiment: Experiment, output: Path | None) -> Path:
    """The folder that a run would have which began now; nothing is written.

    It is the given one, else `storage.path`/EXPERIMENT/UTC-TIME, with a number where there is one of this second.
    """
    if output is not None:
        return absolute(output, "--output")
    return next(folder for folder in _folders(experiment) if not os.path.lexists(folder))


@contextmanager
def begin_run_dir(experiment: Experiment, output: Path | None) -> Iterator[Path]:
    """The same for a run that begins now: unless it is given, it is made, so that no other run has it.

    Where nothing was written into it in the end, it is removed again. Where it cannot be made, preflight says why.
    """
    folder, made = (absolute(output, "--output"), list[Path]()) if output is not None else _make(experiment)
    try:
        yield folder
    finally:
        with suppress(OSError):  # it is in use
            for each in made:
                each.rmdir()


def time_stamp() -> str:
    """This second, as it is in a folder's name."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")


def _make(experiment: Experiment) -> tuple[Path, list[Path]]:
    """Makes a new folder; returns it, and all that was made, the innermost first."""
    for folder in _folders(experiment):
        absent = list(takewhile(lambda parent: not os.path.lexists(parent), folder.parents))
        try:
            folder.mkdir(parents=True)
        except OSError:
            if not os.path.lexists(folder):
                return folder, []
        else:
            return folder, [folder, *absent]
    raise AssertionError("there is a number for every folder")


def _folders(experiment: Experiment) -> Iterator[Path]:
    first = absolute(experiment.storage.path, "storage.path") / experiment.name / time_stamp()
    yield first
    yield from (first.with_name(f"{first.name}-{number}") for number in count(2))
