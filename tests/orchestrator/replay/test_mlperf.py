"""Result files of MLPerf give the figures of a run of ours; several of one system give MLPerf's score."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.figures.records import TrialResult
from orchestrator.figures.trial import trial_result
from orchestrator.replay.record import experiment_result, replay
from orchestrator.replay.trial import Targets
from orchestrator.replay.unpacking import ReplayError
from orchestrator.report.mlperf import mllog_text
from tests.builders.commands import run_command
from tests.builders.mllogs import MadeMllog, old_run, submission, whole_run
from tests.builders.trials import trained

EPOCH = 117_266 / 96
"""Iterations of an epoch."""


def _read(made: MadeMllog, folder: Path, **options) -> TrialResult:
    (one,) = replay([made.write(folder / "made.txt")], **options)
    return one.result


def _read_text(text: str, folder: Path) -> TrialResult:
    folder.mkdir(exist_ok=True)
    (folder / "made.txt").write_text(text)
    (one,) = replay([folder / "made.txt"])
    return one.result


def test_a_log_of_the_later_rounds_gives_the_figures_of_a_run_of_ours(tmp_path: Path):
    result = _read(whole_run(), tmp_path)
    assert result.mlperf_seconds == 200 + 5 + 200 + 5 + 7 + 2
    assert result.time_to_train_seconds == 30 + 417  # the seed's clock, until the scores
    assert result.images_per_second == pytest.approx(600)
    assert (result.world_size, result.global_batch_size, result.base_lr, result.seed) == (8, 96, 0.12, 7)
    assert (result.num_train_images, result.num_val_images) == (117266, 5000)
    assert [e.epoch for e in result.evaluations] == [1, 2]
    assert [(e.box_ap, e.mask_ap) for e in result.evaluations] == [(20.0, 18.0), (38.0, 34.5)]
    assert [e.iteration for e in result.evaluations] == [round(EPOCH), round(2 * EPOCH)]
    assert [e.seconds for e in result.evaluations] == [12, 12] and result.evaluation_seconds == 10
    assert (result.scored_iteration, result.status, result.reason) == (round(2 * EPOCH), "FINISHED", "")
    assert result.rate_curve[0].images_per_second == pytest.approx(611 * 96 / 100)  # of at least a minute
    assert "train_samples is 40,000 in the log; COCO 2017 has 117,266, which is taken" in result.notes
    assert any(note.startswith("images/s is the median of the log's tracked_stats") for note in result.notes)


def test_a_log_of_the_oldest_round_is_read_without_steps(tmp_path: Path):
    result = _read(old_run(), tmp_path)
    assert result.mlperf_seconds == 441 and result.evaluation_seconds == 40
    assert result.images_per_second == pytest.approx(117_266 / 200, rel=1e-3)
    assert [e.seconds for e in result.evaluations] == [20, 20]
    assert result.sections.evaluation == 40 and result.world_size == 8
    assert "images/s is the images of all epochs over their seconds, without evaluations" in result.notes


def test_a_log_that_names_the_submission_at_its_end_is_read_as_others(tmp_path: Path):
    made = MadeMllog()
    made.line("init_start").line("global_batch_size", 256).line("train_samples", 118287).wait(10)
    made.start().line("block_start", first_epoch_num=0, epoch_count=1).wait(50)
    made.line("block_stop", first_epoch_num=0, epoch_count=1).wait(5).line("eval_start", epoch_num=1).wait(4)
    made.score(1, 0.38, 0.35).line("eval_stop", epoch_num=1).stop()
    made.ms = 0
    made.line("submission_benchmark", "maskrcnn").line("submission_division", "closed")
    result = _read(made, tmp_path)
    assert (result.mlperf_seconds, result.startup_seconds, result.num_train_images) == (59, 10, 118287)
    assert result.target_box_ap == 37.7 and result.time_to_train_seconds == 69
    assert result.images_per_second == pytest.approx(118287 / 50, rel=1e-3)


@pytest.mark.parametrize("status", ["aborted", "abort", ""])
def test_a_run_without_success_has_no_time_whatever_its_ap(tmp_path: Path, status: str):
    result = _read(whole_run(status=status), tmp_path)
    assert result.mlperf_seconds is None and result.status == "KILLED"
    assert result.reason == (f"run_stop says {status}" if status else "the log ends without run_stop")
    assert result.images_per_second == pytest.approx(600)


def _five(folder: Path, *seconds: float, statuses: tuple[str, ...] = ("success",) * 5) -> Path:
    runs = [
        whole_run(epoch_seconds=each, status=status, seed=number)
        for number, (each, status) in enumerate(zip(seconds, statuses, strict=True))
    ]
    return submission(folder, *runs)


def test_five_files_of_a_system_are_a_benchmark_with_mlperfs_score(tmp_path: Path):
    replayed = replay([_five(tmp_path, 300, 200, 210, 190, 250)])
    result = experiment_result("made", replayed, [])
    assert [one.plan.name for one in replayed] == [f"made_a100-result_{number}" for number in range(5)]
    assert result.benchmark.score_minutes == pytest.approx((2 * (200 + 210 + 250) / 3 + 19) / 60)
    assert result.benchmark.counted == ["made_a100-result_1", "made_a100-result_2", "made_a100-result_4"]
    assert result.benchmark.division == "closed"
    assert {(t.world_size, t.num_nodes, t.device_name, t.recipe) for t in result.trials} == {
        (8, 1, "NVIDIA Made", "Made 1xMADE made_a100")
    }
    assert result.repeats[0].num_trials == 5


def test_an_aborted_run_is_the_worst_of_the_five(tmp_path: Path):
    statuses = ("aborted", "success", "success", "success", "success")
    result = experiment_result("made", replay([_five(tmp_path, 100, 200, 210, 190, 250, statuses=statuses)]), [])
    assert result.benchmark.score_minutes == pytest.approx((2 * (200 + 210 + 250) / 3 + 19) / 60)
    assert result.benchmark.num_valid == 4


def test_two_runs_that_were_aborted_leave_no_score(tmp_path: Path):
    statuses = ("aborted", "", "success", "success", "success")
    result = experiment_result("made", replay([_five(tmp_path, 100, 200, 210, 190, 250, statuses=statuses)]), [])
    assert result.benchmark.score_minutes is None and "2 of 5 runs" in result.benchmark.score_reason


def test_two_systems_are_not_scored_together_and_are_no_repeats(tmp_path: Path):
    folders = [
        submission(tmp_path, whole_run(), whole_run(seed=2), system=name, nodes=nodes)
        for name, nodes in (("a", 1), ("b", 8))
    ]
    result = experiment_result("made", replay(folders), [])
    assert result.benchmark is None and [row.num_trials for row in result.repeats] == [2, 2]
    assert [trial.world_size for trial in result.trials] == [8, 8, 64, 64]
    assert [trial.name for trial in result.trials] == ["a-result_0", "a-result_1", "b-result_0", "b-result_1"]


def test_our_own_log_of_mlperf_gives_the_trials_figures_again(tmp_path: Path):
    made = trained()
    ours = trial_result(made.trial, made.events)
    file = tmp_path / "my-trial" / "mllog.txt"
    file.parent.mkdir()
    file.write_text(mllog_text(made.trial, made.events, ours))
    (one,) = replay([file], Targets(50.0, 45.0))
    again = one.result
    assert one.plan.name == "my-trial" and one.plan.recipe_name == "Test CPU my-trial"
    same = ("mlperf_seconds", "time_to_train_seconds", "world_size", "seed", "global_batch_size", "base_lr",
            "num_train_images", "num_val_images", "iterations", "scored_iteration", "box_ap", "mask_ap")  # fmt: skip
    assert {name: getattr(again, name) for name in same} == {name: getattr(ours, name) for name in same}
    assert [e.epoch for e in again.evaluations] == [e.epoch for e in ours.evaluations]


def test_a_file_with_two_runs_has_two_trials(tmp_path: Path):
    first, second = whole_run(), whole_run(seed=8)
    (tmp_path / "both.txt").write_text(first.text() + second.text().replace("16000", "16100"))
    replayed = replay([tmp_path / "both.txt"])
    assert [one.result.seed for one in replayed] == [7, 8]
    assert [one.plan.name for one in replayed] == ["both", "both-run2"]
    assert all("the file holds 2 runs, which are separate trials here" in one.result.notes for one in replayed)


def test_a_start_that_every_rank_prints_is_one_run(tmp_path: Path):
    text = whole_run().text()
    line = next(line for line in text.splitlines() if "run_start" in line)
    (tmp_path / "ranks.txt").write_text(text.replace(line, f"{line}\n{line} {line}"))
    (one,) = replay([tmp_path / "ranks.txt"])
    assert one.result.mlperf_seconds == 419


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path):
    text = whole_run().text() + ':::MLLOG {not json\n:::MLLOG\n:::MLLOG []\n:::MLLOG {"key": "seed"}\n'
    (tmp_path / "x.txt").write_text(text)
    (one,) = replay([tmp_path / "x.txt"])
    assert "4 lines of MLPerf's cannot be read and were left out" in one.result.notes
    assert one.result.mlperf_seconds == 419


@pytest.mark.parametrize("value", ["NaN", "null", '"high"', "Infinity", "1e400"])
def test_an_ap_that_is_no_number_was_not_measured(tmp_path: Path, value: str):
    (tmp_path / "x.txt").write_text(whole_run().text().replace('"BBOX": 0.38', f'"BBOX": {value}'))
    (one,) = replay([tmp_path / "x.txt"])
    assert one.result.evaluations[-1].box_ap is None and one.result.time_to_train_seconds is None
    assert one.result.evaluations[-1].mask_ap == 34.5


@pytest.mark.parametrize("value", ["38", "-1", "NaN", '"high"'])
def test_an_ap_outside_0_to_1_is_not_measured_and_named(tmp_path: Path, value: str):
    result = _read_text(whole_run().text().replace('"BBOX": 0.38', f'"BBOX": {value}'), tmp_path)
    assert result.evaluations[-1].box_ap is None and result.time_to_train_seconds is None
    assert f"eval_accuracy BBOX is {value} at epoch 2, no AP of 0–1: not measured" in result.notes


def test_a_success_below_the_targets_keeps_mlperfs_clock_and_says_so(tmp_path: Path):
    result = _read(whole_run(aps=((0.2, 0.18), (0.3, 0.28))), tmp_path)
    assert (result.mlperf_seconds, result.time_to_train_seconds, result.status) == (419, None, "FINISHED")
    assert any(note.startswith("run_stop says success, by which MLPerf scores, but no") for note in result.notes)


@pytest.mark.parametrize(
    ("key", "seconds", "reason"),
    [
        ("run_stop", -2000, "run_stop is before run_start"),
        ("eval_start", -100, "times go backwards at eval_start, by 100.0 s"),
        ("block_stop", -2000, "times go backwards at block_stop, by 2,000.0 s"),
    ],
)
def test_times_that_go_backwards_are_not_measured(tmp_path: Path, key: str, seconds: int, reason: str):
    made = whole_run()
    at = max(number for number, line in enumerate(made.lines) if f'"key": "{key}"' in line)
    made.lines[at] = re.sub(r"(?<=time_ms.: )\d+", lambda found: str(int(found[0]) + 1000 * seconds), made.lines[at])
    result = _read(made, tmp_path)
    assert result.reason == reason and f"{reason}: no time of this run is measured" in result.notes
    clocks = ("mlperf_seconds", "time_to_train_seconds", "time_to_box_target_seconds", "schedule_seconds",
              "startup_seconds", "evaluation_seconds", "sections", "wall_images_per_second")  # fmt: skip
    assert {getattr(result, name) for name in clocks} == {None}
    assert {(e.seconds, e.elapsed_seconds) for e in result.evaluations} == {(None, None)}
    assert result.box_ap == 38 and result.images_per_second == pytest.approx(600)  # as the log prints it


def test_numbers_in_strings_are_read(tmp_path: Path):
    text = re.sub(r'("time_ms"|"value"|"BBOX"): ([\d.]+)', r'\1: "\2"', whole_run().text())
    assert _read_text(text, tmp_path) == _read(whole_run(), tmp_path)


@pytest.mark.parametrize("value", ["null", "Infinity", '"many"', "0", "1" + 17 * "0"])
def test_a_batch_that_cannot_be_read_is_not_called_missing(tmp_path: Path, value: str):
    text = old_run().text().replace('"global_batch_size", "value": 96', f'"global_batch_size", "value": {value}')
    result = _read_text(text, tmp_path)
    assert result.global_batch_size is None and result.images_per_second is None
    assert f"global_batch_size is {value} in the log, which cannot be read" in result.notes
    assert "its batch or its images are unreadable: its iterations are epochs" in result.notes


def test_times_that_cannot_be_read_are_not_called_missing(tmp_path: Path):
    lines = whole_run().text().splitlines()
    lines[-1] = re.sub(r"(?<=time_ms.: )\d+", "Infinity", lines[-1])
    result = _read_text("\n".join(lines), tmp_path)
    assert result.reason == "the time of run_stop cannot be read" and result.mlperf_seconds is None
    assert "lines were left out, 1 in all, as their time_ms cannot be read: run_stop" in result.notes
    with pytest.raises(ReplayError, match=r"whether it trained is not known .*time_ms cannot be read: submission"):
        _read_text(re.sub(r"(?<=time_ms.: )\d+", "null", whole_run().text()), tmp_path)


def test_a_log_without_batch_has_no_rate_and_says_that_iterations_are_epochs(tmp_path: Path):
    result = _read(old_run(global_batch_size=None), tmp_path)
    assert result.images_per_second is None and [e.iteration for e in result.evaluations] == [1, 2]
    assert result.mlperf_seconds == 441
    assert "the log does not say its batch or its images: its iterations are epochs" in result.notes


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (MadeMllog().head(benchmark="ssd").start(), "a log of MLPerf's ssd; maskrcnn is what is read here"),
        (MadeMllog().head(), "a log of MLPerf without run_start: it never trained"),
    ],
)
def test_other_logs_of_mlperf_are_refused_by_name(tmp_path: Path, made: MadeMllog, message: str):
    file = made.write(tmp_path / "result_0.txt")
    with pytest.raises(ReplayError, match=message) as raised:
        replay([tmp_path])
    assert str(raised.value).startswith(str(file))


def test_a_submissions_description_that_is_damaged_leaves_what_the_log_says(tmp_path: Path):
    folder = submission(tmp_path, whole_run(ranks=4, d_batch_size=None))
    (tmp_path / "Made" / "systems" / "made_a100.json").write_text('{"number_of_nodes": "many"}')
    (one,) = replay([folder])
    assert (one.result.world_size, one.result.num_nodes, one.result.device_name) == (4, None, None)


def test_a_log_that_names_no_accelerators_is_listed_as_one_with_a_note(tmp_path: Path):
    result = _read(whole_run(ranks=1, d_batch_size=None), tmp_path)
    assert result.world_size == 1
    assert "the log does not say how many accelerators there were; it is listed as one" in result.notes


@settings(max_examples=50, deadline=None)
@given(st.integers(0, len(whole_run().text())))
def test_a_log_cut_anywhere_never_gives_another_number(tmp_path_factory, cut: int):
    folder = tmp_path_factory.mktemp("cut")
    (folder / "cut.txt").write_text(whole_run().text()[:cut])
    try:
        (one,) = replay([folder / "cut.txt"])
    except ReplayError:
        return
    result = one.result
    assert result.mlperf_seconds in (None, 419.0)
    assert [e.box_ap for e in result.evaluations] == [20.0, 38.0][: len(result.evaluations)]
    assert result.images_per_second is None or 550 <= result.images_per_second <= 610


def test_the_command_shows_score_minutes_and_references(tmp_path: Path):
    folder = _five(tmp_path, 300, 200, 210, 190, 250)
    rows = tmp_path / "rows.yaml"
    rows.write_text("reference_rows: [{name: Somebody, world_size: 8, images_per_second: 60, source: a paper}]\n")
    done = run_command(
        folder, "--references", rows, "--output", tmp_path / "out", module="orchestrator.replay", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "score 7.65 minutes, the mean of 3 of 5 runs" in done.stdout.replace("\n", " ")
    assert "Throughput: 600.00 images/s, median of the 5 runs that met the targets" in done.stdout
    assert "Somebody" in done.stdout and "a paper" in done.stdout
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["reference_rows"][0]["name"] == "Somebody" and record["benchmark"]["num_runs"] == 5
    assert (tmp_path / "out" / "made_a100-result_0" / "mllog.txt").exists()
    again = run_command(folder, "--references", tmp_path / "none.yaml", module="orchestrator.replay", cwd=tmp_path)
    assert again.returncode == 2 and "none.yaml: cannot be read" in again.stderr and "Traceback" not in again.stderr
