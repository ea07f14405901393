"""What happened and ended nothing, a damaged checkpoint or a clock that was set, is shown everywhere."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.figures.causes import oddities
from orchestrator.figures.records import ExperimentResult
from orchestrator.figures.trial import trial_result
from orchestrator.report.progress import ProgressDisplay
from orchestrator.report.writer import markdown_report, write_report
from tests.builders.run_folder import make_run
from tests.builders.trials import TrialBuilder, trained
from trainers.contract.events import CheckpointFailed, CheckpointSkipped, ClockChanged, EvaluationLost, event_from_json

PATH = "/runs/[red]/checkpoints/iter_0000008"


@pytest.fixture
def odd() -> TrialBuilder:
    made = trained()
    made.emit(CheckpointSkipped, 29.0, path=PATH, message="its SHA-256 is not the manifest's")
    made.emit(CheckpointFailed, 29.2, iteration=8, message="the checkpoint of iteration 8 could not be written")
    made.emit(ClockChanged, 29.5, rank=-1, seconds=-7200.2)
    made.emit(ClockChanged, 29.6, rank=-1, seconds=86400.0)
    made.emit(ClockChanged, 29.7, rank=1, seconds=-3600.0)
    made.evaluated(29.8, 7, 1.0, 1.0, left_out=(5, 6), num_lost=2)
    for iteration in (7, 9):  # that of 7 was made after a restart
        made.emit(EvaluationLost, 29.9, iteration=iteration, message=f"the evaluation after {iteration} is left out")
    return made


NOTES = [
    "the clock of the driver's machine is 7,200 s behind the run's times, which go on as they began",
    "the clock of the driver's machine is 86,400 s ahead of the run's times, which go on as they began",
    "the clock of rank 1's machine is 3,600 s behind the run's times, which go on as they began",
    f"the checkpoint {PATH} is damaged and was skipped: its SHA-256 is not the manifest's",
    "the checkpoint of iteration 8 could not be written",
    "the evaluation after 5, 6 iterations was left out, since an older one was in progress",
    "the process that made the evaluation after 7 iterations was lost 2 times and was replaced",
    "the evaluation after 9 is left out",
]


def test_the_record_and_both_reports_name_it(odd: TrialBuilder, tmp_path: Path) -> None:
    record = trial_result(odd.trial, odd.events)
    assert record.notes == NOTES
    run = make_run(tmp_path / "run")
    result = ExperimentResult.model_validate_json((run / "results.json").read_bytes())
    result.trials[0].notes = record.notes
    assert "7,200 s behind" in markdown_report(result) and "was skipped" in markdown_report(result)
    write_report(result, run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "86,400 s ahead" in page and "was skipped: its SHA-256" in page


def test_an_evaluation_that_a_restart_made_was_not_left_out() -> None:
    """Those of 9, 10 and 11 are left out; the trial goes on from before them, makes that of 9 and again that of 12."""
    made = trained()
    made.evaluated(29.1, 12, 1.0, 1.0, left_out=(9, 10, 11), num_lost=1)
    made.restarted(29.2, 12)
    made.evaluated(29.3, 9, 1.0, 1.0)
    made.evaluated(29.4, 12, 1.0, 1.0, left_out=(11,), num_lost=1)
    for _ in range(2):
        made.emit(EvaluationLost, 29.5, iteration=14, message="the evaluation after 14 is left out", left_out=(13,))
    assert oddities(made.events) == [
        "the evaluation after 10, 11 iterations was left out, since an older one was in progress",
        "the process that made the evaluation after 12 iterations was lost once and was replaced",
        "the evaluation after 13 iterations was left out, since an older one was in progress",
        "the evaluation after 14 is left out",
    ]


def test_the_terminal_shows_it_also_where_it_is_quiet(odd: TrialBuilder) -> None:
    output = io.StringIO()
    display = ProgressDisplay(Console(file=output, width=300), quiet=True)
    for event in odd.events:
        display(event)
    shown = output.getvalue()
    assert f"skipping a damaged checkpoint {PATH}: its SHA-256 is not the manifest's" in shown
    assert shown.count("the clock was set: ") == 2 and shown.count("a clock is off: ") == 1
    assert "evaluation after 5, 6 iterations was left out" in shown
    assert "the evaluation after 9 is left out" in shown


def test_the_events_are_read_back(odd: TrialBuilder) -> None:
    assert [event_from_json(event.to_json()) for event in odd.events] == odd.events
