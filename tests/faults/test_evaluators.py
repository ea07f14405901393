"""Evaluations on resources of their own: a process that Ray starts for them, and another where that one is lost."""

from __future__ import annotations

import contextlib

import psutil
import pytest

from tests.builders.fault_bench import Bench, experiment
from tests.builders.waiting import wait_for
from trainers.contract.events import Evaluated, Event, LoopStarted
from trainers.faults import Fault

pytestmark = pytest.mark.train


def servers() -> list[psutil.Process]:
    """The processes that evaluate."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if process.status() != psutil.STATUS_ZOMBIE and any("ray::Server" in part for part in process.cmdline()):
                found.append(process)
    return found


def test_a_process_that_evaluates_on_reserved_cpus_is_replaced_when_it_is_killed(bench: Bench) -> None:
    killed: list[int] = []

    def kill(event: Event) -> None:
        if isinstance(event, LoopStarted):
            wait_for(servers)
            for process in servers():
                process.kill()
                killed.append(process.pid)
            bench.faults_file.unlink()  # training goes on, to the evaluation for which the process is missing

    values = experiment(trials={"world_sizes": [1], "scaling": "strong"})
    values["resources"] = {**values.get("resources", {}), "evaluation": {"cpus": 1}}
    outcome = bench.run(Fault("hold", rank=0, iteration=4), values=values, listeners=[kill])
    assert outcome.ended.status == "FINISHED" and len(killed) == 1
    evaluations = outcome.of(Evaluated)
    assert [event.iteration for event in evaluations] == [6, 12]
    assert [event.overlapped for event in evaluations] == [True, False]
    assert [event.num_lost for event in evaluations] == [1, 0]
    assert set(outcome.rows.values()) == {1}
    wait_for(lambda: not servers())
