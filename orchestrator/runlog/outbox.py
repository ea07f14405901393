"""The outbox: every event of a run on disk, `events.jsonl` in the run's folder.

Results, tracking and the progress display are made from it alone. What is in it survives the driver; a torn last line,
left by a crash, is cut off when the file is opened for writing again.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from orchestrator.findings import root_cause
from trainers.contract.events import Event, TrialEnded, event_from_json

FILE_NAME = "events.jsonl"


class RunFolderError(OSError):
    """A run's folder cannot be written, or is no longer the run's; the text is one line.

    Args:
        text: What is wrong, with the folder.
        gone: Whether the run's files are no longer there, so that waiting cannot help.
    """

    def __init__(self, text: str, *, gone: bool = False) -> None:
        super().__init__(text)
        self.gone = gone


class _Identity(NamedTuple):
    device: int
    inode: int


class Outbox:
    """The events of a run, one JSON line each, in the order they were received.

    The file is always the one that was read or written first: one that was put in its place is not touched.

    Args:
        path: The file; created when the first event is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._identity: _Identity | None = None
        self._end: int | None = None

    def append(self, *events: Event) -> None:
        """Writes events to disk before it returns, all of them or none.

        Raises:
            RunFolderError: They could not be written.
        """
        content = "".join(f"{event.to_json()}\n" for event in events).encode()
        with self._lock, self._translated():
            descriptor = self._open()
            try:
                if self._end is None:
                    _cut_torn_line(descriptor)
                self._end = os.fstat(descriptor).st_size
                _write_all(descriptor, content, self._end)
                self._end += len(content)
            finally:
                os.close(descriptor)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """For other writes into the run's folder: only while it is the run's.

        Raises:
            RunFolderError: It is not, or the writes fail.
        """
        with self._translated():
            status = self.path.stat()
            if self._identity not in (None, (status.st_dev, status.st_ino)):
                raise self._gone("was replaced")
            yield

    def read(self, offset: int = 0) -> Iterator[tuple[Event, int]]:
        """The events from a byte offset on, each with the offset after it.

        A line still being written is left, one that cannot be read is left out (`damage` reports it).

        Raises:
            RunFolderError: It is not the file that was read or written before.
        """
        for line, after in self._lines(offset):
            with suppress(ValueError):
                yield event_from_json(line.decode()), after

    def before(self, offset: int, size: int = 4096) -> bytes:
        """The bytes before an offset, at most so many; none where the file is shorter."""
        if not self.path.exists() or self.path.stat().st_size < offset:
            return b""
        with self.path.open("rb") as file:
            file.seek(max(0, offset - size))
            return file.read(min(size, offset))

    def damage(self) -> dict[str, tuple[int, ...]]:
        """Numbers of the lines that cannot be read, from 1, by the trials among whose events they are.

        Where several trials were under way, a line may be any one's: all have it.
        """
        damaged: dict[str, list[int]] = {}
        last, live = "", set[str]()
        unassigned: list[int] = []
        for number, (line, _) in enumerate(self._lines(0), start=1):
            try:
                event = event_from_json(line.decode())
                last = event.trial or last
                (live.discard if isinstance(event, TrialEnded) else live.add)(event.trial)
            except ValueError:
                unassigned.append(number)
            if last and unassigned:
                for trial in live - {""} or {last}:
                    damaged.setdefault(trial, []).extend(unassigned)
                unassigned = []
        if unassigned:
            damaged[""] = unassigned
        return {name: tuple(numbers) for name, numbers in damaged.items()}

    def _lines(self, offset: int) -> Iterator[tuple[bytes, int]]:
        if self._identity is None and not self.path.exists():
            return
        with self._translated():
            file = self.path.open("rb")
        with file:
            self._recognise(file.fileno())
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield line, offset

    def _open(self) -> int:
        """Opens it for writing at its end, as it was left."""
        create = os.O_CREAT if self._identity is None else 0
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | create, 0o666)
        try:
            self._recognise(descriptor)
            size = os.fstat(descriptor).st_size
            if self._end is not None and size != self._end:
                raise self._gone(f"was changed from outside: it has {size:,} bytes, not {self._end:,}")
        except RunFolderError:
            os.close(descriptor)
            raise
        return descriptor

    def _recognise(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        found = _Identity(status.st_dev, status.st_ino)
        self._identity = self._identity or found
        if found != self._identity:
            raise self._gone("was replaced")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except RunFolderError:
            raise
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError) and not self.path.exists():
                how = "was removed" if self.path.parent.exists() else "was removed with its folder"
                raise self._gone(how) from error
            raise RunFolderError(f"{self.path.parent} cannot be written: {root_cause(error)}") from error

    def _gone(self, what: str) -> RunFolderError:
        return RunFolderError(f"{self.path} {what}", gone=True)


def _cut_torn_line(descriptor: int) -> None:
    content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.ftruncate(descriptor, whole)


def _write_all(descriptor: int, content: bytes, end: int) -> None:
    """Writes all of some bytes to the end of a file, or leaves it as it was; raises OSError."""
    written = 0
    try:
        written = os.write(descriptor, content)
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, end)
        raise
    if written < len(content):
        os.ftruncate(descriptor, end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
