"""How many CPUs a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainers.contract import cpus


@pytest.mark.parametrize(
    ("files", "usable", "whole"),
    [
        ({"cpu.max": "50000 100000"}, 0.5, 1),
        ({"cpu.max": "max 100000"}, 2.0, 2),
        ({"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"}, 1.5, 1),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 2.0, 2),
        ({"cpu.max": "garbage"}, 2.0, 2),
        ({"cpu.max": "100000 0"}, 2.0, 2),
        ({}, 2.0, 2),
    ],
)
def test_the_quota_of_a_control_group_limits_the_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], usable: float, whole: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cpus, "control_groups", lambda: [tmp_path])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert (cpus.usable_cpus(), cpus.num_usable_cpus()) == (usable, whole)
