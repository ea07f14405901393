"""The process that tracks is replaced where it is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.tracking.driver import Tracker

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
