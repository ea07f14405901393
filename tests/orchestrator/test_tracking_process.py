"""The process that tracks is replaced where it is killed, and a disk without room for its state costs no run."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from orchestrator.publish import track_folder
from orchestrator.tracking.driver import Tracker
from tests.builders.run_folder import make_run

KILLED_AT_THE_END = """#!/bin/sh
read -r store; reason=$(cat)
echo "asked: $reason" >> asked.txt
[ "$(wc -l < asked.txt)" -gt "$(cat kills.txt)" ] || kill -9 $$
"""


@pytest.mark.parametrize("kills", [1, 2])
def test_a_process_that_is_killed_while_the_run_waits_for_it_is_replaced_once(
    kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kills.txt").write_text(str(kills))
    script = tmp_path / "tracking"
    script.write_text(KILLED_AT_THE_END)
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    tracker = Tracker(tmp_path, "unused")
    tracker.start()
    assert tracker.abandon("no room", timeout=600) == (kills == 1)
    assert Path("asked.txt").read_text() == "asked: no room\n" * 2
    assert tracker.failure == ("" if kills == 1 else "the process that tracks was killed twice (SIGKILL)")


def test_a_replay_on_a_full_disk_names_the_run_that_it_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run, uri = make_run(tmp_path / "run"), f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr("orchestrator.tracking.driver.write_atomically", full)
    monkeypatch.setattr("orchestrator.figures.records.write_atomically", full)
    done = track_folder(run)
    assert not (run / "tracking.json").exists()
    id = done.partition(f"has all of {run} (run ")[2].removesuffix(").")
    tracked = MlflowClient(uri).get_run(id)
    assert tracked.info.status == "FINISHED" and "mlflow.parentRunId" not in tracked.data.tags
