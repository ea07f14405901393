"""A control group whose memory can be limited, processes in it, and a worker that fills it."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.builders.waiting import wait_for

CGROUPS = Path("/sys/fs/cgroup")

MARKER = "FILLS_MEMORY"
"""Variable of the environment with the file that a worker makes when it begins to fill its memory."""


@dataclass(frozen=True)
class MemoryGroup:
    """The group; of cgroup v1 or v2."""

    folder: Path
    limits: Path
    usage: Path

    def command(self, *command: str) -> list[str]:
        """A command that runs in the group, with all that it starts."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.folder), *command]

    def limit(self, room: int) -> None:
        """Limits the memory to so many bytes more than are in use."""
        self.limits.write_text(str(int(self.usage.read_text()) + room))

    @property
    def kills(self) -> int:
        """How many of its processes the kernel has killed for lack of memory."""
        name = "memory.events" if self.limits.name == "memory.max" else "memory.oom_control"
        counts = dict(line.split() for line in (self.folder / name).read_text().splitlines())
        return int(counts["oom_kill"])

    def lift(self) -> None:
        """Ends the limit."""
        self.limits.write_text("max" if self.limits.name == "memory.max" else "-1")


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """Makes a group; the test is skipped where this machine lets none be made."""
    old = CGROUPS / "memory"
    folder = (old if old.is_dir() else CGROUPS) / f"test-{os.getpid()}"
    limits, usage = ("limit_in_bytes", "usage_in_bytes") if old.is_dir() else ("max", "current")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        group = MemoryGroup(folder, folder / f"memory.{limits}", folder / f"memory.{usage}")
        if not group.limits.exists():
            pytest.skip(f"{folder} has no limit of memory")
        yield group
    finally:
        wait_for(lambda: not (folder / "cgroup.procs").read_text(), seconds=60)
        folder.rmdir()


def filling() -> Callable[[], None]:
    """For `$BENCHMARK_BEFORE_STEP`: fills the memory within the eighth step, until the worker is killed; once."""
    marker, steps = Path(os.environ[MARKER]), itertools.count()

    def fill() -> None:
        if next(steps) == 7 and not marker.exists():
            marker.touch()
            filled = []
            while True:
                filled.append(b"x" * 2**22)
                time.sleep(0.01)

    return fill
