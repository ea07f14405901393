"""`--auto-resume`: what is started again, how often, and what is left as it is; the work is a stand-in without Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import drive
from orchestrator.drive import Request
from orchestrator.execution.event_log import EventLog
from orchestrator.execution.stop import StopRequest
from orchestrator.experiment.reading import parse_experiment
from orchestrator.figures.records import ExperimentResult
from orchestrator.publish import Publication
from orchestrator.runlog.folder import read_earlier_run
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from orchestrator.tracking.driver import Tracker
from tests.builders.commands import ROOT
from tests.builders.experiments import tiny_experiment, write_experiment
from trainers.contract.events import RunEnded, TrialEnded

COMMAND = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from orchestrator import closing, drive, run
from orchestrator.publish import Publication
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from orchestrator.tracking.driver import Tracker
from tests.builders.trials import TrialBuilder
from trainers.contract.events import RunEnded

Tracker.finish = lambda *_, **__: True
run.RETRY_INTERVAL_SECONDS = 0.0

def begin(request, working):
    "Notes the start; returns a builder of each trial's events, by the name of its plan."
    request.run_dir.mkdir(exist_ok=True)
    outbox, earlier = Outbox(request.run_dir / FILE_NAME), request.earlier
    working()
    with open("starts", "a") as starts:
        print(*sorted(earlier.finished if earlier else []), sep=",", file=starts)
    if "--lost-early" in options and earlier:
        os.abort()
    publication = Publication(request.experiment, request.run_dir, Tracker(request.run_dir, "unused"), earlier, outbox)
    outbox.append(publication.run_started({{}}))
    trials = [TrialBuilder(plan, time.time()) for plan in drive.plan_trials(request, drive.Hardware(num_cpus=8))]
    for trial in trials:
        trial.attempt = earlier.num_starts if earlier else 0
        if not earlier:
            trial.started()
    return outbox, trials

def fail_and_lose(request, working):
    "The first trial fails at each start, whatever is known of it; the second loses its driver before a checkpoint."
    outbox, (first, second) = begin(request, working)
    first.ended(1.0, "FAILED", "bad_input: x.jpg")
    outbox.append(*first.events, *second.events)
    os.abort()

def end_and_lose(request, working):
    outbox, trials = begin(request, working)
    for trial in trials:
        trial.ended(1.0)
        outbox.append(*trial.events)
    outbox.append(RunEnded(trial="", attempt=0, rank=-1, time=time.time(), status="FINISHED"))
    os.abort()

options = [sys.argv.pop(sys.argv.index("--lost-early"))] if "--lost-early" in sys.argv else []
drive.run = globals()[sys.argv.pop(1)]
run.app()
"""


def two_trials() -> dict[str, object]:
    return tiny_experiment(trials={"world_sizes": [1, 2], "scaling": "strong"})


def start(folder: Path, work: str, *options: str) -> tuple[int, str, list[str]]:
    """Exit code and output of a command, and for each start the trials that were not to be run, by then."""
    (folder / "starts").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, work, *options], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout, (folder / "starts").read_text().splitlines()


def begin_arguments(folder: Path) -> list[str]:
    return [str(write_experiment(folder, two_trials())), "--output", str(folder / "run")]


def result(folder: Path) -> ExperimentResult:
    return ExperimentResult.model_validate_json((folder / "run" / "results.json").read_bytes())


def test_a_trial_that_fails_by_itself_is_no_progress_and_is_not_started_again(tmp_path: Path) -> None:
    code, output, starts = start(tmp_path, "fail_and_lose", *begin_arguments(tmp_path), "--auto-resume", "2")
    assert code == 1 and "(start 2 of 2 without a new checkpoint)" in output, output
    assert starts == ["", "reference-1xcpu", "reference-1xcpu"]
    failed, lost = result(tmp_path).trials
    assert failed.reason == "bad_input: x.jpg" and "was lost" in (lost.reason or "")

    # A person may have it tried again.
    code, _, starts = start(tmp_path, "fail_and_lose", "--resume", str(tmp_path / "run"), "--auto-resume", "1")
    assert code == 1 and starts == ["", "reference-1xcpu"]


def test_a_run_that_came_to_its_end_is_not_started_again(tmp_path: Path) -> None:
    code, output, starts = start(tmp_path, "end_and_lose", *begin_arguments(tmp_path), "--auto-resume", "2")
    assert code == 0 and len(starts) == 1 and "going on by itself" not in output, output
    assert result(tmp_path).status == "FINISHED"


def test_a_run_that_had_ended_stays_as_it_was_where_the_next_start_is_lost_before_it_is_noted(tmp_path: Path) -> None:
    start(tmp_path, "end_and_lose", *begin_arguments(tmp_path))
    before = (tmp_path / "run" / FILE_NAME).read_bytes()
    resume = ["--lost-early", "--resume", str(tmp_path / "run")]
    code, output, starts = start(tmp_path, "end_and_lose", *resume, "--auto-resume", "1")
    assert code == 1 and len(starts) == 2 and "(signal SIGABRT), before training began" in output, output
    assert (tmp_path / "run" / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize(("ends", "status"), [(["FAILED", "FINISHED"], "FAILED"), (["FINISHED"] * 2, "FINISHED")])
def test_a_failed_trial_that_is_left_as_it_is_counts_in_the_runs_end(
    ends: list[str], status: str, tmp_path: Path
) -> None:
    start(tmp_path, "end_and_lose", *begin_arguments(tmp_path))
    outbox = Outbox(tmp_path / "run" / FILE_NAME)
    experiment = parse_experiment(two_trials(), where="tiny")
    for name, end in zip(("reference-1xcpu", "reference-2xcpu"), ends, strict=True):
        outbox.append(TrialEnded(trial=name, attempt=1, rank=-1, time=2e9, status=end, reason=""))
    outbox.append(RunEnded(trial="", attempt=0, rank=-1, time=2e9, status="FINISHED"))
    earlier = read_earlier_run(tmp_path / "run").keep_failures(0)
    request = Request(experiment, tmp_path / "run", earlier, Console(), True, None, False, False)
    tracker = Tracker(tmp_path / "run", "unused")
    publication = Publication(experiment, tmp_path / "run", tracker, earlier, outbox)
    plans = drive.plan_trials(request, drive.Hardware(num_cpus=8))
    log = EventLog(outbox, [])
    assert drive._run_trials(request, plans, log, publication, StopRequest(60)) == status
    assert [trial.status for trial in result(tmp_path).trials] == ends
