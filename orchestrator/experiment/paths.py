"""Paths as people give them: with `~` or `~user`, and with names that records and libraries must be able to take."""

from __future__ import annotations

from pathlib import Path

from orchestrator.experiment.spec import SpecError
from orchestrator.files import absolute_path, expand_home, require_utf8


def expanded(path: str | Path, place: str) -> Path:
    """A path with the home folder in place of its `~` or `~user`.

    Args:
        path: As it was given.
        place: What gives it, such as `--output`; opens the message.

    Raises:
        SpecError: There is no such home folder.
    """
    try:
        return expand_home(path)
    except ValueError as error:
        raise SpecError(f"{place}: {error}") from error


def absolute(path: str | Path, place: str) -> Path:
    """The absolute path, `expanded`; of what workers open, or a record names.

    Raises:
        SpecError: There is no such home folder, the working directory was removed, or the path is not UTF-8, as pyarrow
            and JSON need it.
    """
    found = expanded(path, place)
    try:
        found = absolute_path(found)
        require_utf8(found)
    except ValueError as error:
        raise SpecError(f"{place}: {error}") from error
    return found
