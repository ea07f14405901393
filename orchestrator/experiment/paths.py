"""Paths as people give them: with `~` or `~user`, and with names that records and libraries must be able to take."""

from __future__ import annotations

from pathlib import Path

from orchestrator.experiment.spec import SpecError
from orchestrator.findings import printable


def expanded(path: str | Path, place: str) -> Path:
    """A path with the home folder in place of its `~` or `~user`.

    Args:
        path: As it was given.
        place: What gives it, such as `--output`; opens the message.

    Raises:
        SpecError: There is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        start = Path(path).parts[0]
        raise SpecError(f"{place}: {path}: {start} is no user's home folder here; give the whole path") from error


def absolute(path: str | Path, place: str) -> Path:
    """The absolute path, `expanded`; of what workers open, or a record names.

    Raises:
        SpecError: There is no such home folder, or the path is not UTF-8, as pyarrow and JSON need it.
    """
    found = expanded(path, place).absolute()
    try:
        str(found).encode()
    except UnicodeEncodeError as error:
        shown = printable(str(found))
        raise SpecError(f"{place}: {shown}: a name in it is not UTF-8; rename it, or give another path") from error
    return found
