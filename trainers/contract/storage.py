"""Writes files that last, and recognises storage that is full, read-only, gone or unread. Standard library only."""

from __future__ import annotations

import errno
import os
from pathlib import Path

ASIDE = ".aside"
"""End of the name that a file has until it is complete."""

_FULL_OR_BROKEN = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG}
_WITH_A_FILE = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR}
"""Of a file: sockets and processes have these errors too, and starting again may help there."""

_WORDS = ("No space left on device", "Disk quota exceeded", "Read-only file system")
"""As the operating system says it; a library's exception may keep no more of it."""


def is_storage_failure(error: BaseException) -> bool:
    """Whether an exception, or what caused it, says that files cannot be written, or that a file is gone."""
    if isinstance(error, OSError) and (
        error.errno in _FULL_OR_BROKEN or (error.errno in _WITH_A_FILE and error.filename is not None)
    ):
        return True
    if any(word in str(error) for word in _WORDS):
        return True
    return error.__cause__ is not None and is_storage_failure(error.__cause__)


def is_unread(error: Exception | None) -> bool:
    """Whether a file may be whole and cannot be read now; S3's errors have no number, but for an absent object."""
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)


def write_durably(target: Path, content: bytes) -> None:
    """Makes a file appear whole or not at all, and makes it last through a power failure; makes its folder.

    Raises:
        OSError: It cannot be written; nothing of it is left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{target.name}.{os.getpid()}{ASIDE}")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
        for folder in (target.parent, target.parent.parent):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError:
        aside.unlink(missing_ok=True)  # half a file would fill what is left of a full disk
        raise


def folder_identity(folder: str) -> tuple[int, int] | None:
    """What tells a folder from another one at the same path; None where there is none."""
    try:
        status = Path(folder).stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
