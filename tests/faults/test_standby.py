"""Workers that wait for a failure take over without the start of a process, and are never taken for others."""

from __future__ import annotations

import psutil
import pytest

from orchestrator.experiment.spec import Faults
from orchestrator.figures.trial import trial_result
from tests.builders.fault_bench import Bench, Outcome, workers
from tests.builders.waiting import wait_for
from trainers.contract.events import (
    Event,
    LoopStarted,
    StandbyLost,
    StandbyReady,
    TrialRestarted,
    WorkerFailed,
    WorkerStarted,
)
from trainers.faults import Fault

pytestmark = pytest.mark.train

HOLD = Fault("hold", rank=0, iteration=4)
"""Training must not be over before others wait next to it."""


def assert_as_undisturbed(outcome: Outcome, undisturbed: Outcome) -> None:
    assert outcome.ended.status == "FINISHED", outcome.ended.reason
    assert (outcome.state, outcome.scores) == (undisturbed.state, undisturbed.scores)
    assert outcome.rows == undisturbed.rows and set(outcome.rows.values()) == {1}


def test_workers_that_waited_take_over_from_a_killed_one(bench: Bench, undisturbed: Outcome) -> None:
    training: dict[int, int | None] = {}
    waiting: set[int] = set()

    def kill_once_others_wait(event: Event) -> None:
        if isinstance(event, WorkerStarted) and event.attempt == 0:
            training[event.rank] = event.pid
        if isinstance(event, StandbyReady) and event.attempt == 0:
            waiting.update(process.pid for process in workers() if process.pid not in training.values())
            psutil.Process(training[1]).kill()

    outcome = bench.run(HOLD, policy=Faults(standby=True), listeners=[kill_once_others_wait])
    assert_as_undisturbed(outcome, undisturbed)
    assert [(event.failure, event.attempt) for event in outcome.of(TrialRestarted)] == [("worker_lost", 1)]
    assert {event.pid for event in outcome.of(WorkerStarted) if event.attempt == 1} == waiting and len(waiting) == 2
    assert {(event.rank, event.failure) for event in outcome.of(WorkerFailed)} <= {
        (1, "worker_lost"),
        (0, "communication"),
    }
    (restart,) = trial_result(outcome.plan, outcome.events).restarts
    parts = restart.recovery_part_seconds
    assert "standby" in parts and not {"scheduling", "processes", "process_group"} & parts.keys()
    assert sum(parts.values()) == pytest.approx(restart.recovery_seconds, abs=0.01)
    wait_for(lambda: not list(workers()))


@pytest.mark.soak
def test_workers_that_are_lost_while_they_wait_are_replaced_and_nothing_else_happens(
    bench: Bench, undisturbed: Outcome
) -> None:
    training: set[int | None] = set()

    def kill_one_that_waits(event: Event) -> None:
        if isinstance(event, WorkerStarted):
            training.add(event.pid)
        if isinstance(event, StandbyReady) and bench.faults_file.exists():
            if any(isinstance(earlier, StandbyReady) for earlier in seen):
                bench.faults_file.unlink()  # training goes on
            else:
                next(process for process in workers() if process.pid not in training).kill()
        seen.append(event)

    seen: list[Event] = []
    outcome = bench.run(HOLD, policy=Faults(standby=True), listeners=[kill_one_that_waits])
    assert_as_undisturbed(outcome, undisturbed)
    assert not outcome.of(TrialRestarted) and not outcome.of(WorkerFailed)
    assert len(outcome.of(StandbyLost)) == 1 and len(outcome.of(StandbyReady)) == 2
    assert len(outcome.of(WorkerStarted)) == len(outcome.of(LoopStarted)) == 2
    wait_for(lambda: not list(workers()))
