"""The metric an experiment names: what is refused, and what its record says of the best and of the target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.data.entries import SplitSummary
from orchestrator.experiment.reading import load_experiment
from orchestrator.experiment.spec import DEFAULT_CONFIG, SpecError
from orchestrator.figures.trial import trial_result
from orchestrator.preflight.model import MAX_CLASSES, check_data_against_model
from orchestrator.preflight.settings import check_settings
from tests.builders.trials import TrialBuilder, plan
from trainers.contract.events import Evaluated, event_from_json

BOXES = "model.config=COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
LOSS = ["protocol.validation_loss=true", "protocol.metric=validation_loss"]
NO_TARGETS = ["protocol.target_box_ap=null", "protocol.target_mask_ap=null"]


def summary(num_classes: int = 3) -> SplitSummary:
    names = {1: "circle", 2: "a/b", 3: "square"} | {n: f"class {n}" for n in range(4, num_classes + 1)}
    found = {key: 5 for key in names if key != 3}
    return SplitSummary("val.json", "val", "0" * 64, categories=names, objects_of_category=found)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["protocol.metric=box"], "unknown metric 'box'; known: validation_loss, box_ap, box_ap50, "),
        (["protocol.metric=keypoint_aps"], "unknown metric 'keypoint_aps'"),
        (["protocol.metric=box_ap50/circle"], "unknown metric 'box_ap50/circle'"),
        (["protocol.metric=box_ap/"], "unknown metric 'box_ap/'"),
        (["protocol.metric=''"], "unknown metric ''"),
        (["protocol.metric=ema_box_ap"], "with ema: {evaluate: instead}, box_ap is the average's"),
        (["protocol.metric=validation_loss"], "metric: validation_loss needs validation_loss: true"),
        (["protocol.metric=box_ap50", "protocol.target=101"], "target 101 is never reached: box_ap50 is at most 100"),
        (["protocol.target_box_ap=30", "protocol.target=30"], "give target or target_box_ap, not both"),
        (["protocol.target=-1"], "protocol.target"),
        (["protocol.target=.nan"], "protocol.target"),
        (["protocol.validation_loss=often"], "protocol.validation_loss"),
        (["protocol.kind=throughput", "protocol.eval_period_iterations=null", "protocol.validation_loss=true"],
         "validation_loss has no effect without an evaluation"),
        (["protocol.kind=throughput", "protocol.eval_period_iterations=null", "protocol.metric=mask_ap50",
          "protocol.target=1"], "target has no effect without an evaluation"),
        (["protocol.kind=throughput", "protocol.eval_period_iterations=null", "protocol.metric=mask_ap50"],
         "metric has no effect without an evaluation"),
        (["protocol.kind=throughput", "protocol.eval_period_iterations=null", "protocol.ema={decay: 0.99}"],
         "ema has no effect without an evaluation"),
        (["protocol.kind=throughput", "protocol.eval_period_iterations=null", "tracking.log_model=best"],
         "log_model: best needs an evaluation"),
    ],
)  # fmt: skip
def test_a_metric_that_nothing_is_called_is_refused_with_the_known_ones(assignments: list[str], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_experiment(DEFAULT_CONFIG, assignments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("assignments", "what", "hint"),
    [
        ([], None, None),
        (["protocol.metric=mask_apl"], None, None),
        (["protocol.metric=box_ap/a/b"], None, None),
        (LOSS, None, None),
        (["protocol.metric=mask_ap", BOXES, "model.overrides.MODEL.MASK_ON=false"],
         "mask_ap: this model is not scored for it (MODEL.MASK_ON is false)", "Take one of: box_ap, box_ap50, "),
        (["protocol.metric=keypoint_ap"], "keypoint_ap: this model is not scored for it (MODEL.KEYPOINT_ON is false)",
         "box_arl, mask_ap, "),
        (["protocol.metric=mask_ap/Circle"], "mask_ap/Circle: val.json has no object of a class 'Circle'",
         "Take one of: mask_ap/circle, mask_ap/a/b"),
        (["protocol.metric=box_ap/square"], "no object of a class 'square'", "Take one of: box_ap/circle, box_ap/a/b"),
    ],
)  # fmt: skip
def test_a_metric_that_model_or_data_cannot_give_is_refused_before_anything_starts(
    assignments: list[str], what: str | None, hint: str | None
) -> None:
    experiment = load_experiment(DEFAULT_CONFIG, [*NO_TARGETS, *assignments])
    found = [f for f in check_data_against_model(experiment, summary(), summary()) if f.code == "metric_unknown"]
    if what is None or hint is None:
        assert found == []
    else:
        (finding,) = found
        assert finding.level == "error" and finding.file == "protocol.metric"
        assert what in finding.what and hint in finding.hint


@pytest.mark.parametrize(
    ("assignments", "place", "meant"),
    [
        (["protocol.target_box_ap=0.37"], "protocol.target_box_ap", "37"),
        (["protocol.target_mask_ap=0.345"], "protocol.target_mask_ap", "34.5"),
        (["protocol.metric=box_ar100", "protocol.target=0.29"], "protocol.target", "29"),
        (["protocol.metric=box_ap/circle", "protocol.target=0.5"], "protocol.target", "50"),
    ],
)
def test_a_target_on_0_to_1_is_refused_before_it_ends_the_first_trial(
    assignments: list[str], place: str, meant: str
) -> None:
    (finding,) = check_settings(load_experiment(DEFAULT_CONFIG, assignments))
    assert (finding.level, finding.code, finding.file) == ("error", "ap_scale", place)
    assert finding.hint == f"Is {meant} meant?"


def test_a_published_ap_on_0_to_1_is_a_warning() -> None:
    rows = "reference_rows=[{name: A, world_size: 8, box_ap: 37.7}, {name: B, world_size: 8, mask_ap: 0.339}]"
    (finding,) = check_settings(load_experiment(DEFAULT_CONFIG, [rows]))
    assert (finding.level, finding.file, finding.id) == ("warning", "reference_rows", "mask_ap of 'B'")
    assert finding.hint == "Is 33.9 meant?"


@pytest.mark.parametrize(
    "assignments", [["protocol.target_box_ap=0"], ["protocol.target_box_ap=1"], [*LOSS, "protocol.target=0.5"]]
)
def test_other_small_targets_are_taken_as_they_are(assignments: list[str]) -> None:
    assert check_settings(load_experiment(DEFAULT_CONFIG, assignments)) == []


def test_a_hint_does_not_list_a_thousand_classes() -> None:
    experiment = load_experiment(DEFAULT_CONFIG, ["protocol.metric=box_ap/cat"])
    many = summary(1000)
    (finding,) = [f for f in check_data_against_model(experiment, many, many) if f.code == "metric_unknown"]
    assert finding.hint.count("box_ap/") == MAX_CLASSES and finding.hint.endswith(" …")


def record(values: list[dict[str, Any]], **fields: Any) -> Any:
    """The record of a trial with evaluations of these fields, 10 s after each other."""
    made = TrialBuilder(plan(target_box_ap=None, target_mask_ap=None, **fields))
    made.started()
    made.workers(1.0)
    made.loop(2.0)
    for number, changes in enumerate(values, start=1):
        made.evaluated(10.0 * number, 4 * number, box=10.0 * number, mask=None)
        event = replace(made.events[-1], mask_scored=None, **changes)  # type: ignore[arg-type]
        made.events[-1] = event_from_json(event.to_json())
    made.finished(50.0, 4 * len(values))
    made.ended(51.0)
    return trial_result(made.trial, made.events)


def test_the_best_is_the_lowest_loss_and_its_target_is_met_from_above() -> None:
    losses = [{"validation_losses": {"loss_mask": 1.0, "total_loss": total}} for total in (3.0, 1.5, 2.0)]
    result = record(losses, metric="validation_loss", target=2.0)
    assert (result.metric, result.target, result.best_metric, result.best_metric_iteration) == (
        "validation_loss", 2.0, 1.5, 8,
    )  # fmt: skip
    assert result.scored_iteration == 8 and result.best_box_ap == 30.0, "rows of box AP keep their meaning"
    assert result.time_to_train_seconds == pytest.approx(18.0), "when all of the evaluation's figures were known"
    assert result.evaluations[0].validation_losses == {"loss_mask": 1.0, "total_loss": 3.0}


def test_the_ap_of_a_class_is_a_target_like_any_other() -> None:
    aps = [{"class_ap": {"box_ap/a/b": ap, "box_ap/c": None}} for ap in (20.0, None, 40.0)]
    result = record(aps, metric="box_ap/a/b", target=40.0)
    assert (result.best_metric, result.best_metric_iteration, result.scored_iteration) == (40.0, 12, 12)
    missed = record(aps, metric="box_ap/a/b", target=41.0)
    assert missed.scored_iteration is None and missed.reason == "target not reached in 12 iterations"
    assert record(aps, metric="box_ap/c").best_metric is None


def test_events_of_older_versions_have_no_classes_and_no_losses() -> None:
    made = TrialBuilder(plan())
    made.evaluated(1.0, 4, box=1.0, mask=1.0)
    event = made.events[0]
    old = {"class_ap", "validation_losses", "details_file"}
    line = event.to_json()
    for name in old:
        line = line.replace(f',"{name}":{{}}', "").replace(f',"{name}":""', "")
    assert not any(name in line for name in old)
    read = event_from_json(line)
    assert isinstance(read, Evaluated) and read == event
