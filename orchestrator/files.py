"""Files and addresses: atomic writes, checksums, the cache folder, and what of an address may be shown."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from pathlib import Path

APPLICATION = "ray-detectron2-benchmark"
"""Name of this program's folder in the user's cache folder."""

_LOGIN = r"[^/?#\s@:\[\"']*:(?!/|\d+(?:[/?#\s]|$))[^\s@\"']{0,4096}@"
"""`user:password@`, also where the password holds signs that had to be escaped; a host with its port is none."""

_USER = rf"(?:[^/?#\s,;]*@|{_LOGIN})"

_ACCESS_OPTION = (
    r"([?&](?:(?:[\w.-]{0,40}[._-])?"
    r"(?:token|secret|password|passwd|credential|signature|(?:api|access|account|private|secret)[_-]?key)|sig)=)"
    r"[^&#\s\"']+"
)
"""An option of an address that lets its reader in, such as a signature for a limited time."""

_CREDENTIALS = re.compile(
    # A user alone is a token to some servers, and in other addresses a container or an account.
    rf"(?:https?|s3)://{_USER}|://[^/?#\s:@]*:[^/?#\s]*@|://{_LOGIN}|://\S{{0,4096}}?{_ACCESS_OPTION}",
    re.IGNORECASE,
)


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


def is_file(path: str | Path) -> bool:
    """Whether there is a file; no where it cannot be seen or the name cannot be one, for which Path's method raises."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder; as `is_file`."""
    return os.path.isdir(path)  # noqa: PTH112


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists and can be seen."""
    return next(each for each in (path, *path.parents) if os.path.exists(each))  # noqa: PTH110 - Path.exists() may raise


def expand_home(path: str | Path) -> Path:
    """A path with the home folder in place of its `~` or `~user`. Raises ValueError: there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        start = Path(path).parts[0]
        raise ValueError(f"{path}: {start} is no user's home folder here; give the whole path") from error


def absolute_path(path: Path) -> Path:
    """The absolute path. Raises ValueError: it is relative to a working directory that was removed."""
    try:
        return path.absolute()
    except FileNotFoundError as error:
        what = "the working directory was removed; change to another, or give the whole path"
        raise ValueError(f"{path}: {what}") from error


def is_utf8(path: str | Path) -> bool:
    """Whether every name in a path is UTF-8, as pyarrow and JSON need it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def require_utf8(path: Path) -> None:
    """Raises ValueError where a name in a path is not UTF-8."""
    if not is_utf8(path):
        shown = str(path).encode(errors="backslashreplace").decode()
        raise ValueError(f"{shown}: a name in it is not UTF-8; rename it, or give another path")


def cache_folder() -> Path:
    """This program's folder in the user's cache folder, `$XDG_CACHE_HOME` or `~/.cache`; it may not exist yet."""
    import platformdirs

    return platformdirs.user_cache_path(APPLICATION, appauthor=False)


def without_credentials(text: str) -> str:
    """Text with `user:password@` and the values of secret options taken out of every address, which stays one."""
    return re.sub(_ACCESS_OPTION, r"\1", re.sub(rf"://{_USER}", "://", text), flags=re.IGNORECASE)


def holds_credentials(text: str) -> bool:
    """Whether an address in a text holds a password, a key, a token or a signature."""
    return _CREDENTIALS.search(text) is not None


def redact(text: str) -> str:
    """Text for messages: of addresses, the user and password and everything after a `?` are replaced by `…`."""
    return re.sub(r"\?.*", "?…", re.sub(rf"//{_USER}", "//…@", text))


def has_line(path: Path) -> bool:
    """Whether there is a file with a line; one that was cut off before the end of its first has none."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return file.readline().endswith(b"\n")
