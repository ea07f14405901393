"""Evaluations of a log: those without figures, those of other tasks, and the iterations that they belong to."""

from pathlib import Path

import pytest

from orchestrator.figures.records import TrialResult
from orchestrator.replay.record import replay
from orchestrator.replay.unpacking import ReplayError
from tests.builders.logs import MadeLog


def _read(made: MadeLog, folder: Path) -> TrialResult:
    (one,) = replay([made.write(folder / "made.log")])
    return one.result


def _begun(**head) -> MadeLog:
    return MadeLog().head(**head).start().progress()


WARNING = "No predictions from the model!"
MINUS = ",".join(["-1.0000"] * 6)
NAN = ",".join(["nan"] * 6)


@pytest.mark.parametrize(
    ("warning", "values"),
    [
        (WARNING, NAN),
        (WARNING + " Set scores to -1", MINUS),
        (WARNING, None),
        ("Did not receive valid predictions.", None),
    ],
)
def test_an_evaluation_that_found_nothing_has_no_ap_and_is_not_cut_off(tmp_path, warning, values):
    made = _begun(masks=False)
    made.wait(10)
    made.infer().log("d2.evaluation.coco_evaluation", warning)
    made.log("d2.engine.defaults", "Evaluation results for coco_2017_val in csv format:")
    if values:
        made.paste("bbox", values)
    result = _read(made.line().progress().evaluate(38.0, None).close("0:01:00"), tmp_path)
    assert [(e.iteration, e.box_ap, e.seconds) for e in result.evaluations] == [(40, None, 8.0), (80, 38.0, 12.0)]
    assert result.best_box_ap == 38.0
    assert "the model found nothing at iteration 40: no AP was measured" in result.notes
    assert not any("breaks off" in note for note in result.notes)


def test_a_coloured_warning_before_the_date_is_no_interrupted_line(tmp_path):
    made = MadeLog(styled=True).head(masks=False).start().progress()
    made.infer().log("d2.evaluation.coco_evaluation", WARNING)
    made.lines[-1] = f"\x1b[5m\x1b[31mWARNING\x1b[0m {made.lines[-1]}"
    result = _read(made.line(), tmp_path)
    assert any("found nothing" in note for note in result.notes)
    assert not any("interrupted" in note for note in result.notes)


def test_evaluations_that_found_nothing_are_named_in_one_note(tmp_path):
    made = _begun(masks=False)
    for _ in range(2):
        made.infer().log("d2.evaluation.coco_evaluation", WARNING)
        made.line().progress()
    notes = _read(made, tmp_path).notes
    assert "the model found nothing at iterations 40, 80: no AP was measured" in notes


def test_minus_one_is_not_measured_whatever_prints_it(tmp_path):
    result = _read(_begun(masks=False).infer().paste("bbox", MINUS).line(), tmp_path)
    assert set(result.evaluations[0].figures.values()) == {None}
    assert "no AP was measured at iteration 40: the log has nan or -1 there" in result.notes


def test_figures_that_were_cut_are_not_read(tmp_path):
    made = _begun(masks=False).infer().paste("bbox", "38.12,60.0000,40.0000,1.0000,30.0000,50.0000")
    made.log(
        "d2.evaluation.coco_evaluation",
        "Evaluation results for bbox: \n|  AP  | AP50 |\n|:----:|:----:|\n| 38.1",
    )
    result = _read(made.line(), tmp_path)
    assert result.box_ap is None
    assert "no AP can be read of the evaluation at iteration 40" in result.notes


def test_an_evaluation_breaks_off_only_at_the_end_of_a_start(tmp_path):
    notes = _read(_begun().infer(), tmp_path).notes
    assert "the log breaks off in an evaluation, which was left out" in notes


def test_keypoints_are_read_next_to_boxes(tmp_path):
    made = _begun(masks=False).infer().paste("bbox", "50.0000,60.0000,40.0000,1.0000,30.0000,50.0000")
    made.paste("keypoints", "61.5000,80.0000,70.0000,60.0000,65.0000", "AP,AP50,AP75,APm,APl")
    result = _read(made.line(), tmp_path)
    assert (result.box_ap, result.keypoint_ap) == (50.0, 61.5)
    assert result.evaluations[0].figures["keypoint_apm"] == 60.0


def test_lvis_figures_are_read_with_those_of_rare_classes(tmp_path):
    names, values = "AP,AP50,AP75,APs,APm,APl,APr,APc,APf", "20.1234" + ",6.0000" * 8
    result = _read(_begun().infer().paste("bbox", values, names).line(), tmp_path)
    assert result.box_ap == 20.1234 and result.evaluations[0].figures["box_apr"] == 6.0


def test_an_evaluation_alone_has_its_ap_and_no_training(tmp_path):
    made = MadeLog().head(masks=False).infer().paste("bbox", "38.1234,60.0000,40.0000,1.0000,30.0000,50.0000")
    result = _read(made, tmp_path)
    assert (result.box_ap, result.status, result.iterations, result.images_per_second) == (
        38.1234,
        "FINISHED",
        None,
        None,
    )
    assert any("--eval-only" in note for note in result.notes)
    assert any("how far the model was trained is not known" in note for note in result.notes)


def test_an_evaluation_of_a_numbered_checkpoint_is_at_its_iteration(tmp_path):
    made = MadeLog()
    made.log("detectron2", "Rank of current process: 0. World size: 1")
    made.log("detectron2", "Running with full config:\nMODEL:\n  WEIGHTS: output/model_0089999.pth")
    result = _read(made.infer().paste("bbox", "38.1234,60.0000,40.0000,1.0000,30.0000,50.0000"), tmp_path)
    assert result.evaluations[0].iteration == 90000


def test_an_evaluation_alone_after_training_is_left_out_and_said_so(tmp_path):
    made = _begun().close("0:00:10").head().infer().paste("bbox", "38.1234,60.0000,40.0000,1.0000,30.0000,50.0000")
    result = _read(made, tmp_path)
    assert result.evaluations == [] and "1 runs of --eval-only were left out" in result.notes


@pytest.mark.parametrize("period", [8, 20, 30, 40, 50])
def test_every_evaluation_is_at_its_iteration(tmp_path, period):
    made = MadeLog().head(period=period, masks=False).start()
    due = list(range(period, 80, period))
    for line in range(20, 81, 20):
        made.wait(10)
        for iteration in (i for i in due if line - 20 < i <= line):
            made.infer().paste("bbox", f"{iteration / 10:.4f}" + ",1.0000" * 5)
        made.line()
    made.close("0:00:40" if period > 40 else "0:02:00").infer().paste("bbox", "8.0000" + ",1.0000" * 5)
    result = _read(made, tmp_path)
    assert [(e.iteration, e.box_ap) for e in result.evaluations] == [(i, i / 10) for i in [*due, 80]]
    assert not any("is known to" in note for note in result.notes)


def test_a_trainer_that_evaluates_after_its_line_is_understood(tmp_path):
    made = MadeLog().head(masks=False).start().progress().progress()
    made.infer().paste("bbox", "4.0000" + ",1.0000" * 5)
    assert [e.iteration for e in _read(made.progress().progress(), tmp_path).evaluations] == [40]


def test_each_data_set_of_an_evaluation_is_at_the_same_iteration(tmp_path):
    made = _begun(masks=False)
    for name, value in (("a_val", "4.0000"), ("b_val", "5.0000")):
        made.infer().log("d2.engine.defaults", f"Evaluation results for {name} in csv format:")
        made.paste("bbox", value + ",1.0000" * 5)
    result = _read(made.line(), tmp_path)
    assert [(e.iteration, e.box_ap) for e in result.evaluations] == [(40, 4.0)]
    assert "an evaluation on b_val was left out: a_val is the first one's" in result.notes


def test_a_run_that_an_exception_ended_failed_although_its_speed_is_printed(tmp_path):
    made = _begun()
    made.log("d2.engine.train_loop", "Exception during training:\nTraceback:\nRuntimeError: CUDA out of memory")
    result = _read(made.close("0:00:10"), tmp_path)
    assert (result.status, result.reason) == ("FAILED", "RuntimeError: CUDA out of memory")
    assert result.images_per_second == 8.0 and result.schedule_seconds is None


def test_the_log_of_another_rank_is_named_as_such(tmp_path):
    text = MadeLog().head().start().progress().text().replace("process: 0.", "process: 1.")
    (tmp_path / "log.txt.rank1").write_text(text)
    with pytest.raises(ReplayError, match="rank 1 wrote it, use the log of rank 0"):
        replay([tmp_path / "log.txt.rank1"])


@pytest.mark.parametrize(
    ("line", "losses", "rate"),
    [
        ("eta: N/A  iter: 19  loss_fcos_cls: 0.5  time: 0.5000  data_time: 0.0500  lr: 0.010000", 0.5, 0.01),
        (" iter: 19/80,  loss_fcos_cls: 0.5,  time: 0.5000,  data_time: 0.0500,  lr: 1e-04", 0.5, 1e-4),
        (
            "eta: 0:01:00  iter: 19  loss_fcos_cls: nan  time: 0.5000  last_time: 0.4  data_time: 0.05  lr: N/A",
            None,
            None,
        ),
        ("eta: 0:01:00  iter: 19  loss_fcos_cls: 0,5  time: 0.5000  data_time: 0.0500  lr: 1,6e-05", None, None),
    ],
)
def test_progress_lines_of_other_versions_and_trainers_are_read(tmp_path, line, losses, rate):
    made = MadeLog().head(period=0).start()
    made.wait(10)
    made.log("d2.utils.events", line)
    (one,) = replay([made.write(tmp_path / "made.log")])
    (window,) = [event for event in one.events if event.kind == "steps_done"]
    assert (window.iteration, window.losses.get("loss_fcos_cls"), window.learning_rate) == (20, losses, rate)
    assert one.result.images_per_second == 8.0


def test_iterations_numbered_from_one_are_not_moved(tmp_path):
    made = MadeLog().head(period=0).start()
    for _ in range(3):
        made.iteration += 1  # which the line takes off
        made.progress()
        made.iteration -= 1
    assert _read(made, tmp_path).iterations == 60
