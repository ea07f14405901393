"""Keypoint AP is in the record, the tables, MLflow's metrics and the logs of a model with keypoints, and only there."""

from __future__ import annotations

from pathlib import Path

from orchestrator.figures.metrics import metrics
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.figures.trial import trial_result
from orchestrator.report.airank import airank_log, airank_table
from orchestrator.report.details import detail_tables
from orchestrator.report.table import csv_table, table_cells
from orchestrator.runlog.folder import TrialEvents
from orchestrator.tracking.notes import outcome
from tests.builders.trials import TrialBuilder, plan
from trainers.contract.events import Evaluated, event_from_json


def trained(*, with_keypoints: bool) -> TrialBuilder:
    """A box model, evaluated twice, which reaches its box target of 50 the second time."""
    made = TrialBuilder(plan(target_mask_ap=None))
    made.started()
    made.workers(1.0)
    made.loop(2.0)
    for iteration, box, keypoint in ((4, 40.0, 61.0), (8, 55.0, 60.0)):
        made.steps(2.0 + iteration, iteration - 4, 1.0, 1.0, 1.0, 1.0)
        at = 4.0 + iteration
        figures = {"box_ap": box} | ({"keypoint_ap": keypoint, "keypoint_ap50": 90.0} if with_keypoints else {})
        made.emit(
            Evaluated, at, iteration=iteration, epoch=1.0, figures=figures, box_scored=made.epoch + at - 1,
            mask_scored=None, keypoint_scored=made.epoch + at if with_keypoints else None, seconds=2.0,
            part_seconds={"inference": 1.0, "gather": 0.0, "score": 1.0},
        )  # fmt: skip
    made.finished(13.0, 8)
    made.ended(14.0)
    return made


def record(made: TrialBuilder) -> TrialResult:
    return trial_result(made.trial, made.events)


def headings_of_evaluations(made: TrialBuilder) -> list[str]:
    (headings, _) = detail_tables([TrialEvents("one", record(made), made.events, None, Path("/"))])["Evaluations"]
    return headings


def run_of(made: TrialBuilder) -> ExperimentResult:
    return ExperimentResult(experiment="x", status="FINISHED", started="now", trials=[record(made)])


def test_a_model_with_keypoints_shows_their_ap_and_no_mask_ap() -> None:
    made = trained(with_keypoints=True)
    result = record(made)
    assert (result.keypoint_ap, result.best_keypoint_ap, result.scored_keypoint_ap) == (60.0, 61.0, 60.0)
    assert [(each.keypoint_ap, each.keypoint_elapsed_seconds) for each in result.evaluations] == [(61, 7), (60, 11)]
    assert result.time_to_train_seconds == 10.0, "known with the boxes, a second before the keypoints"
    headings, ((*texts,),) = table_cells(run_of(made))
    assert texts[headings.index("Keypoint AP")] == "60.00" and texts[headings.index("Mask AP")] == "–"
    assert "Keypoint AP50" in headings_of_evaluations(made) and "Mask AP" not in headings_of_evaluations(made)
    assert metrics(result)["coco/final_keypoint_ap"] == 60.0 and "60.00 keypoint AP" in outcome(result)
    assert metrics(made.events[-3], "evaluations.")["coco/keypoint_ap"] == 60.0
    assert "keypoint ap: 60.00" in airank_table(run_of(made))
    assert "eval_accuracy:box_ap 55.0000 keypoint_ap 60.0000" in airank_log(made.trial, made.events, result)


def test_a_model_without_keypoints_shows_none() -> None:
    made = trained(with_keypoints=False)
    assert record(made).keypoint_ap is None
    assert "Keypoint AP" not in table_cells(run_of(made))[0] and "keypoint" not in outcome(record(made))
    assert not any("Keypoint" in heading for heading in headings_of_evaluations(made))
    assert "keypoint ap" not in airank_table(run_of(made)) and "keypoint_ap" in csv_table(run_of(made)).splitlines()[0]


def test_an_evaluation_written_before_there_were_keypoints_can_be_read() -> None:
    line = trained(with_keypoints=False).events[-3].to_json().replace(',"keypoint_scored":null', "")
    event = event_from_json(line)
    assert isinstance(event, Evaluated) and event.keypoint_scored is None and event.scored == event.box_scored
