"""Paths as people give them: with `~` or `~user`, and with names that records and libraries must be able to take."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.request import url2pathname

from orchestrator.experiment.spec import SpecError
from orchestrator.files import absolute_path, expand_home, require_utf8

_FILE_ADDRESS = re.compile(r"file:(?://)?(?=/(?!/))")
"""What an address of a file of this machine begins with; of several slashes, a Path keeps one."""

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*:/")
_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{\w+\})")


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


def local_path(path: str | Path, place: str) -> Path:
    """The path that is meant, `expanded`; of `file:///…`, the part that is one.

    Raises:
        SpecError: There is no such home folder, it is an address (of which slashes may be lost), or it holds the name
            of a variable, which nothing replaces, and there is no such folder or file.
    """
    text = str(path)
    if match := _FILE_ADDRESS.match(text):  # as people write it next to `s3://…`; pyarrow would not make its folders
        return Path(url2pathname(text[match.end() :]))
    if _ADDRESS.match(text):
        what = "a path is wanted; addresses, with two slashes (s3://…), are for storage.checkpoints and model.weights"
        raise SpecError(f"{place}: {text}: {what} only")
    found = expanded(path, place)
    if variable := unreplaced_variable(found):
        what = f"{variable} is not replaced by the variable's value here; write the path out"
        raise SpecError(f"{place}: {text}: {what}")
    return found


def unreplaced_variable(path: Path) -> str | None:
    """The `$NAME` or `${NAME}` in a path of which there is no such folder or file."""
    named = ((part, _VARIABLE.search(part.name)) for part in (path, *path.parents))
    return next((variable[0] for part, variable in named if variable and not os.path.lexists(part)), None)


def absolute(path: str | Path, place: str) -> Path:
    """The absolute `local_path`; of what workers open, or a record names.

    Raises:
        SpecError: It is no path of this machine, the working directory was removed, or the path is not UTF-8, as
            pyarrow and JSON need it.
    """
    found = local_path(path, place)
    try:
        found = absolute_path(found)
        require_utf8(found)
    except ValueError as error:
        raise SpecError(f"{place}: {error}") from error
    return found
