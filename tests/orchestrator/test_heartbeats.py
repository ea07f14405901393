"""Whose heartbeats the actor between workers and driver takes, and what it answers."""

from __future__ import annotations

from orchestrator.execution.event_pump import Telemetry
from trainers.contract import clock
from trainers.contract.events import Heartbeat


def beat(trial: str, attempt: int, iteration: int) -> Heartbeat:
    now = clock.now()
    return Heartbeat(
        trial=trial, attempt=attempt, rank=1, time=now, section="step", part="data", iteration=iteration, since=now
    )


def test_a_worker_that_was_cut_off_from_an_earlier_trial_ends_and_is_not_taken_for_one_of_the_next() -> None:
    telemetry = Telemetry(clock.anchor())
    telemetry.order("run", "A", 3)
    assert telemetry.beat(beat("A", 3, 50)) == "run"
    telemetry.order("run", "B", 0)
    assert telemetry.beat(beat("B", 0, 7)) == "run"
    assert telemetry.beat(beat("A", 3, 51)) == "stop"
    _, _, heartbeats, _ = telemetry.drain(0)
    assert {rank: sample.heartbeat.trial for rank, sample in heartbeats.items()} == {1: "B"}


def test_a_worker_of_an_earlier_attempt_ends() -> None:
    telemetry = Telemetry(clock.anchor())
    telemetry.order("run", "A", 1)
    assert telemetry.beat(beat("A", 0, 50)) == "stop"
    assert telemetry.beat(beat("A", 1, 40)) == "run"
