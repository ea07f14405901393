"""Makes a command independent of user, home, locale and who reads its output; sets the priority of others."""

from __future__ import annotations

import errno
import getpass
import io
import logging
import os
import select
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast

from orchestrator.files import APPLICATION

MAX_WAIT_SECONDS = 5.0
"""Longest wait for somebody to read a run's output."""

TERMINAL_PIECE = 128
"""Bytes that a terminal takes at once where it takes any, line ends and what it puts there included."""


class LastingFile(io.FileIO):
    """Goes on without output where it cannot be written: hours of training do not end with it, or wait for it.

    Its reader may be gone (`… | head`), its terminal closed, or the disk full that it is redirected to. With
    `max_wait_seconds`, output that nobody reads for so long (Ctrl-S, `… | less` left alone) is dropped until somebody
    reads again; a run's files have everything.
    """

    max_wait_seconds: float | None = None
    """None for no limit."""
    _stalled = False

    def write(self, data: Any, /) -> int:
        """Writes bytes; once nobody can read them any more, all further ones go nowhere."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            if self.max_wait_seconds is None:
                return super().write(rest) or 0
            piece = TERMINAL_PIECE if self.isatty() else select.PIPE_BUF
            while rest and self._wait_for_reader(self.max_wait_seconds):
                rest = rest[super().write(rest[:piece]) or 0 :]
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)
        return size

    def _wait_for_reader(self, seconds: float) -> bool:
        """Waits until a piece can be written without waiting, not at all after one such wait in vain."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        self._stalled = not poll.poll(0 if self._stalled else seconds * 1000)
        return not self._stalled


def prepare_process() -> None:
    """Completes what libraries expect of a process, for it and its children; a command calls it first.

    In a container, a user id may have no name and no home, or one that cannot be written. Importing MLflow then fails,
    and caches are lost. What the environment names stays as it is. Where the locale's encoding lacks a letter, it is
    printed as `?`. Output that cannot be written ends nothing.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed (`>&-`): the next file that is opened would have this number, and get what is printed
            os.open(os.devnull, os.O_RDWR)
    before = sys.stderr
    sys.stdout, sys.stderr = _lasting(sys.stdout, 1), _lasting(sys.stderr, 2)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(sys.stderr)
    os.environ.setdefault("USER", user_name())
    if not os.path.isabs(os.path.expanduser("~")):  # noqa: PTH111, PTH117 - Path.home() raises where there is none
        os.environ["HOME"] = "/"  # as container runtimes do
    if not os.access(Path.home(), os.W_OK):
        room = _private_folder()
        for name, folder in (("XDG_CACHE_HOME", "cache"), ("MPLCONFIGDIR", "matplotlib")):
            os.environ.setdefault(name, str(room / folder))


def drop_unread_output(*streams: TextIO) -> None:
    """Has output dropped that nobody reads for `MAX_WAIT_SECONDS`, of streams that `prepare_process` has prepared."""
    for stream in streams:
        file = getattr(stream, "buffer", None)
        file = getattr(file, "raw", file)
        if isinstance(file, LastingFile):
            file.max_wait_seconds = MAX_WAIT_SECONDS


def _lasting(stream: TextIO | None, number: int) -> TextIO:
    """A standard stream that outlives its reader; one that is none of the process's (a test's) stays."""
    if not isinstance(stream, io.TextIOWrapper | None):
        return stream
    try:
        raw = LastingFile(stream.fileno() if stream else number, "wb", closefd=False)
    except OSError:  # it is in memory
        return cast("TextIO", stream)
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(raw), errors="replace")
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # unbuffered, as Python has it
        encoding=stream.encoding,
        errors="replace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


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


def lower_priority(pid: int) -> None:
    """Lets a process that leads a session of its own have what CPU time all others leave."""
    _set_niceness(pid, 19, "19")


def restore_priority(pid: int) -> None:
    """Gives such a process this one's priority, where the user may do so."""
    _set_niceness(pid, os.getpriority(os.PRIO_PROCESS, 0), str(session_niceness(os.getpid())))


def session_niceness(pid: int) -> int:
    """Niceness of a process's session, -20 to 19; 0 where Linux has none for it.

    `/proc/[pid]/autogroup` is absent without CONFIG_SCHED_AUTOGROUP, and empty for a process none of whose parents has
    begun a session since the machine's start, as in many containers (kernel/sched/autogroup.c).
    """
    try:
        return int(Path(f"/proc/{pid}/autogroup").read_text(encoding="ascii").split()[-1])
    except (OSError, ValueError, IndexError):
        return 0


def _set_niceness(pid: int, of_process: int, of_session: str) -> None:
    with suppress(OSError):  # not everybody may give a process a higher priority again
        os.setpriority(os.PRIO_PROCESS, pid, of_process)
    # Linux may share the CPUs by sessions: niceness does not count between them.
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(of_session)
