"""Logs of detectron2 give the figures of a run of ours, and no number that they do not hold."""

import datetime
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.figures.records import TrialResult
from orchestrator.replay.record import experiment_result, replay
from orchestrator.replay.trial import Targets
from orchestrator.replay.unpacking import ReplayError
from tests.builders.logs import MadeLog, whole_run


def _read(made: MadeLog, folder, **options) -> TrialResult:
    (one,) = replay([made.write(folder / "made.log")], **options)
    return one.result


def test_a_whole_log_gives_the_figures_of_a_run_of_ours(tmp_path):
    result = _read(whole_run(), tmp_path)
    assert result.images_per_second == pytest.approx(4 / 0.5)
    assert result.wall_images_per_second == pytest.approx(80 * 4 / 64)
    assert result.time_to_box_target_seconds == 70 and result.time_to_train_seconds == 73
    assert result.mlperf_seconds == 63 and result.schedule_seconds == 86
    assert result.startup_seconds == 10
    assert (result.scored_iteration, result.scored_box_ap, result.scored_mask_ap) == (80, 38.1234, 34.5678)
    assert [e.iteration for e in result.evaluations] == [40, 80, 80]
    assert [e.seconds for e in result.evaluations] == [12, 12, 12]
    assert result.evaluations[0].figures["box_aps"] is None
    assert (result.world_size, result.num_nodes, result.device_name, result.seed) == (2, 1, "Made GPU", 11)
    assert (result.status, result.iterations, result.num_train_images, result.num_val_images) == (
        "FINISHED", 80, 40, 10,
    )  # fmt: skip
    assert result.data_wait_share == pytest.approx(0.1)
    assert result.peak_memory_gib == 2.0
    assert result.throughput_warmup_iters == 2
    assert result.notes == []


def test_the_sections_of_a_log_add_up_and_leave_out_what_it_does_not_print(tmp_path):
    sections = _read(whole_run(), tmp_path).sections
    assert sections is not None
    seconds = sections.model_dump()
    assert seconds["forward"] is None and seconds["checkpoint"] is None
    assert (seconds["startup"], seconds["evaluation"], seconds["data"]) == (10, 36, pytest.approx(4.0))
    wall = seconds.pop("wall")
    assert sum(value or 0 for value in seconds.values()) == pytest.approx(wall) == 86


def test_single_steps_and_ranks_are_not_made_up(tmp_path):
    result = _read(whole_run(), tmp_path)
    assert result.step_seconds.p50 is None and result.ranks == [] and result.hosts == []
    assert result.checkpoint_seconds is None and result.rate_curve_source == "timestamps"


def test_the_console_of_detectron2_is_read_as_its_log(tmp_path):
    plain, styled = _read(whole_run(), tmp_path), _read(whole_run(styled=True), tmp_path)
    assert plain == styled


def test_a_log_that_ends_early_gives_what_it_printed_and_says_so(tmp_path):
    made = MadeLog().head().start().progress().evaluate(30.0, 28.0).progress(step=0.4321)
    result = _read(made, tmp_path)
    assert (result.status, result.iterations) == ("KILLED", 60)
    assert result.reason == "the log ends after iteration 60 of 80"
    assert result.images_per_second == pytest.approx(4 / 0.4321)
    assert any("mean step printed at iteration 60" in note for note in result.notes)
    assert result.time_to_train_seconds is None and result.schedule_seconds is None
    assert result.wall_images_per_second == pytest.approx(60 * 4 / 42)


def test_a_number_cut_off_at_the_end_of_the_file_is_not_read(tmp_path):
    text = MadeLog().head().start().progress().progress().text()
    (tmp_path / "cut.log").write_text(text[: text.rindex("time: 0.5000") + len("time: 0.5")])
    (one,) = replay([tmp_path / "cut.log"])
    assert one.result.iterations == 20
    assert "the last line is cut off and was left out" in one.result.notes


def test_an_evaluation_cut_off_before_its_boxes_is_left_out(tmp_path):
    text = whole_run().text()
    (tmp_path / "cut.log").write_text(text[: text.index("Evaluation results for bbox", len(text) // 2) - 40])
    (one,) = replay([tmp_path / "cut.log"])
    assert [e.iteration for e in one.result.evaluations] == [40]
    assert any("breaks off in an evaluation" in note for note in one.result.notes)


@settings(max_examples=60)
@given(st.integers(0, len(whole_run().text())))
def test_a_log_cut_anywhere_never_gives_another_number(tmp_path_factory, cut):
    whole = whole_run()
    folder = tmp_path_factory.mktemp("cut")
    full = _read(whole, folder)
    (folder / "cut.log").write_text(whole.text()[:cut])
    try:
        (one,) = replay([folder / "cut.log"])
    except ReplayError:
        return
    result = one.result
    assert result.images_per_second in (None, 8.0)
    assert result.time_to_train_seconds in (None, 73.0) and result.time_to_box_target_seconds in (None, 70.0)
    assert result.startup_seconds in (None, 10.0) and result.schedule_seconds in (None, *range(74, 87))
    for mine, theirs in zip(result.evaluations, full.evaluations, strict=False):
        assert mine.iteration == theirs.iteration
        assert mine.box_ap is None or mine.box_ap == pytest.approx(theirs.box_ap, abs=5e-4)
        assert mine.mask_ap is None or mine.mask_ap == pytest.approx(theirs.mask_ap, abs=5e-4)


def test_a_restarted_run_keeps_its_first_clock_and_counts_its_downtime(tmp_path):
    made = MadeLog().head().start().progress().evaluate(30.0, 28.0).progress()  # ends at 52
    made.wait(100)
    made.head().start(40).progress().evaluate(38.0, 34.0).close(total="0:00:32")
    result = _read(made, tmp_path)
    assert result.num_restarts == 1 and result.restarts[0].lost_iterations == 20
    assert result.downtime_seconds == 110  # 100 waiting and 10 starting up
    assert result.time_to_train_seconds == 52 + 110 + 20 + 11
    assert result.lost_work_seconds == pytest.approx(10)
    assert result.iterations == 80 and result.images_per_second == 8.0
    assert any("started 2 times" in note for note in result.notes)


def test_a_line_that_a_restart_cut_off_is_not_read(tmp_path):
    made = MadeLog().head().start().progress().progress()
    text = made.text()
    torn = text[: text.rindex("time: 0.5000") + len("time: 0.5")]
    again = MadeLog(made.clock + datetime.timedelta(seconds=5)).head().start(20).progress().progress().progress()
    (tmp_path / "torn.log").write_text(torn + again.text())
    (one,) = replay([tmp_path / "torn.log"])
    assert one.result.num_restarts == 1 and one.result.images_per_second == 8.0
    assert any("interrupted by another line" in note for note in one.result.notes)


def test_two_runs_in_one_file_are_separate_trials(tmp_path):
    made = whole_run()
    made.wait(60)
    made.head(world=4).start().progress()
    made.write(tmp_path / "two.log")
    first, second = replay([tmp_path / "two.log"])
    assert (first.plan.name, second.plan.name) == ("two", "two-run2")
    assert (first.result.world_size, second.result.world_size) == (2, 4)
    assert first.result.time_to_train_seconds == 73 and second.result.iterations == 20
    assert all(any("holds 2 runs" in note for note in one.result.notes) for one in (first, second))


def test_two_runs_that_write_at_once_are_an_error(tmp_path):
    one, two = whole_run().lines, whole_run().lines
    mixed = [line for pair in zip(one, two, strict=True) for line in pair]
    (tmp_path / "mixed.log").write_text("\n".join(mixed) + "\n")
    with pytest.raises(ReplayError, match="two runs are mixed"):
        replay([tmp_path / "mixed.log"])


def test_iterations_that_go_back_without_a_start_are_an_error(tmp_path):
    made = MadeLog().head().start().progress().progress()
    made.iteration = 0
    made.progress()
    with pytest.raises(ReplayError, match="mixes several runs"):
        _read(made, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a detectron2 log"),
        ("2021-05-04 10:00:00,000 - mmdet - INFO - Epoch [1][50/7330]\tlr: 0.02\n", "not a detectron2 log"),
        ("[05/04 10:00:00] detectron2 INFO: Rank of current process: 0. World size: 1\n", "without training"),
        ("[13/45 10:00:00] detectron2 INFO: x\n", "impossible"),
    ],
)
def test_what_is_no_training_log_is_a_clear_error(tmp_path, text, message):
    (tmp_path / "other.log").write_text(text)
    with pytest.raises(ReplayError, match=message):
        replay([tmp_path / "other.log"])


def test_bytes_that_are_no_text_do_not_stop_the_reading(tmp_path):
    (tmp_path / "x.log").write_bytes(b"\xff\xfe\x00\n" + whole_run().text().encode() + b"\x80\n")
    (one,) = replay([tmp_path / "x.log"])
    assert one.result.time_to_train_seconds == 73


@pytest.mark.parametrize(
    "start",
    [
        datetime.datetime(2021, 12, 31, 23, 59, 30, tzinfo=datetime.UTC),
        datetime.datetime(2021, 2, 28, 23, 59, 30, tzinfo=datetime.UTC),
        datetime.datetime(2020, 2, 28, 23, 59, 30, tzinfo=datetime.UTC),
        datetime.datetime(2020, 2, 29, 23, 59, 30, tzinfo=datetime.UTC),
    ],
)
def test_a_run_over_the_end_of_a_year_or_of_february_gains_no_day(tmp_path, start):
    made = MadeLog(start).head().start().progress().evaluate(38.0, 34.0)
    assert _read(made, tmp_path).time_to_train_seconds == 41


def test_a_clock_that_is_set_back_gives_no_times(tmp_path):
    made = MadeLog().head().start().progress().evaluate(30.0, 28.0)
    made.wait(-3600)
    made.progress().evaluate(38.0, 34.0).close()
    result = _read(made, tmp_path)
    assert result.time_to_train_seconds is None and result.sections is None and result.startup_seconds is None
    assert result.images_per_second == 8.0 and result.box_ap == 38.0
    assert [e.elapsed_seconds for e in result.evaluations] == [None, None]
    assert any("clock jumps" in note for note in result.notes)


def test_a_clock_that_is_set_forward_is_found_out_by_the_closing_time(tmp_path):
    made = MadeLog().head().start().progress()
    made.wait(3600)
    made.evaluate(38.0, 34.0).close()
    assert _read(made, tmp_path).time_to_train_seconds is None


def test_a_model_of_boxes_alone_has_no_mask_figures(tmp_path):
    made = MadeLog().head(masks=False).start().progress().evaluate(38.0, None)
    result = _read(made, tmp_path)
    assert result.mask_ap is None and result.target_mask_ap is None
    assert result.time_to_train_seconds == result.time_to_box_target_seconds == 38


def test_an_ap_of_nan_meets_no_target(tmp_path):
    made = MadeLog().head().start().progress().evaluate(float("nan"), float("nan"))
    result = _read(made, tmp_path)
    assert result.box_ap is None and result.time_to_train_seconds is None


def test_without_evaluations_on_the_way_the_run_is_one_for_speed(tmp_path):
    result = _read(MadeLog().head(period=0).start().progress().progress().close(total="0:00:20"), tmp_path)
    assert (result.protocol, result.target_box_ap, result.evaluations) == ("throughput", None, [])
    assert result.images_per_second == 8.0


def test_a_log_without_its_head_has_a_step_time_and_no_throughput(tmp_path):
    made = MadeLog()
    made.iteration = 1000
    made.progress().progress()
    result = _read(made, tmp_path)
    assert result.images_per_second is None and result.global_batch_size is None
    assert result.startup_seconds is None and result.schedule_seconds is None
    assert result.num_train_images is None and result.seed is None and result.protocol is None
    assert result.rate_curve == [] and result.device is None
    assert any("no start of training" in note for note in result.notes)
    assert any("how many workers" in note for note in result.notes)


def test_a_continuation_without_its_beginning_has_no_time_to_train(tmp_path):
    result = _read(MadeLog().head().start(40).progress().evaluate(38.0, 34.0).close(), tmp_path)
    assert result.time_to_train_seconds is None and result.box_ap == 38.0
    assert any("beginning is not in this log" in note for note in result.notes)


def test_targets_can_be_named(tmp_path):
    result = _read(whole_run(), tmp_path, targets=Targets(20.0, 25.0))
    assert result.time_to_train_seconds == 41 and result.scored_iteration == 40


def test_weak_and_strong_scaling_are_distinguished_by_the_batches(tmp_path):
    logs = [
        MadeLog().head(world=world, batch=batch).start().progress().close().write(tmp_path / f"{world}-{batch}.log")
        for world, batch in ((1, 4), (2, 4), (4, 16))
    ]
    result = experiment_result("x", replay(logs), [])
    assert [(row.kind, row.world_size) for row in result.scaling] == [("weak", 1), ("weak", 4), ("strong", 2)]


def test_metrics_json_alone_gives_its_ap_and_no_time(tmp_path):
    rows = [{"iteration": 19, "total_loss": 1.0, "time": 0.5, "data_time": 0.01, "lr": 0.01}]
    rows += [{"iteration": 39, "total_loss": 0.9, "bbox/AP": 12.5, "segm/AP": 11.0, "bbox/AP-cat": 3.0}]
    (tmp_path / "metrics.json").write_text("\n".join(json.dumps(row) for row in rows) + '\n{"iteration": 59, "tot')
    (one,) = replay([tmp_path])
    result = one.result
    assert (result.iterations, result.box_ap, result.mask_ap) == (40, 12.5, 11.0)
    assert result.evaluations[0].figures == {"box_ap": 12.5, "mask_ap": 11.0}
    assert result.images_per_second is None and result.schedule_seconds is None and result.sections is None
    assert result.evaluation_seconds is None and result.evaluations[0].elapsed_seconds is None
