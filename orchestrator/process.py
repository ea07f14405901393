"""Makes a command independent of where it is started: of user, home, locale, and who reads its output."""

from __future__ import annotations

import getpass
import io
import os
import stat
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from orchestrator.files import APPLICATION


class LastingConsole(Console):
    """Goes on without output where its reader is gone (`… | head`): hours of training do not end with it."""

    def on_broken_pipe(self) -> None:
        """Sends all further output to nowhere."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def prepare_process() -> None:
    """Completes what libraries expect of a process, for it and its children; a command calls it first.

    In a container, a user id may have no name and no home, or one that cannot be written. Importing MLflow then fails,
    and caches are lost. What the environment names stays as it is. Where the locale's encoding lacks a letter, it is
    printed as `?`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("USER", user_name())
    if not os.path.isabs(os.path.expanduser("~")):  # noqa: PTH111, PTH117 - Path.home() raises where there is none
        os.environ["HOME"] = "/"  # as container runtimes do
    if not os.access(Path.home(), os.W_OK):
        room = _private_folder()
        for name, folder in (("XDG_CACHE_HOME", "cache"), ("MPLCONFIGDIR", "matplotlib")):
            os.environ.setdefault(name, str(room / folder))


def user_name() -> str:
    """The user's name, or the number of a user id that has none (OpenShift, `docker run --user`)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the former up to Python 3.12
        return str(os.getuid())


def _private_folder() -> Path:
    """A folder in the temporary folder that only this user can use; always the same, unless someone else took it."""
    folder = Path(tempfile.gettempdir(), f"{APPLICATION}-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    is_ours = stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o077
    return folder if is_ours else Path(tempfile.mkdtemp(prefix=f"{APPLICATION}-"))
