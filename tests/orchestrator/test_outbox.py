"""The file that everything else is made from: whole lines, whatever happens while one is written."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.runlog.outbox import FILE_NAME, Outbox
from trainers.contract.events import Event, TrialRestarted


def event(number: int) -> Event:
    return TrialRestarted(
        trial="t", attempt=number, rank=-1, time=0.0, failure="unknown", message="so it was", iteration=0
    )


def written(path: Path) -> list[int]:
    return [each.attempt for each, _ in Outbox(path).read()]


@contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    """As on a full disk: what goes beyond is refused, in the middle of a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_events_that_found_no_room_leave_nothing_behind_and_can_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    outbox = Outbox(path)
    outbox.append(event(1))
    before = path.read_bytes()
    with files_no_larger_than(len(before) * 5 // 2), pytest.raises(OSError, match="No space left"):
        outbox.append(event(2), event(3))  # the first of them would fit
    assert path.read_bytes() == before
    outbox.append(event(2), event(3))
    assert written(path) == [1, 2, 3]


def test_a_line_that_a_crash_left_half_written_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    Outbox(path).append(event(1), event(2))
    path.write_bytes(path.read_bytes()[:-5])
    assert written(path) == [1]
    Outbox(path).append(event(3))
    assert written(path) == [1, 3]
