"""What is still there after a crash, a full disk, a flipped bit or a second writer."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders.checkpoints import newest, save, state, store
from trainers.checkpoints import StorageError
from trainers.hooks import state_sha256


def test_nothing_is_found_where_nothing_was_written(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None


def test_the_newest_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = {"a": torch.randn(5, 3), "b": torch.arange(4), "c": [1.5, None, "x"], "d": {"e": torch.tensor(True)}}
    target = store(tmp_path)
    target.save(3, original, None)
    target.wait()
    found = store(tmp_path).load_newest()
    assert found is not None and state_sha256(found[0]) == state_sha256(original)


def test_what_changes_after_the_snapshot_is_not_in_it(tmp_path: Path) -> None:
    target, weights = store(tmp_path), torch.zeros(1000)
    target.save(1, {"w": weights}, None)
    weights += 1
    target.wait()
    found = store(tmp_path).load_newest()
    assert found is not None and found[0]["w"].sum() == 0


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    training_went_on = threading.Event()
    written: list[dict[str, float]] = []
    target = store(
        tmp_path, on_saved=lambda **saved: written.append(saved), before_valid=lambda: training_went_on.wait(600)
    )
    began = time.perf_counter()
    target.save(1, state(1), None)
    stalled = time.perf_counter() - began
    assert written == [], "the write cannot be done: it waits for training to go on"
    time.sleep(stalled)  # so that the write takes longer than the snapshot, however slow the machine is
    training_went_on.set()
    target.wait()
    (saved,) = written
    assert saved["stall_seconds"] < saved["write_seconds"]


def test_a_checkpoint_whose_events_the_driver_lacks_does_not_count(tmp_path: Path) -> None:
    answers = iter([True, False, True])
    target = store(tmp_path, keep=3, before_valid=lambda: next(answers))
    save(target, 3, 6)
    assert newest(tmp_path) == 3
    save(target, 9)
    assert newest(tmp_path) == 9


def test_the_last_one_asks_again_until_the_driver_has_its_events(tmp_path: Path) -> None:
    answers = iter([False, True])
    target = store(tmp_path, before_valid=lambda: next(answers))
    target.save(12, state(12), None, ending=True)
    target.wait()
    assert newest(tmp_path) == 12


def test_the_last_one_of_an_attempt_that_was_replaced_does_not_ask_without_end(tmp_path: Path) -> None:
    target = store(tmp_path, before_valid=lambda: False)
    target.take_over()
    store(tmp_path, attempt=1).take_over()
    target.save(12, state(12), None, ending=True)
    with pytest.raises(StorageError, match="attempt 1 writes here now"):
        target.wait()


def test_one_that_is_to_be_rated_later_is_kept_until_then(tmp_path: Path) -> None:
    target = store(tmp_path, keep=1)
    for iteration, awaited in ((4, {4}), (8, {4}), (12, {4, 12})):
        target.save(iteration, state(iteration), None, awaited=awaited)
    target.wait()
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000004", "iter_0000012"]
    target.rate(4, 37.0)
    target.save(16, state(16), 36.0, awaited={12})
    target.save(20, state(20), 36.0)
    target.wait()
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000004", "iter_0000020"]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    save(store(tmp_path, keep=2), 1, 2, 3, 4, 5, scores={1: 10.0, 2: 30.0, 4: 20.0})
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000004", "iter_0000005"]


def test_what_an_interrupted_write_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "state-0.pt").write_bytes(b"half")
    save(store(tmp_path), 2)
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000002"]


@settings(max_examples=40)
@given(position=st.floats(0, 0.999), torn=st.booleans(), manifest=st.booleans())
def test_a_torn_or_flipped_checkpoint_is_never_read(
    tmp_path_factory: pytest.TempPathFactory, position: float, torn: bool, manifest: bool
) -> None:
    folder = tmp_path_factory.mktemp("store")
    save(store(folder), 4, 8)
    path = folder / "iter_0000008" / ("manifest.json" if manifest else "state-0.pt")
    content = bytearray(path.read_bytes())
    place = int(position * len(content))
    if torn:
        content = content[:place]
    else:
        content[place] ^= 0x10
    path.write_bytes(content)
    found = newest(folder)
    # A bit of the manifest's time or score may flip unnoticed; the state is still the one that was written.
    assert found == 4 or (manifest and not torn and found == 8)


def test_a_damaged_checkpoint_is_named_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(store(tmp_path), 4, 8)
    (tmp_path / "iter_0000008" / "state-0.pt").write_bytes(b"")
    with caplog.at_level("WARNING", logger="trainers.checkpoints"):
        assert newest(tmp_path) == 4
    assert "iter_0000008 is damaged and is skipped" in caplog.text


WRITE_AND_DIE = """
import os, pathlib, signal, sys, torch
from trainers import checkpoints
folder, moment = sys.argv[1:]
store = checkpoints.CheckpointStore(folder, 2, 0, lambda **saved: None)
store.save(4, {"model": {"w": torch.full((64,), 4.0)}, "iteration": 4}, None)
store.wait()
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "before the manifest":
    store._before_valid = die
else:
    os.fsync = die if moment == "before the rename" else os.fsync
    if moment == "half written":
        real = pathlib.Path.open
        class Half:
            def __init__(self, file): self.file = file
            def __enter__(self): return self
            def __exit__(self, *args): pass
            def write(self, content): self.file.write(content[: len(content) // 2]); self.file.flush(); die()
        pathlib.Path.open = lambda self, mode: Half(real(self, mode))
store.save(8, {"model": {"w": torch.full((64,), 8.0)}, "iteration": 8}, None)
store.wait()
"""


@pytest.mark.parametrize("moment", ["half written", "before the rename", "before the manifest"])
def test_killed_while_writing_leaves_the_one_before(tmp_path: Path, moment: str) -> None:
    died = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, str(tmp_path), moment], timeout=600)
    assert died.returncode == -signal.SIGKILL, "the fault did not fire"
    assert (tmp_path / "iter_0000008").is_dir(), "it died before it began"
    assert newest(tmp_path) == 4
    save(store(tmp_path, attempt=1), 8)
    assert newest(tmp_path) == 8


def test_an_attempt_that_was_replaced_makes_no_checkpoint_valid(tmp_path: Path) -> None:
    old, new = store(tmp_path, attempt=0), store(tmp_path, attempt=1)
    old.take_over()
    save(old, 4)
    new.take_over()
    save(new, 6)
    with pytest.raises(StorageError, match="attempt 1 writes here now"):
        save(old, 8)
    assert newest(tmp_path) == 6


def test_a_replaced_attempt_cannot_spoil_what_the_new_one_has_written(tmp_path: Path) -> None:
    old, new = store(tmp_path, attempt=0), store(tmp_path, attempt=1)
    old.take_over()
    new.take_over()
    save(new, 8)
    old.save(8, {"model": {"w": torch.zeros(64)}, "iteration": 8}, None)
    with pytest.raises(StorageError):
        old.wait()
    assert newest(tmp_path) == 8


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here (root is needed)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb") as file:
        try:
            while True:
                file.write(bytes(65536))
                file.flush()
        except OSError:
            pass


def make_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


@pytest.mark.parametrize("spoil", [fill, make_read_only])
def test_storage_that_takes_no_more_keeps_the_older_checkpoint_and_says_so(
    small_disk: Path, spoil: Callable[[Path], None]
) -> None:
    target = store(small_disk / "checkpoints")
    save(target, 4)
    spoil(small_disk)
    target.save(8, state(8, size=100_000), None)
    with pytest.raises(StorageError, match="iteration 8 could not be written"):
        target.wait()
    assert newest(small_disk / "checkpoints") == 4
    assert not list(small_disk.rglob("*.aside")), "half a file takes up what is left"


def test_training_can_go_on_over_storage_that_is_full_for_a_while(small_disk: Path) -> None:
    failures: list[dict[str, Any]] = []
    target = store(small_disk / "checkpoints", on_failed=lambda **failure: failures.append(failure))
    save(target, 4)
    fill(small_disk)
    target.save(8, state(8, size=100_000), None)
    target.wait()
    (failure,) = failures
    assert failure["iteration"] == 8 and "No space left" in failure["message"]
    (small_disk / "filler").unlink()
    save(target, 12)
    assert newest(small_disk / "checkpoints") == 12


def test_the_manifest_says_what_was_written(tmp_path: Path) -> None:
    save(store(tmp_path, attempt=3), 8, scores={8: 41.5})
    manifest = json.loads((tmp_path / "iter_0000008" / "manifest.json").read_text())
    ((name, file),) = manifest["files"].items()
    content = (tmp_path / "iter_0000008" / name).read_bytes()
    assert (manifest["iteration"], manifest["attempt"], manifest["score"]) == (8, 3, 41.5)
    assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_state_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    save(store(tmp_path), 4, 8)
    folder = tmp_path / "iter_0000008"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"model": Evil()}, folder / "state-0.pt")
    content = (folder / "state-0.pt").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state-0.pt"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert newest(tmp_path) == 4
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["state-0.pt", "manifest.json"])
def test_a_damaged_checkpoint_is_reported_once_however_often_it_is_met(tmp_path: Path, name: str) -> None:
    save(store(tmp_path, keep=3), 4, 8)
    damaged = tmp_path / "iter_0000008" / name
    content = damaged.read_bytes()
    damaged.write_bytes(bytes([content[0] ^ 0x10]) + content[1:])
    skipped: list[dict[str, str]] = []
    again = store(tmp_path, keep=3, attempt=1, on_skipped=lambda **fields: skipped.append(fields))
    found = again.load_newest()
    assert found is not None and found[0]["iteration"] == 4
    save(again, 12)  # clearing away meets it again
    assert len(skipped) == 1 and "iter_0000008" in skipped[0]["path"] and skipped[0]["message"]
