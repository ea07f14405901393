"""A loader gets the processes that its model needs, and exchanging it changes nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.builders.recipes import plan_of, train
from trainers.loader_sizing import processes
from trainers.recipes import PLAIN


@pytest.mark.parametrize(
    ("batch_seconds", "step_seconds", "most", "wanted"),
    [
        (0.25, 0.125, 10, 3),  # two keep up, half as much again in reserve
        (0.2, 0.1, 2, 2),
        (0.001, 1.0, 10, 1),
        (0.2, 0.0, 7, 7),
    ],
)
def test_processes_keep_the_data_ahead_of_the_step(
    batch_seconds: float, step_seconds: float, most: int, wanted: int
) -> None:
    assert processes(batch_seconds, step_seconds, most) == wanted


@pytest.mark.train
def test_a_loader_exchanged_in_the_middle_trains_the_same_weights(tmp_path: Path) -> None:
    fixed = plan_of(tmp_path, PLAIN, "fixed")
    assert fixed.log_period < fixed.solver.max_iter
    sized = dataclasses.replace(
        plan_of(tmp_path, PLAIN, "sized"), most_loader_workers=1, checkpoint_dir=str(tmp_path / "sized-checkpoints")
    )
    assert train(sized)[0] == train(fixed)[0]
    log = Path(sized.trial_dir, "log.txt").read_text(encoding="utf-8")
    assert "1 loader processes, from 0" in log
    assert "loader processes" not in Path(fixed.trial_dir, "log.txt").read_text(encoding="utf-8")
