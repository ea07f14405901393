"""A trial's record from its events, by figures worked out by hand."""

import json
from dataclasses import replace

import pytest

from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.figures.trial import trial_result
from tests.builders.trials import TrialBuilder, plan, trained
from trainers.contract.events import (
    Event,
    GroupStarted,
    LoopStarted,
    StandbyLost,
    StandbyReady,
    WorkerFailed,
    event_from_json,
)


def _result(made: TrialBuilder) -> TrialResult:
    return trial_result(made.trial, made.events)


def _adds_up(result: TrialResult) -> None:
    assert result.sections is not None
    seconds = result.sections.model_dump()
    wall = seconds.pop("wall")
    assert sum(value for value in seconds.values() if value is not None) == pytest.approx(wall)


def test_the_clocks_of_a_run_without_a_failure():
    result = _result(trained())
    # Seed clock from 10: boxes scored at 19 (first to meet 50), masks at 27; MLPerf's from 14.
    assert result.time_to_box_target_seconds == pytest.approx(19 - 10)
    assert result.time_to_train_seconds == pytest.approx(27 - 10)
    assert result.mlperf_seconds == pytest.approx(27 - 14)
    assert result.schedule_seconds == pytest.approx(28 - 10)
    assert result.startup_seconds == pytest.approx(14)
    assert (result.evaluation_seconds, result.checkpoint_seconds) == (4.0, 0.5)
    assert (result.scored_iteration, result.scored_box_ap, result.scored_mask_ap) == (8, 55.0, 46.0)
    assert result.wall_images_per_second == pytest.approx(8 * 4 / (28 - 14))


def test_unequal_workers_are_rated_by_the_slowest():
    # After 2 iterations of warm-up: 6 iterations of 4 images over rank 1's 2 x 1.0 + 4 x 1.1 s.
    assert _result(trained()).images_per_second == pytest.approx(6 * 4 / 6.4)


def test_the_sections_add_up_to_the_wall_time():
    result = _result(trained())
    _adds_up(result)
    assert result.sections is not None
    # Steps of rank 0: 8 x 0.9 = 7.2 s, by tenths; 28 to 30 shut down; 30 - 14 - 7.2 - 4 - 0.5 - 2 is left.
    expected = {
        "wall": 30, "startup": 14, "data": 0.72, "forward": 1.44, "backward": 3.6, "optimizer": 1.44,
        "graph": None, "communication": None, "step_other": 0, "evaluation": 4, "checkpoint": 0.5, "lost_work": 0,
        "downtime": 0, "shutdown": 2, "other": 2.3,
    }  # fmt: skip
    assert result.sections.model_dump() == pytest.approx(expected)


def test_one_worker_has_no_skew_and_its_own_rate():
    made = TrialBuilder(plan(world_size=1))
    made.started()
    made.workers(1.0)
    made.loop(2.0)
    made.steps(10.0, 0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0)
    made.finished(10.0, 6, "max_iter")
    made.ended(11.0)
    result = _result(made)
    assert result.images_per_second == pytest.approx(4 * 4 / 8.0)
    assert result.rank_skew is None and len(result.ranks) == 1
    _adds_up(result)


def test_a_warm_up_longer_than_the_run_leaves_no_throughput_and_no_zero():
    result = _result(trained(throughput_warmup_iters=100))
    assert result.images_per_second is None
    assert result.step_seconds.p50 is None and result.data_wait_share is None
    assert result.rate_curve == [] and result.drift_ratio is None
    assert result.wall_images_per_second is not None


def test_no_evaluation_leaves_the_targets_unmet_with_a_reason():
    made = trained()
    made.events = [e for e in made.events if e.kind != "evaluated"]
    result = _result(made)
    assert result.time_to_train_seconds is None and result.mlperf_seconds is None
    assert result.box_ap is None and result.evaluations == []
    assert result.reason == "target not reached in 8 iterations"


def test_an_ap_that_is_not_a_number_meets_no_target():
    made = TrialBuilder(plan())
    made.started()
    made.workers(1.0)
    made.loop(2.0)
    made.steps(6.0, 0, 1.0, 1.0, 1.0, 1.0)
    made.evaluated(8.0, 4, None, None)
    made.finished(9.0, 4, "max_iter")
    made.ended(10.0)
    result = _result(made)
    assert result.box_ap is None and result.best_mask_ap is None
    assert result.time_to_train_seconds is None and "not reached" in result.reason


def test_a_model_of_boxes_alone_is_trained_when_its_boxes_are():
    result = _result(trained(target_mask_ap=None))
    assert result.time_to_train_seconds == result.time_to_box_target_seconds == pytest.approx(9)


def test_without_a_target_there_is_no_time_to_train_and_nothing_to_excuse():
    result = _result(trained(target_box_ap=None, target_mask_ap=None))
    assert result.time_to_train_seconds is None and result.reason == ""


def _restarted() -> TrialBuilder:
    """A worker is lost after iteration 6; the run goes on from the checkpoint at 4."""
    made = TrialBuilder(plan())
    made.started()
    made.workers(10.0)
    made.loop(14.0, setup_seconds=4.0)
    for rank in (0, 1):
        made.steps(18.0, 0, 1.0, 1.0, 1.0, 1.0, rank=rank)
    made.evaluated(20.0, 4, 40.0, 40.0)
    made.checkpoint(20.5, 4, 0.5)
    for rank in (0, 1):
        made.steps(22.5, 4, 0.75, 1.25, rank=rank)
    lost = {"failure": "worker_lost", "iteration": 6, "section": "step", "message": "is gone"}
    made.emit(WorkerFailed, 24.0, failure="communication", iteration=6, section="step", message="peer closed")
    made.emit(WorkerFailed, 25.0, rank=1, **lost, began=made.epoch + 23.5)
    made.restarted(30.0, iteration=6)
    made.workers(35.0)
    made.loop(37.0, iteration=4, setup_seconds=2.0)
    for rank in (0, 1):
        made.steps(41.0, 4, 1.0, 1.0, 1.0, 1.0, rank=rank)
    made.evaluated(43.0, 8, 55.0, 46.0)
    made.finished(43.0, 8)
    made.ended(45.0)
    return made


def test_a_restart_in_the_middle_stays_on_the_seed_clock_and_is_recorded_by_itself():
    result = _result(_restarted())
    assert result.time_to_train_seconds == pytest.approx(43 - 10)
    assert result.downtime_seconds == pytest.approx(37 - 22.5)
    assert result.num_restarts == 1 and result.restarts[0].lost_iterations == 2
    # From the last sign of life of the rank that was lost to the end of the first step of the next attempt.
    assert result.restarts[0].recovery_seconds == pytest.approx(37 + 1 - 23.5)
    # The peer noticed at 24; what an older version did not tell apart is in `scheduling` and `setup`.
    parts = {"detection": 0.5, "shutdown": 6.0, "scheduling": 5.0, "setup": 2.0, "first_step": 1.0}
    assert result.restarts[0].recovery_part_seconds == pytest.approx(parts)
    assert result.lost_work_seconds == pytest.approx(2.0)
    assert result.iterations == 8
    _adds_up(result)
    assert result.sections is not None and result.sections.other == pytest.approx(0.0)


def test_a_recovery_by_workers_that_waited_says_so_and_has_no_start_of_processes():
    made = _restarted()
    made.emit(GroupStarted, 34.5, rank=-1, part_seconds={"standby": 4.0})
    made.emit(StandbyReady, 22.0, rank=-1, iteration=3, start_seconds=9.0)
    made.emit(StandbyLost, 42.0, rank=-1, message="its node is gone")
    result = trial_result(made.trial, made.events)
    parts = {"detection": 0.5, "shutdown": 6.0, "standby": 5.0, "setup": 2.0, "first_step": 1.0}
    assert result.restarts[0].recovery_part_seconds == pytest.approx(parts)
    assert [note for note in result.notes if "faults.standby" in note and "up to iteration 3" in note]
    assert [note for note in result.notes if "were lost: its node is gone" in note]


def test_a_recovery_is_cut_into_parts_that_add_up_to_it():
    made = _restarted()
    made.emit(GroupStarted, 34.5, rank=-1, part_seconds={"processes": 2.0, "process_group": 1.5})
    setup = {"imports": 1.0, "data": 0.25, "model": 0.25, "checkpoint": 0.4, "loop": 0.1}
    events = [
        replace(event, setup_part_seconds=setup) if isinstance(event, LoopStarted) else event for event in made.events
    ]
    (restart,) = trial_result(made.trial, events).restarts
    driver = {"detection": 0.5, "shutdown": 6.0, "scheduling": 1.0, "processes": 2.0, "process_group": 2.0}
    assert restart.recovery_part_seconds == pytest.approx(driver | setup | {"first_step": 1.0})
    assert sum(restart.recovery_part_seconds.values()) == pytest.approx(restart.recovery_seconds)


def test_work_done_twice_counts_in_the_rate_and_not_in_the_images_per_wall_second():
    result = _result(_restarted())
    # After warm-up: 2 + 2 + 4 iterations of 4 images in 2 + 2 + 4 s on each rank.
    assert result.images_per_second == pytest.approx(8 * 4 / 8.0)
    assert result.wall_images_per_second == pytest.approx(8 * 4 / (43 - 14))


def test_a_restart_before_the_first_window_loses_what_was_not_reported():
    made = TrialBuilder(plan())
    made.started()
    made.workers(1.0)
    made.loop(2.0)
    made.restarted(5.0, iteration=1)
    made.workers(6.0)
    made.loop(8.0)
    for rank in (0, 1):
        made.steps(12.0, 0, 1.0, 1.0, 1.0, 1.0, rank=rank)
    made.finished(12.0, 4, "max_iter")
    made.ended(13.0)
    result = _result(made)
    assert result.downtime_seconds == pytest.approx(6.0)
    assert result.sections is not None and result.sections.startup == 2.0
    _adds_up(result)


def test_a_start_that_is_lost_before_it_trains_costs_no_more_than_the_next_one_repeats():
    made = TrialBuilder(plan())
    made.started()
    made.workers(1.0)
    made.loop(2.0)
    for rank in (0, 1):
        made.steps(6.0, 0, 1.0, 1.0, 1.0, 1.0, rank=rank)
    made.restarted(7.0, iteration=4)
    made.workers(8.0)
    made.restarted(10.0, iteration=0)
    made.workers(11.0)
    made.loop(12.0, iteration=2)
    for rank in (0, 1):
        made.steps(14.0, 2, 1.0, 1.0, rank=rank)
    made.finished(14.0, 4, "max_iter")
    made.ended(15.0)
    assert [restart.lost_iterations for restart in _result(made).restarts] == [2, 0]


def test_a_trial_that_never_reached_its_loop_has_figures_of_none():
    made = TrialBuilder(plan())
    made.started()
    made.ended(5.0, "FAILED", "no such data")
    result = _result(made)
    assert (result.status, result.reason) == ("FAILED", "no such data")
    assert result.iterations is None and result.images_per_second is None and result.sections is None


def test_a_trial_that_has_not_ended_has_no_result():
    made = trained()
    with pytest.raises(ValueError, match="has not ended"):
        trial_result(made.trial, made.events[:-1])


def test_every_ranks_figures_come_back():
    result = _result(trained())
    assert [rank.images_per_second for rank in result.ranks] == [
        pytest.approx(12 / 5.4),
        pytest.approx(12 / 6.4),
    ]
    assert [rank.peak_memory_gib for rank in result.ranks] == [1.0, 2.0]
    assert result.peak_memory_gib == 2.0
    assert result.step_seconds.p50 == pytest.approx(0.95)
    assert result.part_seconds["forward"].p50 == pytest.approx(0.19)
    assert result.data_wait_share == pytest.approx(0.1)


def test_skew_is_of_the_workers_own_time_without_waiting_for_each_other():
    made = TrialBuilder(plan(throughput_warmup_iters=0))
    made.started()
    made.workers(1.0)
    made.loop(2.0)
    for rank, waits in ((0, (0.6, 0.6)), (1, (0.0, 0.0))):
        made.steps(4.0, 0, 1.0, 1.0, rank=rank, step_part_seconds={"communication": waits})
    made.finished(4.0, 2, "max_iter")
    made.ended(5.0)
    result = _result(made)
    assert [rank.own_seconds for rank in result.ranks] == [pytest.approx(0.8), pytest.approx(2.0)]
    assert result.rank_skew == pytest.approx(2.0 / 1.4)


def test_without_the_wait_measured_there_is_no_skew():
    assert _result(trained()).rank_skew is None


def test_the_record_survives_its_own_json(tmp_path):
    result = ExperimentResult(experiment="x", status="FINISHED", started="now", trials=[_result(trained())])
    result.write(tmp_path / "results.json")
    assert ExperimentResult.model_validate_json((tmp_path / "results.json").read_text()) == result
    assert set(json.loads((tmp_path / "results.json").read_text())) >= {"trials", "scaling", "repeats", "fits"}


def test_events_survive_the_outbox():
    def back(event: Event) -> Event:
        return event_from_json(event.to_json())

    events = trained().events
    assert [back(event) for event in events] == events
