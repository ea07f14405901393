"""What is published of a run whose driving process was lost: what its events say, not that it was lost."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import drive
from orchestrator.drive import Request
from orchestrator.experiment.reading import parse_experiment
from orchestrator.runlog.folder import read_earlier_run, read_run_folder
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from orchestrator.tracking.driver import Tracker
from tests.builders.experiments import tiny_experiment
from tests.builders.run_folder import made_experiment, make_run
from trainers.contract.events import Event, RunEnded, TrialEnded, TrialStarted

LOST = "the process that drives the run was lost (signal SIGKILL)"


@dataclass
class Closed:
    code: int
    printed: str
    ends: list[tuple[str, str]]
    """Status and reason of each end of the run in its events."""
    status: str
    """That of the run that is published, and those of its trials."""
    trials: list[str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of three trials that came to its end, and a store that takes everything."""
    monkeypatch.setattr(Tracker, "finish", lambda *_, **__: True)
    return make_run(tmp_path / "run")


def cut(run: Path, number: int) -> None:
    """Takes the last events of a run away."""
    lines = (run / FILE_NAME).read_text().splitlines(keepends=True)
    (run / FILE_NAME).write_text("".join(lines[:-number]))


def close(run: Path, status: drive.Status = "FAILED", reason: str = LOST) -> Closed:
    printed, experiment = io.StringIO(), read_earlier_run(run).experiment
    request = Request(experiment, run, None, Console(file=printed, width=400), True, None, False, False)
    code = drive.close(request, status, reason)
    events = [event for event, _ in Outbox(run / FILE_NAME).read()]
    result = read_run_folder(run).result
    return Closed(
        code,
        printed.getvalue(),
        [(event.status, event.reason) for event in events if isinstance(event, RunEnded)],
        result.status,
        [trial.status for trial in result.trials],
    )


def test_a_run_whose_process_is_lost_after_its_end_is_what_it_was(run: Path) -> None:
    closed = close(run)
    assert closed.ends == [("FINISHED", "")] and closed.code == 0
    assert closed.status == "FINISHED" and closed.trials == ["FINISHED"] * 3
    assert "was lost" not in closed.printed and "--resume" not in closed.printed


def test_a_run_that_had_failed_before_its_process_was_lost_has_failed_by_itself(run: Path) -> None:
    cut(run, 1)
    Outbox(run / FILE_NAME).append(RunEnded(trial="", attempt=0, rank=-1, time=2e9, status="FAILED"))
    closed = close(run)
    assert closed.ends == [("FAILED", "")] and closed.code == 1
    assert "was lost" not in closed.printed


def test_a_run_of_which_every_trial_has_finished_has_finished(run: Path) -> None:
    cut(run, 1)
    closed = close(run)
    assert closed.ends == [("FINISHED", "")] and closed.code == 0
    assert closed.status == "FINISHED" and closed.trials == ["FINISHED"] * 3
    assert "--resume" not in closed.printed


def test_a_run_that_is_stopped_after_its_trials_stays_stopped(run: Path) -> None:
    cut(run, 1)
    closed = close(run, "KILLED", "stopped by the user")
    assert [status for status, _ in closed.ends] == ["KILLED"] and closed.code == 130
    assert closed.trials == ["FINISHED"] * 3 and "--resume" in closed.printed


def test_a_run_that_lacks_the_end_of_a_trial_or_a_whole_one_has_failed(run: Path) -> None:
    events = [event for event, _ in Outbox(run / FILE_NAME).read()]
    number_of_third = next(n for n, event in enumerate(events) if event.trial == events[-2].trial)
    cut(run, 2)
    closed = close(run)
    assert closed.ends == [("FAILED", LOST)] and closed.code == 1
    assert closed.trials == ["FINISHED", "FINISHED", "FAILED"] and f"{LOST[1:]}. " in closed.printed

    cut(run, len((run / FILE_NAME).read_text().splitlines()) - number_of_third)
    assert isinstance([event for event, _ in Outbox(run / FILE_NAME).read()][-1], TrialEnded)
    closed = close(run)
    assert closed.ends == [("FAILED", LOST)] and closed.trials == ["FINISHED", "FINISHED"]


def fail_last(run: Path) -> list[Event]:
    """Makes the last trial one that failed by itself, before the driver was lost; returns the run's events."""
    events = [event for event, _ in Outbox(run / FILE_NAME).read()][:-1]
    assert isinstance(events[-1], TrialEnded)
    events[-1] = dataclasses.replace(events[-1], status="FAILED", reason="bad_input: x.jpg")
    (run / FILE_NAME).unlink()
    Outbox(run / FILE_NAME).append(*events)
    return events


def start_again(run: Path) -> None:
    started = read_earlier_run(run)
    Outbox(run / FILE_NAME).append(dataclasses.replace(started.started, attempt=started.num_starts))


@pytest.mark.parametrize("num_starts", [1, 2], ids=["lost once", "lost again with nothing left to train"])
def test_a_run_that_is_lost_after_a_trial_failed_by_itself_would_fail_again(run: Path, num_starts: int) -> None:
    fail_last(run)
    for _ in range(num_starts - 1):
        start_again(run)
    closed = close(run)
    assert closed.ends == [("FAILED", "")] and closed.code == 1
    assert closed.trials == ["FINISHED", "FINISHED", "FAILED"] and "was lost" not in closed.printed
    assert "bad_input" in read_earlier_run(run).failed


def test_a_trial_that_is_tried_again_has_not_failed_by_itself_when_its_driver_is_lost(run: Path) -> None:
    begun = [event for event in fail_last(run) if isinstance(event, TrialStarted)][-1]
    start_again(run)
    Outbox(run / FILE_NAME).append(dataclasses.replace(begun, attempt=begun.attempt + 2))
    assert close(run).ends == [("FAILED", LOST)]
    assert not read_earlier_run(run).failed

    # Ends that were published for a lost driver say nothing about the trial, in a later start either.
    start_again(run)
    assert close(run).ends == [("FAILED", LOST)] * 2


def test_every_combination_is_a_trial() -> None:
    trials = {"world_sizes": [1, 2], "scaling": "both", "seeds": [0, 1, 2], "recipes": ["reference", "fast"]}
    assert parse_experiment(tiny_experiment(trials=trials), where="tiny").trials.num_trials == 24
    assert made_experiment().trials.num_trials == 3
