"""Files, addresses and the user: atomic writes, checksums, home and cache folder, what of an address may be shown."""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import stat
import tempfile
import uuid
from pathlib import Path

APPLICATION = "ray-detectron2-benchmark"
"""Name of this program's folder in the user's cache folder."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file (text as UTF-8) so that a reader sees the old content or the new, never a part; makes its folder.

    Raises:
        OSError: It cannot be written; the old content is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in chunks. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists and can be seen."""
    return next(each for each in (path, *path.parents) if os.path.exists(each))  # noqa: PTH110 - Path.exists() may raise


def cache_folder() -> Path:
    """This program's folder in the user's cache folder, `$XDG_CACHE_HOME` or `~/.cache`; it may not exist yet."""
    import platformdirs

    return platformdirs.user_cache_path(APPLICATION, appauthor=False)


def user_name() -> str:
    """The user's name, or the number of a user id that has none (OpenShift, `docker run --user`)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the former up to Python 3.12
        return str(os.getuid())


def complete_user_environment() -> None:
    """Gives this process and its children what libraries expect of a user: a name, a home, and room for caches.

    In a container, a user id may have no name and no home, or one that cannot be written. Importing MLflow then fails,
    and caches are lost. What the environment names stays as it is.
    """
    os.environ.setdefault("USER", user_name())
    if not os.path.isabs(os.path.expanduser("~")):  # noqa: PTH111, PTH117 - Path.home() raises where there is none
        os.environ["HOME"] = "/"  # as container runtimes do
    if not os.access(Path.home(), os.W_OK):
        room = _private_folder()
        for name, folder in (("XDG_CACHE_HOME", "cache"), ("MPLCONFIGDIR", "matplotlib")):
            os.environ.setdefault(name, str(room / folder))


def _private_folder() -> Path:
    """A folder in the temporary folder that only this user can use; always the same, unless someone else took it."""
    folder = Path(tempfile.gettempdir(), f"{APPLICATION}-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    is_ours = stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o077
    return folder if is_ours else Path(tempfile.mkdtemp(prefix=f"{APPLICATION}-"))


def without_credentials(text: str) -> str:
    """Text with `user:password@` taken out of every address in it, which stays an address."""
    return re.sub(r"://[^/?#\s]*@", "://", text)


def redact(text: str) -> str:
    """Text for messages: of addresses, the user and password and everything after a `?` are replaced by `…`."""
    return re.sub(r"\?.*", "?…", re.sub(r"//[^/\s]*@", "//…@", text))
