"""The catalogue of figures: complete, without doubles, and what MLflow, records and docs say agrees with it."""

from __future__ import annotations

from dataclasses import replace
from types import UnionType
from typing import get_args

import pytest

from orchestrator.experiment import prediction_file
from orchestrator.experiment.spec import ReferenceRow
from orchestrator.figures import benchmark_records, energy_records, records, scaling_records
from orchestrator.figures.catalog import BEGIN, END, FIGURES, SECTIONS, reference
from orchestrator.figures.metrics import metrics
from orchestrator.figures.steps import WindowJoin
from orchestrator.figures.trial import trial_result
from tests.builders.commands import ROOT
from tests.builders.trials import trained
from trainers.contract.events import Evaluated, StepsDone

METRICS_BEFORE = {
    "learning_rate", "throughput/images_per_second", "throughput/wall_images_per_second", "time/step_seconds_p50",
    "time/step_seconds_p95", "time/data_seconds", "memory/peak_gib", "time/evaluation_seconds",
    "time/to_train_seconds", "time/to_box_target_seconds", "time/mlperf_seconds", "time/schedule_seconds",
    "time/startup_seconds", "time/downtime_seconds", "coco/final_box_ap", "coco/final_mask_ap", "coco/best_box_ap",
    "coco/best_mask_ap", "cost/total", "cost/to_target", "restarts", "coco/box_ap", "coco/mask_ap",
    "scaling/efficiency", "scaling/speed_up",
}  # fmt: skip
"""MLflow's names of release 0.1; runs of different versions are compared by them."""

WINDOWS = {
    "throughput/window_images_per_second", "time/window_step_seconds_p50", "time/window_step_seconds_p95",
    "memory/window_peak_gib",
}  # fmt: skip
"""Curves that had the names of a trial's figures before, which then had two points at the last step."""

BENCHMARK = {
    "benchmark/score_minutes", "benchmark/epochs", "benchmark/images_per_second", "benchmark/joules_per_image",
    "benchmark/watt_hours_to_target", "benchmark/cost_to_target",
}  # fmt: skip
"""Figures of several trials together."""

ADDED = {
    "coco/final_keypoint_ap", "coco/best_keypoint_ap", "coco/keypoint_ap", "shapes/distinct",
    "shapes/wasted_pixel_share", "shapes/eager_step_share", "time/new_shape_seconds",
    "goodput/goodput", "goodput/ettr", "goodput/advised_checkpoint_seconds", "time/lost_work_seconds",
    "time/checkpoint_seconds", "time/paused_seconds", "energy/joules", "energy/joules_per_image",
    "energy/watt_hours_to_target", "energy/training_joules", "energy/evaluation_joules", "energy/idle_joules",
    "energy/host_joules", "cost/energy", "cost/energy_to_target", "carbon/grams", "carbon/grams_to_target",
    "prediction/images_per_second", "prediction/error",
} | WINDOWS | BENCHMARK  # fmt: skip
"""Names that came later."""

SAYS_ITS_NAME = {
    "name", "world_size", "recipe", "kind", "protocol", "ranks", "restarts", "evaluations", "hosts", "sections",
    "mlflow_run_id", "attempt",
}  # fmt: skip
"""Fields of records that need no description."""

IN_OTHER_RECORDS = (
    "evaluations.", "restarts.", "scaling.", "fits.", "windows.", "benchmark.", "predictions.",
)  # fmt: skip
"""Beginnings of the keys of figures that are not in the record of a trial by itself."""

FAMILIES = {"loss/*", "coco/*", "time/evaluation_*_seconds", "validation_class/*", "validation_loss/*"}


def _types(annotation: object) -> tuple[object, ...]:
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


@pytest.mark.parametrize(
    ("record", "prefix"),
    [
        (records.TrialResult, ""),
        (records.Evaluation, "evaluations."),
        (records.Sections, "sections."),
        (records.Restart, "restarts."),
        (records.Segment, "segments."),
        (energy_records.Energy, "energy."),
        (scaling_records.ScalingRow, "scaling."),
        (scaling_records.ScalingFit, "fits."),
        (benchmark_records.BenchmarkResult, "benchmark."),
        (records.PredictedFigures, "predicted."),
        (prediction_file.PredictedSize, "predictions."),
    ],
)
def test_every_field_of_a_record_is_described_once(record, prefix):
    described = {name for name, field in record.model_fields.items() if field.description}
    with_row = {key.removeprefix(prefix).split(".")[0] for key in FIGURES if key.startswith(prefix)}
    assert set(record.model_fields) - described - with_row <= SAYS_ITS_NAME
    if prefix:  # `restarts.` and the like are lists of the trial's record with a description of their own
        assert described & with_row == set()


def test_every_number_of_a_trial_has_a_row():
    numbers = {
        name for name, field in records.TrialResult.model_fields.items() if {int, float} & set(_types(field.annotation))
    }
    assert numbers and numbers <= set(FIGURES)


def test_every_row_of_a_trial_is_in_its_record():
    result = trial_result(trained().trial, trained().events)
    for row in FIGURES.values():
        if not row.key.startswith(IN_OTHER_RECORDS) and "*" not in row.key:
            assert row.text(row.of(result))


def test_metrics_keep_their_names_in_mlflow_and_no_name_is_given_twice():
    names = [row.mlflow for row in FIGURES.values() if row.mlflow]
    assert len(names) == len(set(names))
    assert set(names) == METRICS_BEFORE | FAMILIES | ADDED


def test_a_trial_sends_the_metrics_it_always_sent():
    made = trained()
    join = WindowJoin(made.trial.world_size)
    windows = [join.add(event) for event in made.events if isinstance(event, StepsDone)]
    evaluation = next(event for event in made.events if isinstance(event, Evaluated))
    row = scaling_records.ScalingRow(
        recipe="reference", kind="weak", world_size=2, base_world_size=1, speed_up=2.0, efficiency=1.0
    )
    assert set(metrics(windows[1], "windows.")) == {
        "loss/total_loss", "learning_rate", "time/data_seconds", *WINDOWS,
    }  # fmt: skip
    assert set(metrics(evaluation, "evaluations.")) == {
        "coco/box_ap", "coco/mask_ap", "time/evaluation_seconds", "time/evaluation_inference_seconds",
        "time/evaluation_gather_seconds", "time/evaluation_score_seconds",
    }  # fmt: skip
    published = ReferenceRow(
        name="A paper", world_size=8, images_per_second=60.0, time_to_train_seconds=100.0, box_ap=37.0, source="A paper"
    )
    assert metrics(published, "references.") == {
        "throughput/images_per_second": 60.0, "time/to_train_seconds": 100.0, "time/mlperf_seconds": None,
        "coco/box_ap": 37.0, "coco/mask_ap": None,
    }  # fmt: skip
    assert metrics(row, "scaling.") == {"scaling/efficiency": 1.0, "scaling/speed_up": 2.0}
    assert set(metrics(trial_result(made.trial, made.events))) == (METRICS_BEFORE | ADDED) - {
        "learning_rate", "time/data_seconds", "time/evaluation_seconds", "coco/box_ap", "coco/mask_ap",
        "coco/keypoint_ap",
        "scaling/efficiency", "scaling/speed_up", *WINDOWS, *BENCHMARK,
    }  # fmt: skip


def test_a_window_of_a_log_without_learning_rate_and_memory_sends_neither():
    unknown = {"learning_rate": None, "peak_memory_gib": None, "losses": {}, "step_seconds": ()}
    step = next(event for event in trained().events if isinstance(event, StepsDone))
    sent = metrics(WindowJoin(1).add(replace(step, **unknown)), "windows.")
    assert sent["learning_rate"] is None and sent["memory/window_peak_gib"] is None
    assert sent["time/window_step_seconds_p50"] is None and not any(name.startswith("loss/") for name in sent)


def test_every_section_of_the_catalogue_is_a_heading_of_the_docs():
    lines = (ROOT / "docs" / "measurement.md").read_text().splitlines()
    assert [section for section in SECTIONS if f"## {section}" not in lines] == []


def test_the_reference_in_the_docs_is_the_catalogues():
    text = (ROOT / "docs" / "measurement.md").read_text()
    assert text.split(BEGIN)[1].split(END)[0] == f"\n{reference()}", (
        "run python -m orchestrator.figures.catalog and paste its output between the markers of docs/measurement.md"
    )
