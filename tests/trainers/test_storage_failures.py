"""Storage that is full, read-only or taken away ends a worker as `storage`, which is never tried again."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.experiment.spec import Faults
from tests.builders.checkpoints import newest, save, state, store
from tests.builders.trials import plan
from trainers.checkpoints import StorageError
from trainers.contract.channel import Channel, Placement
from trainers.contract.events import Event, WorkerFailed, WorkerStarted
from trainers.failures import classify
from trainers.rank import Rank


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.ENOENT, errno.EIO])
def test_a_file_of_the_run_that_cannot_be_written_is_storage_and_not_tried_again(number: int) -> None:
    error = OSError(number, os.strerror(number), "/runs/r/t/coco_instances_results.json")
    assert classify(error) == "storage"
    assert "storage" not in Faults().restart_on


def test_a_library_that_keeps_no_more_than_the_words_is_understood() -> None:
    assert classify(RuntimeError("cannot write: No space left on device (28)")) == "storage"
    wrapped = ValueError("the file could not be made")
    wrapped.__cause__ = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    assert classify(wrapped) == "storage"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no socket of a loader process"),
        PermissionError(errno.EPERM, "kill"),
        RuntimeError("so it was"),
    ],
)
def test_what_has_nothing_to_do_with_files_may_be_tried_again(error: Exception) -> None:
    assert classify(error) == "unknown"


def test_a_log_that_cannot_be_opened_is_reported_by_the_worker_itself(tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("not a folder")
    events: list[Event] = []
    channel = Channel(push=events.append, beat=lambda _: "run")
    values: dict[str, Any] = {"trial_dir": str(tmp_path / "a_file" / "trial"), "world_size": 1}
    with pytest.raises(OSError, match="a_file"):
        Rank(plan(**values), 0, Placement(0, 1, 0, 1, "here"), channel).train(0.0)
    assert [event.rank for event in events if isinstance(event, WorkerStarted)] == [0]
    (failed,) = (event for event in events if isinstance(event, WorkerFailed))
    assert failed.failure == "storage" and "a_file" in failed.message


@pytest.mark.parametrize("replaced", [False, True])
def test_nothing_is_written_where_the_checkpoints_folder_was_taken_away(tmp_path: Path, replaced: bool) -> None:
    folder = tmp_path / "run" / "checkpoints"
    target = store(folder)
    target.take_over()
    save(target, 4)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    if replaced:
        folder.mkdir(parents=True)
    target.save(8, state(8), None)
    with pytest.raises(StorageError, match="removed or replaced"):
        target.wait()
    assert not list(tmp_path.glob("run/**/*.*")) and (tmp_path / "run").exists() == replaced
    assert newest(tmp_path / "elsewhere" / "checkpoints") == 4
    shutil.rmtree(tmp_path / "elsewhere")


def test_what_a_killed_process_left_half_written_takes_no_room_from_the_next(tmp_path: Path) -> None:
    save(store(tmp_path), 4)
    left = tmp_path / "iter_0000008" / "state-0.pt.77.aside"
    left.parent.mkdir()
    left.write_bytes(b"half")
    store(tmp_path, attempt=1).take_over()
    assert not left.exists() and newest(tmp_path) == 4


@contextmanager
def unreadable(*files: Path) -> Iterator[None]:
    """Has the operating system answer with EIO where files are read."""
    for file in files:
        file.rename(f"{file}.real")
        file.symlink_to("/proc/self/mem")
    yield
    for file in files:
        if file.is_symlink():
            Path(f"{file}.real").replace(file)


def test_the_best_is_kept_though_its_manifest_cannot_be_read_for_a_moment(tmp_path: Path) -> None:
    target = store(tmp_path, keep=1)
    save(target, 4, 8, scores={4: 40.0, 8: 30.0})
    with unreadable(tmp_path / "iter_0000004" / "manifest.json"):
        save(target, 12, scores={12: 20.0})
    save(target, 16)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000004", "iter_0000016"]


@pytest.mark.parametrize("name", ["manifest.json", "state-0.pt"])
def test_training_does_not_begin_from_nothing_where_no_checkpoint_can_be_read(tmp_path: Path, name: str) -> None:
    save(store(tmp_path), 4, 8)
    skipped: list[dict[str, str]] = []
    files = [tmp_path / f"iter_000000{iteration}" / name for iteration in (4, 8)]
    with unreadable(*files), pytest.raises(StorageError, match=r"no checkpoint .* can be read: .*Input/output error"):
        store(tmp_path, on_skipped=lambda **fields: skipped.append(fields)).load_newest()
    assert skipped == [], "they are not damaged"
    with unreadable(files[1]):
        assert newest(tmp_path) == 4
    assert newest(tmp_path) == 8


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_newest_checkpoint_takes_no_place_from_those_that_are_saved_after_it_was_skipped(
    tmp_path: Path,
) -> None:
    save(store(tmp_path, keep=2), 3, 6, scores={3: 10.0, 6: 30.0})
    flip(tmp_path / "iter_0000006" / "state-0.pt")
    again = store(tmp_path, keep=1, attempt=1)
    found = again.load_newest()
    assert found and found[0]["iteration"] == 3
    save(again, 4, scores={4: 20.0})
    assert newest(tmp_path) == 4
    save(again, 5)
    names = [f"iter_000000{iteration}" for iteration in (4, 5, 6)]
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == names, "best, newest, and a later one as it was"
    save(again, 6)
    assert newest(tmp_path) == 6, "it was written again"
    save(again, 7)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000004", "iter_0000007"]


def test_what_is_saved_after_a_checkpoint_could_not_be_read_is_kept_next_to_it(tmp_path: Path) -> None:
    save(store(tmp_path, keep=1), 3, 6, scores={3: 10.0})
    again = store(tmp_path, keep=1, attempt=1)
    with unreadable(tmp_path / "iter_0000006" / "state-0.pt"):
        found = again.load_newest()
        assert found and found[0]["iteration"] == 3
        save(again, 4)
        assert newest(tmp_path) == 4
        save(again, 8)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000003", "iter_0000006", "iter_0000008"]
