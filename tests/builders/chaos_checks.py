"""What must hold of a run that met faults, compared with one that met none."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from orchestrator.figures.records import ExperimentResult, TrialResult
from tests.builders.chaos_faults import Fired
from tests.builders.chaos_run import ChaosRun
from trainers.contract.events import ClockChanged, Event, TrialRestarted, WorkerFailed

SAME = ("loss/", "coco/box", "coco/mask", "learning")
"""Beginnings of the names of metrics that do not depend on speed."""


@dataclass(frozen=True)
class Control:
    """What an undisturbed run comes to."""

    state: str | None
    scores: dict[int, dict[str, float | None]]
    rows: Counter[tuple[str, int, float]]
    """Points in MLflow of what is the same at every speed, with their values."""
    files: set[str]

    @classmethod
    def of(cls, run: ChaosRun) -> Control:
        trial = trial_of(run)
        scores = {each.iteration: each.figures for each in trial.evaluations}
        return cls(trial.state_sha256, scores, _rows(run), run.files)


def result_of(run: ChaosRun) -> ExperimentResult:
    return ExperimentResult.model_validate_json((run.run_dir / "results.json").read_bytes())


def trial_of(run: ChaosRun) -> TrialResult:
    (trial,) = result_of(run).trials
    return trial


def broken(run: ChaosRun, faults: list[Fired], control: Control) -> list[str]:
    """What does not hold."""
    problems = list(run.problems)
    if "Traceback" in printed(run.folder):
        problems.append("a traceback in what the command printed")
    if not (run.run_dir / "results.json").exists():
        return [*problems, "no results.json"]
    result, trial, own = result_of(run), trial_of(run), Control.of(run)
    if (result.status, trial.status, result.tracked) != ("FINISHED", "FINISHED", True):
        return [*problems, f"{result.status}, {trial.status}: {trial.reason}, tracked: {result.tracked}"]
    missing, more = control.rows - own.rows, own.rows - control.rows
    runs = _runs(run)
    checks = {
        "other weights": own.state != control.state,
        "other AP": own.scores != control.scores,
        f"rows missing: {sorted(missing)[:3]}": bool(missing),
        f"rows too many: {sorted(more)[:3]}": bool(more),
        f"runs in MLflow: {runs}": [status for _, status in runs] != ["FINISHED", "FINISHED"],
        f"rows of other runs or twice: {_doubled(run)[:3]}": bool(_doubled(run)),
        f"files left: {_left(own, control)}": bool(_left(own, control)),
        "the clock's change is not noted": any("clock" in fault.name for fault in faults)
        and not any(isinstance(event, ClockChanged) for event in run.events),
    }
    return [*problems, *(name for name, failed in checks.items() if failed), *unexplained(run.events, faults)]


def _left(own: Control, control: Control) -> set[str]:
    """Files of other names than those of an undisturbed run; attempts may leave what their workers were doing."""
    return {name for name in own.files - control.files if "/stuck-" not in name}


def unexplained(events: Sequence[Event], faults: Sequence[Fired]) -> list[str]:
    """Restarts that follow from no fault, and faults that no restart with their cause and rank follows."""
    problems = []
    restarts = [(position, event) for position, event in enumerate(events) if isinstance(event, TrialRestarted)]
    for number, (position, event) in enumerate(restarts):
        # A fault that came while another one was being recovered from ends the next attempt.
        since = restarts[number - 2][0] if number > 1 else 0
        causes = {cause for each in faults if since <= each.events <= position for cause in each.kind.causes}
        if event.failure not in causes:
            problems.append(f"restart {event.attempt} by {event.failure} ({event.message[:90]}) without its fault")
    ended_by: dict[int | None, list[Fired]] = {}
    for each in faults:
        if each.kind.causes:
            after = next((position for position, _ in restarts if position >= each.events), None)
            ended_by.setdefault(after, []).append(each)
    without = [each for each in ended_by.pop(None, []) if each.kind.must and each.training]
    problems += [f"{each.name}: no restart followed" for each in without]
    for end, (each, *others) in ended_by.items():
        failures = [event for event in events[each.events : end or 0] if isinstance(event, WorkerFailed)]
        named = [(event.failure, event.rank) for event in failures]
        # Of several that ended one attempt, it is not known which is noticed.
        if each.rank is not None and not others and (each.kind.causes[0], each.rank) not in named:
            problems.append(f"{each.name} of rank {each.rank} is recorded as {named[:4]}")
    return problems


def _query(run: ChaosRun, what: str) -> list[tuple[object, ...]]:
    """Rows of MLflow's database about this run's experiment."""
    tables = "experiments e join runs r on r.experiment_id = e.experiment_id"
    with closing(sqlite3.connect(run.server.database, timeout=60)) as connection:
        return connection.execute(what.format(tables=tables), [run.values["name"]]).fetchall()


def _runs(run: ChaosRun) -> list[tuple[object, ...]]:
    return _query(run, "select r.run_uuid, r.status from {tables} where e.name = ? order by r.start_time")


def _rows(run: ChaosRun) -> Counter[tuple[str, int, float]]:
    rows = _query(
        run, "select m.key, m.step, m.value from {tables} join metrics m on m.run_uuid = r.run_uuid where e.name = ?"
    )
    return Counter(row for row in rows if str(row[0]).startswith(SAME))  # type: ignore[misc]


def _doubled(run: ChaosRun) -> list[tuple[object, ...]]:
    """Points of one metric of one run at one step of which there are several."""
    return _query(
        run,
        "select m.key, m.step, count(*) from {tables} join metrics m on m.run_uuid = r.run_uuid where e.name = ? "
        "group by m.run_uuid, m.key, m.step having count(*) > 1",
    )


def printed(folder: Path) -> str:
    """What the command printed, in all of its starts; a worker's traceback is for the log and the events alone."""
    return (folder / "output.txt").read_text(encoding="utf-8", errors="replace")


def log_tail(folder: Path) -> str:
    """The end of what the command printed."""
    return printed(folder)[-3000:]
