"""Faults of a worker: what is started again ends as if nothing had happened, what is not says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.results import trial_result
from orchestrator.spec import Faults
from tests.faults.bench import ITERATIONS, Bench, Outcome, experiment
from tests.trainers.test_resume import MODELS
from trainers.contract import CheckpointSaved, LoopFinished, StepsDone, TrialRestarted, WorkerFailed
from trainers.faults import Fault

pytestmark = pytest.mark.train


def assert_as_undisturbed(outcome: Outcome, undisturbed: Outcome) -> None:
    """The invariants: the same weights bit for bit, the same AP, the same metric rows, each of them once."""
    assert outcome.ended.status == "FINISHED", outcome.ended.reason
    assert outcome.state == undisturbed.state
    assert outcome.scores == undisturbed.scores
    assert outcome.rows == undisturbed.rows
    assert set(outcome.rows.values()) == {1}


def restarts(outcome: Outcome) -> list[tuple[str, int]]:
    return [(event.failure, event.attempt) for event in outcome.of(TrialRestarted)]


def test_an_undisturbed_trial_tells_every_window_and_ends_at_once(undisturbed: Outcome) -> None:
    windows = {(event.rank, event.first_iteration, event.iteration) for event in undisturbed.of(StepsDone)}
    assert windows == {(rank, start, start + 3) for rank in (0, 1) for start in range(0, ITERATIONS, 3)}
    assert restarts(undisturbed) == []


def test_a_killed_worker_is_replaced_and_the_weights_are_as_if_it_had_lived(bench: Bench, undisturbed: Outcome) -> None:
    outcome = bench.run(Fault("kill", rank=1, iteration=8))
    assert [fault["kind"] for fault in outcome.fired] == ["kill"]
    assert_as_undisturbed(outcome, undisturbed)
    assert restarts(outcome) == [("worker_lost", 1)]
    (restart,) = trial_result(outcome.plan, outcome.events).restarts
    assert restart.message.startswith("rank 1: its process died")
    # It died at 8 and goes on from 6; it was last heard of up to a second before.
    assert (
        restart.lost_iterations in (0, 1, 2) and restart.downtime_seconds is not None and restart.downtime_seconds > 1
    )
    assert outcome.tags["restart.1"].startswith("worker_lost: rank 1")
    assert f"{restart.lost_iterations} iterations lost" in outcome.tags["restart.1"]
    resumed = min(event.time - event.seconds for event in outcome.of(StepsDone) if event.attempt == 1)
    print(f"\nkilled worker: {resumed - outcome.fired[0]['time']:.1f} s from the kill to the next step")


def test_nan_on_one_rank_stops_all_together_and_names_its_images(bench: Bench) -> None:
    # RetinaNet computes a loss of such images; Mask R-CNN's proposals refuse them (see tests/trainers/test_resume.py).
    values = experiment(model=MODELS["retinanet"])
    outcome = bench.run(Fault("nan", rank=1, iteration=7, attempt=None), values=values)
    assert outcome.fired
    assert outcome.ended.status == "FAILED" and restarts(outcome) == []
    assert "rank 1, iteration 7" in outcome.ended.reason and ".jpg" in outcome.ended.reason
    failures = outcome.of(WorkerFailed)
    assert {event.rank for event in failures} == {0, 1} and {event.failure for event in failures} == {"not_finite"}
    assert max(event.iteration for event in outcome.of(CheckpointSaved)) == 6, "a checkpoint of NaN was kept"
    assert (outcome.tags["failure"], outcome.tags["failure.iteration"]) == ("not_finite", "7")


def test_a_crash_at_the_same_iteration_twice_ends_the_trial_and_names_the_images(bench: Bench) -> None:
    outcome = bench.run(Fault("raise", rank=0, iteration=4, attempt=None))
    assert [fault["attempt"] for fault in outcome.fired] == [None, None]
    assert outcome.ended.status == "FAILED" and restarts(outcome) == [("unknown", 1)]
    assert outcome.ended.reason.startswith("twice at the same place: unknown (rank 0, iteration 4, step)")
    assert outcome.ended.reason.count(".jpg") == 2


def test_a_stuck_training_thread_is_found_and_not_those_that_wait_for_it(bench: Bench, undisturbed: Outcome) -> None:
    timeouts = bench_timeouts(step=4)
    outcome = bench.run(Fault("stall", rank=1, iteration=7), timeouts=timeouts)
    assert outcome.fired
    assert_as_undisturbed(outcome, undisturbed)
    stuck = [event for event in outcome.of(WorkerFailed) if event.failure == "stuck"]
    assert [(event.rank, event.iteration) for event in stuck] == [(1, 7)]
    assert stuck[0].time - outcome.fired[0]["time"] < 2 * 4 + 1
    assert restarts(outcome) == [("stuck", 1)]


def test_a_frozen_process_is_noticed_within_twice_the_time_out(bench: Bench, undisturbed: Outcome) -> None:
    timeouts = bench_timeouts(heartbeat=4)
    outcome = bench.run(Fault("freeze", rank=0, iteration=7), timeouts=timeouts)
    assert outcome.fired
    assert_as_undisturbed(outcome, undisturbed)
    stuck = [event for event in outcome.of(WorkerFailed) if event.failure == "stuck"]
    assert [event.rank for event in stuck] == [0] and "no sign of life" in stuck[0].message
    assert stuck[0].time - outcome.fired[0]["time"] < 2 * 4 + 1


def test_an_image_that_cannot_be_read_ends_the_trial_at_once_and_is_named(bench: Bench, tmp_path: Path) -> None:
    from orchestrator.generate import generate

    values = experiment(resources={"device": "cpu", "cpus_per_worker": 1, "loader_workers": 1})
    generate(tmp_path, **values["data"]["generated"])
    victim = sorted(tmp_path.rglob("train*/*.jpg"))[5]
    victim.write_bytes(victim.read_bytes()[:200])
    outcome = bench.run(values=values, root=tmp_path)
    assert outcome.ended.status == "FAILED" and restarts(outcome) == []
    assert outcome.ended.reason.startswith("bad_input") and str(victim) in outcome.ended.reason


@pytest.mark.soak
def test_out_of_memory_at_the_same_place_twice_ends_the_trial(bench: Bench) -> None:
    outcome = bench.run(Fault("out_of_memory", rank=1, iteration=2, attempt=None))
    assert len(outcome.fired) == 2
    assert outcome.ended.reason.startswith("twice at the same place: out_of_memory (rank 1, iteration 2, step)")


def test_storage_that_fails_ends_the_trial_with_its_words(bench: Bench, tmp_path: Path) -> None:
    blocked = tmp_path / "a_file"
    blocked.write_text("not a folder")
    outcome = bench.run(checkpoint_dir=str(blocked / "checkpoints"))
    assert outcome.ended.status == "FAILED" and outcome.ended.reason.startswith("storage")
    assert str(blocked) in outcome.ended.reason


@pytest.mark.soak
def test_failures_without_progress_are_limited(bench: Bench) -> None:
    faults = [Fault("kill", rank=0, iteration=iteration, attempt=iteration) for iteration in (0, 1)]
    outcome = bench.run(*faults, policy=Faults(max_failures=1))
    assert len(outcome.fired) == 2
    assert "2 failures in a row without a new checkpoint" in outcome.ended.reason
    assert not outcome.of(LoopFinished)


def bench_timeouts(**changes: float) -> dict[str, float]:
    from orchestrator.spec import Timeouts

    return Timeouts(**changes).model_dump()
