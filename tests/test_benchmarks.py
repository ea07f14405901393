"""The benchmark's own arithmetic: what it counts, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import slots, turns
from benchmarks.measure import Row, by_blocks, report, table
from benchmarks.tracking import with_and_without


def test_a_ratio_is_taken_between_neighbours_and_says_which_side_is_faster() -> None:
    durations = Row("a", "b", "s", (1.0, 2.0, 4.0), (2.0, 6.0, 4.0), 2.0, higher_is_better=False)
    assert durations.ratios == [2.0, 3.0, 1.0]
    assert durations.ratio == 2.0 and durations.reached
    rates = Row("a", "b", "images/s", (1.0,), (2.0,), 0.6, higher_is_better=True)
    assert rates.ratio == 0.5 and not rates.reached
    assert "**below**" in table([rates]) and "reached" in table([durations])


def test_a_row_without_a_target_is_shown_and_neither_reached_nor_below() -> None:
    row = Row("first_step", "b", "s", (20.0,), (5.0,), None, higher_is_better=False)
    assert row.ratio == 0.25 and row.reached is None
    assert table([row]).splitlines()[-1] == "| first_step | b | 20 s | 5 s | 0.25 | 0.25 – 0.25 | – |  |"


def test_a_result_file_names_machine_and_versions_above_the_table() -> None:
    row = Row("a", "b", "s", (1.0,), (2.0,), 1.5, higher_is_better=False)
    measured_on = {
        "time": "2026-01-02 03:04:05 UTC", "processor": "Xeon", "cpus": 2, "load_average": 1.0, "system": "Linux",
        "python": "3.11.2", "versions": {"torch": "2.14.1", "ray": "2.60.0"},
    }  # fmt: skip
    text = report([row], measured_on)
    assert text.startswith("# 2026-01-02 03:04:05 UTC\n")
    assert "Xeon, 2 CPUs" in text and "Versions: torch 2.14.1, ray 2.60.0\n" in text
    assert text.endswith(table([row]) + "\n")


def test_two_trainings_take_their_steps_in_turns(tmp_path: Path) -> None:
    log = tmp_path / "steps"
    script = (
        "import sys; from benchmarks import turns; wait = turns.waiting()\n"
        f"for _ in range({turns.WARMUP_STEPS} + 4):\n"
        "    wait()\n"
        "    with open(sys.argv[2], 'a') as log: log.write(sys.argv[1])\n"
    )
    ours, peer = ([sys.executable, "-c", script, name, str(log)] for name in "ab")
    sides = turns.in_turns(ours, peer)
    assert log.read_text() == "a" * turns.WARMUP_STEPS + "b" * turns.WARMUP_STEPS + "abbaabba"
    assert [len(side.seconds) for side in sides] == [3, 3], "the last step ends with the end of training"


def test_a_process_is_suspended_for_every_second_step_and_runs_afterwards(tmp_path: Path) -> None:
    # Each step waits until the process is as it should be in it: a signal takes its time on a busy machine.
    script = (
        "import psutil, sys, time; from benchmarks import turns; wait = turns.waiting()\n"
        "process, due = psutil.Process(int(sys.argv[1])), ([False, True, True, False] * 3)[:9]\n"
        "for suspended in due:\n"
        "    wait()\n"
        "    deadline = time.monotonic() + 60\n"
        "    while (process.status() == psutil.STATUS_STOPPED) != suspended:\n"
        "        assert time.monotonic() < deadline, suspended\n"
        "        time.sleep(0.01)\n"
    )
    with psutil.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]) as process:
        try:
            with turns.started([sys.executable, "-c", script, str(process.pid)], 1, tmp_path, "ours", 1) as side:
                side.wait_until_ready()
                running, suspended = with_and_without(side, process)
            assert process.status() != psutil.STATUS_STOPPED
        finally:
            process.kill()
    assert len(running) == len(suspended) == 4, "the last step ends with the end of training"


def test_a_side_that_fails_is_an_error_with_what_it_printed() -> None:
    broken = [sys.executable, "-c", "raise SystemExit('no model')"]
    with pytest.raises(RuntimeError, match="no model"):
        turns.in_turns(broken, broken)


def test_rates_are_taken_over_equal_blocks_of_neighbouring_steps() -> None:
    found, theirs = by_blocks([1.0, 3.0, 2.0, 2.0, 9.0], [4.0, 4.0, 8.0, 8.0], images=8, blocks=2)
    assert found == (4.0, 4.0) and theirs == (2.0, 1.0)


def test_commands_in_slots_are_suspended_with_all_their_processes_while_another_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "SLOT_SECONDS", 0.5)
    # Half-way, each waits for what the other one does in a slot: so it needs two, however long they are.
    child = (
        "import pathlib, sys, time\n"
        "own, other = map(pathlib.Path, sys.argv[1:3])\n"
        "own.touch()\n"
        "for number in range(100):\n"
        "    while number == 50 and not (other.exists() and other.read_text().count('\\n') >= int(sys.argv[3])):\n"
        "        time.sleep(0.01)\n"
        "    time.sleep(0.01)\n"
        "    with own.open('a') as log: log.write(f'{time.time()}\\n')\n"
    )
    parent = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))"
    commands = [
        [sys.executable, "-c", parent, child, *(str(tmp_path / name) for name in names), str(lines)]
        for names, lines in (("ab", 1), ("ba", 51))
    ]
    taken = slots.in_slots(commands)
    for own, others, name in zip(taken, reversed(taken), "ab", strict=True):
        ticked = [float(line) for line in (tmp_path / name).read_text().split()]
        assert len(ticked) == 100 and len(own) > 1
        outside = sum(any(since < moment < to for since, to in others) for moment in ticked)
        assert outside < 10, "it ran during the other one's slot"
        assert slots.ran(own, end=ticked[-1]) < ticked[-1] - own[0][0], "time in which it was suspended was counted"
    with pytest.raises(RuntimeError, match="no model"):
        slots.in_slots([[sys.executable, "-c", "raise SystemExit('no model')"]])


def test_only_the_part_of_a_slot_between_two_moments_counts() -> None:
    assert slots.ran([(0.0, 5.0), (10.0, 15.0)], 4.0, 11.0) == 2.0
