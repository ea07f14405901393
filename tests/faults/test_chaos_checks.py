"""The soak's own checks find what they are there for, and a soak leaves nothing mounted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.builders.chaos_checks import Control, broken, unexplained
from tests.builders.chaos_faults import KINDS, Fired
from tests.builders.chaos_run import ChaosRun, soak_experiment
from tests.builders.mlflow_server import MlflowServer
from tests.faults.chaos import small_disk
from trainers.contract.events import Event, TrialRestarted, WorkerFailed


def fault(name: str, rank: int | None, events: int) -> Fired:
    return Fired(name, KINDS[name], rank, events, seconds=1.0, training=True)


OF = {"trial": "t", "attempt": 1, "time": 0.0, "iteration": 1}


def failed(failure: str, rank: int) -> WorkerFailed:
    return WorkerFailed(**OF, rank=rank, failure=failure, section="step", message="")  # type: ignore[arg-type]


def restarted(failure: str) -> TrialRestarted:
    return TrialRestarted(**OF, rank=-1, failure=failure, message="why")  # type: ignore[arg-type]


TRACEBACK = 'Traceback (most recent call last):\n  File "run.py", line 1, in <module>\nKeyError: 1\n'

LOST = [failed("worker_lost", 1), restarted("worker_lost")]


@pytest.mark.parametrize(
    ("events", "faults", "problem"),
    [
        (LOST, [fault("kill", 1, 0)], None),
        ([], [], None),
        ([], [fault("interrupt", 0, 0), fault("mlflow_gone", None, 0)], None),
        (LOST, [], "restart 1 by worker_lost (why) without its fault"),
        (LOST, [fault("raise", 1, 0)], "restart 1 by worker_lost (why) without its fault"),
        (LOST, [fault("kill", 0, 0)], "kill of rank 0 is recorded as [('worker_lost', 1)]"),
        (LOST, [fault("kill", 1, 2)], "restart 1 by worker_lost (why) without its fault"),
        ([], [fault("kill", 1, 0)], "kill: no restart followed"),
        # Which of two is noticed depends on which is faster.
        ([failed("stuck", 0), restarted("resumed")], [fault("freeze", 1, 0), fault("child", None, 1)], None),
        # The second came while the first was being recovered from.
        ([*LOST, restarted("resumed")], [fault("kill", 1, 0), fault("child", None, 1)], None),
        ([*LOST, *LOST], [fault("kill", 1, 0)], None),
        ([*LOST, *LOST, *LOST], [fault("kill", 1, 0)], "restart 1 by worker_lost (why) without its fault"),
    ],
)
def test_every_restart_has_its_fault_and_every_fault_its_restart(
    events: list[Event], faults: list[Fired], problem: str | None
) -> None:
    assert unexplained(events, faults)[:1] == ([problem] if problem else [])


@pytest.mark.parametrize(("text", "problems"), [("rank 0 failed in step: RuntimeError", 0), (TRACEBACK, 1)])
def test_a_traceback_that_the_command_prints_is_a_problem(text: str, problems: int, tmp_path: Path) -> None:
    run = ChaosRun(tmp_path / "run", tmp_path, MlflowServer(tmp_path, 0), soak_experiment("soak", "", 10, 1))
    (run.folder / "output.txt").write_text(text)
    found = broken(run, [], Control(None, {}, Counter(), set()))
    assert found == ["a traceback in what the command printed"] * problems + ["no results.json"]


def test_a_soak_that_is_cut_off_leaves_nothing_mounted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), small_disk(tmp_path / "disk") as disk:
        raise KeyboardInterrupt
    assert not disk.is_mount()
