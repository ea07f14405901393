"""Publishes what a run measures: results.json after every trial; in the end report, MLflow and the closing table."""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError
from rich.console import Console

from orchestrator.experiment.environment import command_line, describe, package_hashes
from orchestrator.experiment.spec import Experiment, SpecError
from orchestrator.figures.causes import lost_events
from orchestrator.figures.neighbours import with_neighbours
from orchestrator.figures.records import ExperimentResult
from orchestrator.figures.scaling import add_comparisons
from orchestrator.figures.trial import trial_result
from orchestrator.files import redact, without_credentials
from orchestrator.prediction.predict import complete
from orchestrator.preflight.tracking import check_store
from orchestrator.report.airank import write_airank, write_airank_summary
from orchestrator.report.benchmark import judge_run
from orchestrator.report.mlflow_links import mlflow_base, table_address
from orchestrator.report.mlperf import write_mllog
from orchestrator.report.table import closing_table
from orchestrator.report.writer import try_report
from orchestrator.runlog.folder import WORKING_DIRECTORY, EarlierRun, enter_working_directory, read_earlier_run
from orchestrator.runlog.lock import only_driver
from orchestrator.runlog.outbox import Outbox, RunFolderError
from orchestrator.tracking.driver import Tracker, TrackingError, tracking_uri
from trainers.contract import clock
from trainers.contract.events import Event, EventsLost, RunEnded, RunStarted, TrialStarted
from trainers.contract.plan import TrialPlan

Status = Literal["FINISHED", "FAILED", "KILLED"]

TRACKING_TIMEOUT_SECONDS = 90.0
"""Longest wait at the end of a run in which MLflow takes nothing; what it has not taken by then stays in the outbox.
After half a minute of failures, the process that tracks gives up by itself; on a busy machine, it may need longer."""

CLOSING_SECONDS = 5.0
"""What is left of a stopped job's time for the closing table."""


class Publication:
    """The results of one run.

    Args:
        experiment: What is run.
        run_dir: The run's folder.
        tracker: Follows the run in MLflow.
        earlier: The run that is gone on with; None for a new one.
        outbox: Its events; they tell its folder from another one in the same place.
        environment: Where it was run, as `describe` gave it there; None for here.
    """

    def __init__(
        self, experiment: Experiment, run_dir: Path, tracker: Tracker, earlier: EarlierRun | None, outbox: Outbox,
        environment: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._experiment, self._run_dir, self._tracker, self._earlier = experiment, run_dir, tracker, earlier
        self._outbox = outbox
        self._lost: list[str] = []
        command = command_line()
        self._result = ExperimentResult(
            experiment=experiment.name,
            description=experiment.description,
            status="RUNNING",
            started=clock.utc(earlier.started.time if earlier else clock.now()),
            command=command,
            environment=describe(command) if environment is None else environment,
            mlflow_tracking_uri=without_credentials(tracking_uri(experiment.tracking.uri)),
            reference_rows=experiment.reference_rows,
        )

    @property
    def status(self) -> Status:
        """How the run ended."""
        return cast("Status", self._result.status)

    @property
    def has_failed_trials(self) -> bool:
        """Whether a trial that was added has failed."""
        return any(trial.status == "FAILED" for trial in self._result.trials)

    def run_started(self, datasets: dict[str, dict[str, Any]]) -> RunStarted:
        """The event that begins the run, or goes on with it, on these data sets; no password is in it."""
        values, earlier = self._experiment.model_dump(mode="json"), self._earlier
        if values["tracking"]["uri"]:
            values["tracking"]["uri"] = without_credentials(values["tracking"]["uri"])
        tags = {f"run.{key}": value for key, value in self._result.environment.items()}
        return RunStarted(
            trial="",
            attempt=earlier.num_starts if earlier else 0,
            rank=-1,
            time=clock.now(),
            experiment=values,
            run_id=earlier.started.run_id if earlier else f"{self._experiment.name}/{uuid.uuid4().hex}",
            tags=tags | {WORKING_DIRECTORY: str(Path.cwd())},
            changes=earlier.new_changes if earlier else {},
            packages=package_hashes(),
            datasets=datasets,
        )

    def damage(self) -> list[EventsLost]:
        """An event for each trial of which lines cannot be read, unless it was reported before."""
        known = {(event.trial, event.lines) for event, _ in self._outbox.read() if isinstance(event, EventsLost)}
        return [
            EventsLost(trial=trial, attempt=0, rank=-1, time=clock.now(), lines=lines)
            for trial, lines in self._outbox.damage().items()
            if (trial, lines) not in known
        ]

    def add_trial(self, plan: TrialPlan, events: Sequence[Event]) -> None:
        """Adds a trial that has ended, so that its figures are on disk whatever comes after it.

        Args:
            plan: The trial.
            events: All events of the run.

        Raises:
            RunFolderError: They cannot be written.
        """
        own = [event for event in events if event.trial == plan.name]
        trial = with_neighbours(trial_result(plan, own, self._tracker.run_ids().get(plan.name)), events)
        self._lost += [f"{plan.name}: {each}" for each in lost_events(own, plan.solver.eval_period)]
        with self._outbox.guarded():
            write_airank(plan, own, trial, Path(plan.trial_dir))
            write_mllog(plan, own, trial, Path(plan.trial_dir))
        begun = {event.trial: number for number, event in enumerate(events) if isinstance(event, TrialStarted)}
        self._result.trials.append(trial)
        self._result.trials.sort(key=lambda each: begun.get(each.name, len(events)))  # whichever ended first
        add_comparisons(self._result)
        self._write()

    def finish(
        self, status: Status, emit: Callable[[Event], None], console: Console, seconds_left: float, reason: str = ""
    ) -> bool:
        """Writes results and report, ends tracking, and shows the table and where everything is.

        Args:
            status: How the run ended.
            emit: Takes the event that ends the run, once everything that is tracked with it has been written.
            console: Output for people.
            seconds_left: Until this process is killed; infinite where it is not.
            reason: Why it could not go on; "" where it could, or was stopped.

        Returns:
            Whether MLflow has all of the run.

        Raises:
            RunFolderError: They cannot be written.
        """
        self._result.status = status
        self._result.ended = clock.utc(clock.now())
        self._result.mlflow_run_id = self._tracker.run_ids().get("")
        with self._outbox.guarded():
            self._result.prediction = complete(self._run_dir, self._result)
            self._result.benchmark = judge_run(self._experiment, self._result, self._run_dir)
        self._write()
        with self._outbox.guarded():
            report, report_failure = try_report(self._result, self._run_dir)
            write_airank_summary(self._result, self._run_dir)
        emit(RunEnded(trial="", attempt=0, rank=-1, time=clock.now(), status=status, reason=reason))
        tracked = self._tracker.finish(TRACKING_TIMEOUT_SECONDS, limit=max(1.0, seconds_left - CLOSING_SECONDS))
        # Some runs exist in MLflow only since then: their ids belong into the results as well.
        _add_tracking(self._result, self._tracker, tracked=tracked)
        self._write()
        console.print()
        console.print(closing_table(self._result))
        for lost in self._lost:
            _print_line(console, lost, "yellow")
        _print_line(console, f"Report: {report}")
        if report_failure:
            _print_line(console, report_failure, "red")
        if tracked:
            table = table_address(mlflow_base(self._result), str(self._tracker.experiment_id()))
            served = (self._result.mlflow_tracking_uri or "").startswith("http")
            _print_line(console, f"MLflow: {table}" if served else f"MLflow: `make ui`, then {table}")
        if status == "KILLED" or reason:
            cause = "Stopped" if status == "KILLED" else reason[0].upper() + reason[1:]
            text = f"{cause}. {self._run_dir} keeps results, events and checkpoints; go on with: "
            _print_line(console, text + resume_command(self._run_dir), "yellow")
        return tracked

    def to_json(self) -> str:
        """The record as JSON."""
        return self._result.model_dump_json(indent=2)

    def show_untracked(self, console: Console) -> None:
        """Says that MLflow does not have all of the run, why, and how it gets it: the last line on the terminal."""
        reason = self._tracker.failure or f"MLflow at {self._tracker.place} was not reached"
        command = f"python -m orchestrator.run --replay-outbox {shlex.quote(str(self._run_dir))}"
        how = "all of it" if self._result.mlflow_run_id else "any of it"
        text = f"NOT TRACKED. The run is over, and MLflow does not have {how}: {reason}. Track it with: {command}"
        _print_line(console, text, "bold red")

    def give_up(self, error: RunFolderError, console: Console) -> None:
        """Ends a run whose folder cannot be written any more, as failed in MLflow, and says what can be done.

        Args:
            error: What is wrong with the folder.
            console: Output for people.
        """
        self._result.status, self._result.ended, self._result.tracked = "FAILED", clock.utc(clock.now()), False
        marked = self._tracker.abandon(str(error), TRACKING_TIMEOUT_SECONDS)
        with suppress(RunFolderError):
            self._write()
        how = f"make room there or make it writable, and go on with: {resume_command(self._run_dir)}"
        if error.gone:
            how = f"put it back as it was, and go on with: {resume_command(self._run_dir)}; else the run's events, "
            how += "results and the checkpoints in its folder are lost"
        place = f"MLflow at {self._tracker.place} {'shows it as failed' if marked else 'was not reached'}"
        _print_line(console, f"FAILED: {error}; {place}; {how}", "bold red")

    def _write(self) -> None:
        with self._outbox.guarded():
            self._result.write(self._run_dir / "results.json")


def resume_command(run_dir: Path) -> str:
    """The command that goes on with a run."""
    return f"python -m orchestrator.run --resume {shlex.quote(str(run_dir))}"


def track_folder(folder: Path, assignments: Sequence[str] = ()) -> str:
    """Tracks in MLflow whatever of a run is not there yet; returns what was done, for a person.

    Args:
        folder: The run's folder.
        assignments: `tracking.uri=ADDRESS`, for another store than the run's.

    Raises:
        SpecError: There is no run in the folder, it is still being run, MLflow does not take it, or something else is
            assigned.
    """
    run = read_earlier_run(folder, assignments)
    if others := [key for key in run.new_changes if key != "tracking.uri"]:
        raise SpecError(f"--set {others[0]}: --replay-outbox takes tracking.uri alone")
    enter_working_directory(run)
    with only_driver(run.run_dir):
        uri = tracking_uri(run.experiment.tracking.uri)
        tracker = Tracker(run.run_dir, uri)
        for finding in check_store(uri, run.experiment.name, list(tracker.run_ids().values())):
            raise SpecError(f"MLflow at {redact(uri)}: {finding.what}. {finding.hint}")
        try:
            tracker.sync()
        except TrackingError as error:
            raise SpecError(str(error)) from error
        _note_tracked(run.run_dir, tracker)
        done = f"MLflow at {without_credentials(uri)} has all of {run.run_dir} (run {tracker.run_ids()['']})."
        return done if run.ended else f"{done} It was not ended: `--resume {run.run_dir}` goes on with it."


def _note_tracked(run_dir: Path, tracker: Tracker) -> None:
    """Notes in the results of a run, where it has any, that it is tracked."""
    path = run_dir / "results.json"
    with suppress(OSError, ValidationError):  # there are none, or none that can be read or written
        result = ExperimentResult.model_validate_json(path.read_bytes())
        result.mlflow_tracking_uri = tracker.place
        _add_tracking(result, tracker, tracked=True)
        result.write(path)


def _add_tracking(result: ExperimentResult, tracker: Tracker, *, tracked: bool) -> None:
    ids = tracker.run_ids()
    result.tracked, result.mlflow_run_id = tracked, ids.get("")
    for trial in result.trials:
        trial.mlflow_run_id = ids.get(trial.name)


def _print_line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, soft_wrap=True, markup=False, highlight=False)
