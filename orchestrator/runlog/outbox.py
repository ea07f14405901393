"""The outbox: every event of a run on disk, `events.jsonl` in the run's folder.

Results, tracking and the progress display are made from it alone. What is in it survives the driver; a torn last line,
left by a crash, is cut off when the file is opened for writing again.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from trainers.contract.events import Event, event_from_json

FILE_NAME = "events.jsonl"


class Outbox:
    """The events of a run, one JSON line each, in the order they were received.

    Args:
        path: The file; created when the first event is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._checked = False

    def append(self, *events: Event) -> None:
        """Writes events to disk before it returns, all of them or none.

        Raises:
            OSError: They could not be written.
        """
        content = "".join(f"{event.to_json()}\n" for event in events).encode()
        with self._lock:
            if not self._checked:
                self._cut_torn_line()
                self._checked = True
            with self.path.open("ab", buffering=0) as file:
                end = file.tell()
                try:
                    written = file.write(content)
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
                if written < len(content):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def read(self, offset: int = 0) -> Iterator[tuple[Event, int]]:
        """The events from a byte offset on, each with the offset after it; a line still being written is left."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield event_from_json(line.decode()), offset

    def _cut_torn_line(self) -> None:
        if self.path.exists():
            content = self.path.read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)
