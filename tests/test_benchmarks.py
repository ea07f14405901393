"""The benchmark's own arithmetic: what it counts, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import gpu, slots, turns
from benchmarks.measure import Row, by_blocks, table
from benchmarks.tracking import going_and_still
from benchmarks.training import demo


def test_a_ratio_is_taken_between_neighbours_and_says_which_side_is_faster() -> None:
    durations = Row("a", "b", "s", (1.0, 2.0, 4.0), (2.0, 6.0, 4.0), 2.0, higher_is_better=False)
    assert durations.ratios == [2.0, 3.0, 1.0]
    assert durations.ratio == 2.0 and durations.reached
    rates = Row("a", "b", "images/s", (1.0,), (2.0,), 0.6, higher_is_better=True)
    assert rates.ratio == 0.5 and not rates.reached
    assert "**below**" in table([rates]) and "reached" in table([durations])


@pytest.mark.train
def test_operations_are_counted_forward_and_backward() -> None:
    plan = demo(2, recipe="plain")
    flops, waits = gpu.flops_and_waits(plan)
    # The first 3 x 3 convolution of a residual block: 64 x 64 channels on 24 x 24 pixels of 8 images, three passes.
    one = 3 * 2 * 8 * 24 * 24 * 64 * 64 * 9
    assert 10 * one < flops < 100 * one
    assert waits == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_benchmark_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main() == 2
    assert "no GPU" in capsys.readouterr().err


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


def test_a_process_stands_still_for_every_second_step_and_goes_on_afterwards(tmp_path: Path) -> None:
    ticks, steps = tmp_path / "ticks", tmp_path / "steps"
    ticker = (
        "import sys, time\n"
        "while True:\n"
        "    time.sleep(0.01)\n"
        "    with open(sys.argv[1], 'a') as log: log.write(f'{time.time()}\\n')\n"
    )
    script = (
        "import sys, time; from benchmarks import turns; wait = turns.waiting()\n"
        "for _ in range(9):\n"
        "    wait()\n"
        "    began = time.time()\n"
        "    time.sleep(0.3)\n"
        "    with open(sys.argv[1], 'a') as log: log.write(f'{began} {time.time()}\\n')\n"
    )
    with psutil.Popen([sys.executable, "-c", ticker, str(ticks)]) as process:
        try:
            with turns.started([sys.executable, "-c", script, str(steps)], 1, tmp_path, "ours", 1) as side:
                side.stands_ready()
                going, still = going_and_still(side, process)
            assert process.status() != psutil.STATUS_STOPPED
        finally:
            process.kill()
    told = [float(line) for line in ticks.read_text().split()]
    spans = [[float(each) for each in line.split()] for line in steps.read_text().splitlines()]
    counts = [sum(since < moment < to for moment in told) for since, to in spans]
    assert len(going) == len(still) == 4, "the last step ends with the end of training"
    assert [count > 3 for count in counts[:8]] == [True, False, False, True] * 2


def test_a_side_that_fails_is_an_error_with_what_it_printed() -> None:
    broken = [sys.executable, "-c", "raise SystemExit('no model')"]
    with pytest.raises(RuntimeError, match="no model"):
        turns.in_turns(broken, broken)


def test_rates_are_taken_over_equal_blocks_of_neighbouring_steps() -> None:
    found, theirs = by_blocks([1.0, 3.0, 2.0, 2.0, 9.0], [4.0, 4.0, 8.0, 8.0], images=8, blocks=2)
    assert found == (4.0, 4.0) and theirs == (2.0, 1.0)


def test_commands_in_slots_stand_still_with_all_their_processes_while_another_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "SLOT_SECONDS", 0.5)
    child = (
        "import sys, time\n"
        "for _ in range(100):\n"
        "    time.sleep(0.01)\n"
        "    with open(sys.argv[1], 'a') as log: log.write(f'{time.time()}\\n')\n"
    )
    parent = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))"
    commands = [[sys.executable, "-c", parent, child, str(tmp_path / name)] for name in "ab"]
    taken = slots.in_slots(commands)
    for own, others, name in zip(taken, reversed(taken), "ab", strict=True):
        told = [float(line) for line in (tmp_path / name).read_text().split()]
        assert len(told) == 100 and len(own) > 1
        outside = sum(any(since < moment < to for since, to in others) for moment in told)
        assert outside < 10, "it went on beside the other one"
        assert slots.ran(own) < told[-1] - own[0][0], "time in which it stood still was counted"
    with pytest.raises(RuntimeError, match="no model"):
        slots.in_slots([[sys.executable, "-c", "raise SystemExit('no model')"]])


def test_only_the_part_of_a_slot_between_two_moments_counts() -> None:
    assert slots.ran([(0.0, 5.0), (10.0, 15.0)], 4.0, 11.0) == 2.0
