"""The process that tracks is replaced where it is killed, and a disk without room for its state costs no run."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from orchestrator.publish import track_folder
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from orchestrator.tracking import driver
from orchestrator.tracking.driver import Tracker, TrackingError
from orchestrator.tracking.mlflow_runs import MlflowRuns
from tests.builders.run_folder import make_run
from trainers.contract.events import Evaluated, Event

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


class Tracking:
    """A process that notes something every minute until it ends after some, by the clock of whoever waits for it."""

    args = ("tracking",)

    def __init__(self, state_file: Path, minutes: float) -> None:
        self.state_file, self.left, self.now = state_file, minutes, 0.0

    def wait(self, timeout: float) -> int:
        self.left -= 1
        if self.left <= 0:
            return 0
        self.now += 60
        if self.state_file.exists():
            os.utime(self.state_file, ns=(0, int(self.now)))
        raise subprocess.TimeoutExpired(self.args, timeout)


@pytest.mark.parametrize(
    ("notes", "limit", "ends"), [(True, math.inf, True), (False, math.inf, False), (True, 300.0, False)]
)
def test_what_goes_on_tracking_is_waited_for_but_not_beyond_the_limit(
    notes: bool, limit: float, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if notes:
        (tmp_path / "tracking.json").touch()
    process: Any = Tracking(tmp_path / "tracking.json", minutes=20)
    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: process.now))
    if ends:
        assert Tracker(tmp_path, "unused")._wait(process, 90.0, limit) == 0
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            Tracker(tmp_path, "unused")._wait(process, 90.0, limit)
        assert process.now <= (limit if notes else 90) + 60


def test_what_was_tracked_before_a_failure_is_noted_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = make_run(tmp_path / "whole"), make_run(tmp_path / "cut")
    stores = [f"sqlite:///{tmp_path / name}.db" for name in ("whole", "cut")]
    assert Tracker(whole, stores[0]).sync()
    monkeypatch.setattr(driver, "NOTE_INTERVAL_SECONDS", -1.0)
    with monkeypatch.context() as broken:
        track, tracked = MlflowRuns.track, list[object]()

        def fail_in_the_middle(runs: MlflowRuns, event: Event) -> None:
            tracked.append(event)
            if isinstance(event, Evaluated) and len(tracked) > 10:
                raise ConnectionError("gone")
            track(runs, event)

        broken.setattr(MlflowRuns, "track", fail_in_the_middle)
        with pytest.raises(TrackingError, match="gone"):
            Tracker(cut, stores[1]).sync()
    offset = json.loads((cut / "tracking.json").read_text())["offset"]
    assert sum(1 for _, after in Outbox(cut / FILE_NAME).read() if after <= offset) == len(tracked) - 1
    again = Tracker(cut, stores[1])
    assert again.sync()
    assert points(stores[1]) == points(stores[0])


def points(store: str) -> Counter[tuple[str, str, int]]:
    """How often a store has a point, by run, metric and step."""
    client = MlflowClient(store)
    runs = [run for each in client.search_experiments() for run in client.search_runs([each.experiment_id])]
    return Counter(
        (run.info.run_name, name, point.step)
        for run in runs
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    )


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
