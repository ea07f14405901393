"""What is started again, what ends a trial, and what is named as the cause."""

from __future__ import annotations

import math
from typing import Any

import pytest

from orchestrator.execution.restart_policy import STANDBY_STARTS, Policy, standby_is_due
from orchestrator.experiment.spec import Faults
from orchestrator.figures.causes import described, root_cause
from tests.builders.trials import TrialBuilder, plan
from trainers.contract.events import CheckpointSaved, Event, GroupStarted, LoopStarted, WorkerFailed


def failed(failure: str, *, rank: int = 0, iteration: int = 7, time: float = 0.0, **fields: Any) -> WorkerFailed:
    fields = {"section": "step", "message": "it broke", **fields}
    return WorkerFailed(
        trial="t",
        attempt=0,
        rank=rank,
        time=time,
        failure=failure,
        iteration=iteration,
        **fields,  # type: ignore[arg-type]
    )


def saved(iteration: int) -> CheckpointSaved:
    return CheckpointSaved(
        trial="t",
        attempt=0,
        rank=0,
        time=0,
        iteration=iteration,
        path="",
        size_bytes=1,
        stall_seconds=0,
        write_seconds=0,
    )


def loop_started(iteration: int) -> LoopStarted:
    return LoopStarted(
        trial="t",
        attempt=0,
        rank=0,
        time=0,
        iteration=iteration,
        num_train_images=1,
        num_val_images=1,
        setup_seconds=0,
        config_yaml="",
        restored_from="",
    )


@pytest.mark.parametrize("failure", ["worker_lost", "communication", "stuck", "unknown", "out_of_memory"])
def test_what_may_succeed_next_time_is_started_again(failure: str) -> None:
    assert Policy(Faults()).give_up(failed(failure), []) == ""


@pytest.mark.parametrize("failure", ["bad_input", "not_finite", "configuration", "storage"])
def test_what_can_never_succeed_ends_the_trial_and_is_named(failure: str) -> None:
    reason = Policy(Faults()).give_up(failed(failure, rank=3, iteration=41, image_files=("a.jpg",)), [])
    assert "rank 3, iteration 41" in reason and "it broke" in reason


def test_the_images_of_the_batch_are_named() -> None:
    assert "images of the batch: a.jpg, b.jpg" in described(failed("not_finite", image_files=("a.jpg", "b.jpg")))


def test_the_file_decides_what_is_started_again() -> None:
    assert Policy(Faults(restart_on=["storage"])).give_up(failed("storage"), []) == ""
    assert Policy(Faults(restart_on=[])).give_up(failed("worker_lost"), [])


@pytest.mark.parametrize("failure", ["unknown", "out_of_memory"])
def test_an_exception_twice_at_the_same_iteration_ends_the_trial(failure: str) -> None:
    policy = Policy(Faults())
    assert policy.give_up(failed(failure, image_files=("a.jpg",)), []) == ""
    reason = policy.give_up(failed(failure, image_files=("a.jpg",)), [])
    assert reason.startswith("twice at the same place") and "iteration 7" in reason and "a.jpg" in reason


def test_a_process_that_dies_twice_is_left_to_the_limit_because_its_iteration_is_not_known_exactly() -> None:
    policy = Policy(Faults(max_failures=2))
    assert [policy.give_up(failed("worker_lost"), []) for _ in range(2)] == ["", ""]
    assert policy.give_up(failed("worker_lost"), []).startswith("3 failures in a row")


def test_the_same_failure_at_another_iteration_is_started_again() -> None:
    policy = Policy(Faults())
    assert policy.give_up(failed("unknown", iteration=7), []) == ""
    assert policy.give_up(failed("unknown", iteration=8), []) == ""


def test_failures_in_a_row_without_a_new_checkpoint_are_limited() -> None:
    policy = Policy(Faults(max_failures=2))
    assert policy.give_up(failed("worker_lost", iteration=1), []) == ""
    assert policy.give_up(failed("worker_lost", iteration=2), []) == ""
    assert "3 failures in a row" in policy.give_up(failed("worker_lost", iteration=3), [])


def test_a_new_checkpoint_restarts_the_count() -> None:
    policy = Policy(Faults(max_failures=1))
    for iteration in range(10):
        events: list[Event] = [loop_started(100 * iteration), saved(100 * iteration + 100)]
        assert policy.give_up(failed("worker_lost", iteration=iteration), events) == ""


def test_the_checkpoint_that_was_restored_is_no_progress() -> None:
    policy = Policy(Faults(max_failures=1))
    assert policy.give_up(failed("worker_lost", iteration=1), [loop_started(100), saved(100)]) == ""
    assert policy.give_up(failed("worker_lost", iteration=2), [loop_started(100), saved(100)])


def test_a_lost_connection_is_not_the_cause_when_another_rank_failed() -> None:
    cause = root_cause([failed("communication", rank=0, time=1), failed("worker_lost", rank=1, time=2)])
    assert cause is not None and cause.rank == 1


def test_the_rank_whose_batch_it_was_is_the_cause_of_a_nan_on_all() -> None:
    cause = root_cause([failed("not_finite", rank=0), failed("not_finite", rank=1, image_files=("a.jpg",), time=5)])
    assert cause is not None and cause.rank == 1


def training(iterations: int, *, start_seconds: float = 14.0, **fields: Any) -> TrialBuilder:
    """Two workers that took so long to start, with a checkpoint at 4 of as many iterations of a second each."""
    made = TrialBuilder(plan(max_iter=iterations, **{"mtbf_hours": 0.1, **fields}))
    made.emit(GroupStarted, 10.0, rank=-1, part_seconds={"processes": start_seconds - 3, "process_group": 1.0})
    made.loop(14.0, setup_seconds=2.0)
    made.steps(18.0, 0, 1.0, 1.0, 1.0, 1.0)
    made.checkpoint(18.5, 4, 0.1)
    return made


def due(made: TrialBuilder, iteration: int = 4, **faults: Any) -> bool:
    return standby_is_due(Faults(**faults), made.trial, made.attempt, iteration, lambda: made.events)


def test_workers_wait_beside_a_trial_that_is_as_likely_as_not_to_fail_again() -> None:
    left = math.log(2) * 360
    assert due(training(int(4 + left) + 1)) and not due(training(int(4 + left)))
    assert not due(training(10**6, mtbf_hours=None)), "it has never failed"
    without = training(1000)
    without.events.pop()
    assert not due(without), "without a checkpoint, a restart begins at 0"


def test_no_workers_wait_for_the_little_that_is_left_of_a_trial() -> None:
    frequent = {"mtbf_hours": 0.001}
    least = int(STANDBY_STARTS * 14)
    assert due(training(4 + least + 1, **frequent)) and not due(training(4 + least, **frequent))


def test_workers_wait_where_that_is_asked_for_as_soon_as_all_train() -> None:
    made = TrialBuilder(plan())
    made.loop(14.0)
    assert due(made, 1, standby=True) and not due(made, 0, standby=True) and not due(made, 8, standby=True)
    made.events.pop()
    assert not due(made, 1, standby=True), "one rank is not ready"


@pytest.mark.parametrize("fields", [{"protocol": "throughput"}, {"protocol": "benchmark"}, {"device": "cuda"}])
def test_no_workers_wait_beside_a_measurement_or_on_gpus(fields: dict[str, Any]) -> None:
    assert due(training(1000)) and not due(training(1000, **fields))


@pytest.mark.parametrize("faults", [{"standby": False}, {"max_failures": 0}, {"restart_on": []}])
def test_no_workers_wait_where_they_would_never_be_needed(faults: dict[str, Any]) -> None:
    assert not due(training(1000), **faults)
