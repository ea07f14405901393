"""The file that everything else is made from: whole lines, whatever happens while one is written."""

from __future__ import annotations

import errno
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.runlog.outbox import FILE_NAME, Outbox, RunFolderError
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


def test_a_file_that_is_removed_replaced_or_changed_is_not_written_any_more(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    outbox = Outbox(folder / FILE_NAME)
    outbox.append(event(1))
    with outbox.path.open("ab") as file:
        file.write(b"by somebody else\n")
    with pytest.raises(RunFolderError, match="was changed from outside") as raised:
        outbox.append(event(2))
    assert raised.value.gone
    folder.rename(tmp_path / "elsewhere")
    for call in (lambda: outbox.append(event(2)), lambda: outbox.guarded().__enter__(), lambda: list(outbox.read())):
        with pytest.raises(RunFolderError, match="was removed with its folder") as raised:
            call()
        assert raised.value.gone
    assert not folder.exists()
    folder.mkdir()
    Outbox(outbox.path).append(event(7))
    for call in (lambda: outbox.append(event(2)), lambda: outbox.guarded().__enter__(), lambda: list(outbox.read())):
        with pytest.raises(RunFolderError, match="was replaced"):
            call()
    assert written(outbox.path) == [7]


def test_other_writes_that_find_no_room_are_one_line_and_may_be_tried_again(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / FILE_NAME)
    outbox.append(event(1))
    with pytest.raises(RunFolderError) as raised, outbox.guarded():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "results.json"))
    assert str(raised.value) == f"{tmp_path} cannot be written: No space left on device: {tmp_path / 'results.json'}"
    assert not raised.value.gone


@pytest.mark.parametrize(
    "garbage", [b"\0" * 40, b'{"kind":"trial_resta', b"\xff\xfe{}", b'{"kind":"of a later version"}', b"[]"]
)
def test_lines_that_cannot_be_read_are_left_out_and_counted_by_trial(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / FILE_NAME
    Outbox(path).append(event(1), event(2), event(3))
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(garbage + b"\n" + first + garbage + b"\n" + third)
    assert written(path) == [1, 3]
    assert Outbox(path).damage() == {"t": (1, 3)}
    Outbox(path).append(event(4))
    assert written(path) == [1, 3, 4]


@given(st.data())
def test_whatever_is_done_to_the_file_what_is_whole_is_read(data: st.DataObject) -> None:
    lines = [f"{event(number).to_json()}\n".encode() for number in range(6)]
    content = bytearray(b"".join(lines))
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)))
    content[start:end] = data.draw(st.binary(max_size=30))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, FILE_NAME)
        path.write_bytes(content)
        left = bytes(content).split(b"\n")[:-1]
        whole = {number for number, line in enumerate(lines) if line[:-1] in left}
        assert whole <= set(written(path)), "parts of two lines may make a third one"
        Outbox(path).append(event(9))
        assert written(path)[-1] == 9
