"""The closing table for terminal, Markdown and CSV."""

import csv
import io

import pytest
from rich.console import Console

from orchestrator.experiment.spec import ReferenceRow
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.figures.scaling_records import ScalingRow
from orchestrator.report.table import (
    closing_table,
    csv_table,
    escape_markdown,
    markdown_table,
    neutral_cell,
    table_cells,
    table_rows,
)


def _result(*trials: TrialResult, **fields: object) -> ExperimentResult:
    values = {"experiment": "demo", "status": "FINISHED", "started": "2026-01-01T00:00:00Z", "trials": list(trials)}
    return ExperimentResult.model_validate({**values, **fields})


def _trial(name: str = "reference-1xcpu", **fields: object) -> TrialResult:
    values = {"name": name, "world_size": 1, "recipe": "reference", "scaling": "weak", "status": "FINISHED"}
    return TrialResult.model_validate({**values, **fields})


def _text(result: ExperimentResult) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(closing_table(result))
    return console.export_text()


def test_a_row_shows_the_seeds_columns_with_units_and_efficiency():
    scaling = ScalingRow(
        recipe="reference", kind="weak", world_size=8, base_world_size=1, speed_up=5.7215, efficiency=0.7152
    )
    trial = _trial(
        "reference-8xcuda",
        world_size=8,
        images_per_second=55.2677,
        time_to_train_seconds=22922.0,
        time_to_box_target_seconds=22898.0,
        box_ap=37.8303,
        mask_ap=34.4821,
    )
    _, lines = table_cells(_result(trial, scaling=[scaling]))
    assert lines == [["reference-8xcuda", "8", "22,898", "22,922", "55.27", "37.83", "34.48", "5.72", "71.5 %"]]


def test_what_was_not_measured_is_a_dash_and_its_reason_stands_below():
    result = _result(_trial(reason="target not reached in 600 iterations"))
    assert table_cells(result)[1][0][2:] == ["–"] * 7
    assert "target not reached in 600 iterations" in _text(result)
    assert "target not reached in 600 iterations" in markdown_table(result)


def test_the_ap_shown_is_that_of_the_evaluation_that_met_the_targets():
    trial = _trial(
        target_box_ap=37.7,
        target_mask_ap=33.9,
        scored_iteration=30,
        scored_box_ap=37.8,
        scored_mask_ap=34.4,
        box_ap=38.6,
        mask_ap=35.3,
    )
    assert (table_rows(_result(trial))[0].box_ap, table_rows(_result(trial))[0].mask_ap) == (37.8, 34.4)


def test_repeats_are_one_row_of_medians_and_a_missed_target_counts_as_the_slowest():
    trials = [
        _trial(f"reference-1xcpu-seed{seed}", seed=seed, images_per_second=rate, time_to_train_seconds=seconds)
        for seed, rate, seconds in ((0, 10.0, 100.0), (1, 12.0, None), (2, 11.0, 120.0))
    ]
    (row,) = table_rows(_result(*trials))
    assert (row.name, row.num_trials, row.images_per_second) == ("reference-1xcpu", 3, 11.0)
    assert row.time_to_train_seconds == 120.0
    assert "targets met in 2 of 3" in row.note


def test_a_target_missed_by_half_of_the_repeats_has_no_median():
    trials = [
        _trial(f"reference-1xcpu-seed{seed}", seed=seed, time_to_train_seconds=seconds)
        for seed, seconds in ((0, 100.0), (1, None))
    ]
    assert table_rows(_result(*trials))[0].time_to_train_seconds is None


def test_a_failed_trial_is_shown_as_failed():
    assert "[FAILED]" in _text(_result(_trial(status="FAILED", reason="out of memory [CPU]")))


def test_references_are_marked_and_keep_their_source():
    reference = ReferenceRow(name="8 x V100", world_size=8, images_per_second=55.26, source="seed benchmark")
    markdown = markdown_table(_result(reference_rows=[reference]))
    assert "8 x V100 (reference)" in markdown and "seed benchmark" in markdown


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\r=1"])
def test_a_csv_cell_is_never_a_formula(text):
    assert neutral_cell(text) == f"'{text}"


def test_numbers_in_the_csv_stay_numbers_in_full_precision():
    trial = _trial("=cmd()", images_per_second=-0.123456789)
    rows = list(csv.DictReader(io.StringIO(csv_table(_result(trial)))))
    assert rows[0]["name"] == "'=cmd()"
    assert rows[0]["images_per_second"] == "-0.123456789"
    assert rows[0]["box_ap"] == ""


def test_a_name_cannot_break_the_markdown_table_nor_bring_html():
    assert escape_markdown("a|b\n<img src=x> `c`") == r"a\|b \<img src=x\> \`c\`"


def test_markup_in_a_name_is_printed_and_not_obeyed():
    assert "[red]x[/red]" in _text(_result(_trial("[red]x[/red]")))
