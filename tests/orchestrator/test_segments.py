"""A trial that did not always run with all its workers says which iterations were trained with how many."""

from __future__ import annotations

from pathlib import Path

from orchestrator.figures.goodput import measured_mtbf_hours
from orchestrator.figures.trial import trial_result
from orchestrator.report.details import detail_tables
from orchestrator.runlog.folder import TrialEvents
from orchestrator.tracking.notes import outcome_tags
from tests.builders.trials import TrialBuilder, plan, trained
from trainers.contract.events import TrialRestarted, WorkerStarted


def _attempt(made: TrialBuilder, at: float, size: int, first: int, *windows: int, seconds: float = 1.0) -> float:
    """An attempt of some workers: windows of so many steps after `first` iterations; returns when they end."""
    for rank in range(size):
        made.emit(
            WorkerStarted, at, rank, host="a", node_id="a", pid=rank, local_rank=rank, device_name="Test CPU",
            device_memory_gib=None, versions={}, world_size=size,
        )  # fmt: skip
    made.loop(at, iteration=first)
    for number in windows:
        at += number * seconds
        for rank in range(size):
            made.steps(at, first, *[seconds] * number, rank=rank, num_images=number * 4 // size)
        first += number
    return at


def _restarted(made: TrialBuilder, at: float, iteration: int, failure: str) -> None:
    made.attempt += 1
    made.emit(TrialRestarted, at, rank=-1, failure=failure, message="because", iteration=iteration)


def _resized() -> TrialBuilder:
    """Planned with 2 workers: 1 worker to 4, 2 workers from there to 10, lost; 2 from 8 to 12; 1 from 12 to 16."""
    made = TrialBuilder(plan(max_iter=16))
    made.started()
    _attempt(made, 1.0, 1, 0, 2, 2, seconds=2.0)
    _restarted(made, 10.0, 4, "resized")
    _attempt(made, 20.0, 2, 4, 2, 4)
    _restarted(made, 30.0, 10, "worker_lost")
    _attempt(made, 40.0, 2, 8, 4, seconds=0.5)
    _restarted(made, 50.0, 12, "worker_lost")
    _attempt(made, 60.0, 1, 12, 4, seconds=2.0)
    made.finished(70.0, 16, "max_iter")
    made.ended(71.0)
    return made


def test_segments_follow_on_each_other_and_each_has_the_rate_of_its_size() -> None:
    made = _resized()
    result = trial_result(made.trial, made.events)
    rows = [(each.first_iteration, each.iteration, each.world_size) for each in result.segments]
    assert rows == [(0, 4, 1), (4, 12, 2), (12, 16, 1)]
    # 2 of 4 steps after the warm-up of 2, 4 images each; 6 steps of 1 s and 4 of half a second; 4 of 2 s.
    assert [each.images_per_second for each in result.segments] == [8 / 4, 40 / 8, 16 / 8]
    assert {(each.global_batch_size, each.base_lr) for each in result.segments} == {(4, 0.02)}
    assert result.images_per_second == 40 / 8, "the trial's is of the attempts with all workers"
    assert result.notes[0].startswith("attempt 0 with 1, attempt 3 with 1 of 2 workers")


def test_report_and_tracking_show_them() -> None:
    made = _resized()
    result = trial_result(made.trial, made.events)
    headings, rows = detail_tables([TrialEvents("one", result, made.events, None, Path("/"))])["Numbers of workers"]
    assert [dict(zip(headings, row, strict=True))["Workers"] for row in rows] == ["1", "2", "1"]
    assert outcome_tags(result, made.events)["segments"] == (
        "0 to 4: 1 worker, 2.00 images/s; 4 to 12: 2 workers, 5.00 images/s; 12 to 16: 1 worker, 2.00 images/s"
    )


def test_a_trial_that_always_had_its_workers_has_none() -> None:
    made = trained()
    result = trial_result(made.trial, made.events)
    assert result.segments == [] and "segments" not in outcome_tags(result, made.events)
    assert "Numbers of workers" not in detail_tables([TrialEvents("one", result, made.events, None, Path("/"))])


def test_a_trial_that_never_had_all_has_a_segment_and_no_throughput() -> None:
    made = TrialBuilder(plan())
    made.started()
    _attempt(made, 1.0, 1, 0, 8)
    made.finished(10.0, 8, "max_iter")
    made.ended(11.0)
    result = trial_result(made.trial, made.events)
    assert [(each.iteration, each.world_size) for each in result.segments] == [(8, 1)]
    assert result.images_per_second is None and result.segments[0].images_per_second == 4.0


def test_growing_is_no_failure() -> None:
    made = TrialBuilder(plan())
    made.started()
    _attempt(made, 1.0, 1, 0, 4)
    _restarted(made, 10.0, 4, "resized")
    assert measured_mtbf_hours(made.events) is None
