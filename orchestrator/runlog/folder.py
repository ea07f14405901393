"""A run's folder: reads it back, for reports and to go on with the run.

All that is needed is in the folder: the experiment and the plans in `events.jsonl`, the results in `results.json`. A
folder that was copied elsewhere still has its old path in every plan, so reports search a trial's files in the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from orchestrator.experiment.paths import absolute
from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.spec import Experiment, SpecError
from orchestrator.figures.logged_plan import LoggedPlan, Plan, plan_from_dict
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.files import has_line
from orchestrator.findings import root_cause
from orchestrator.runlog.changes import assignments_between, change
from orchestrator.runlog.lock import LOCK, only_driver, take_over_timeout
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from trainers.contract.events import CheckpointSaved, Event, RunEnded, RunStarted, TrialEnded, TrialStarted
from trainers.contract.plan import Device, TrialPlan

WORKING_DIRECTORY = "run.working_directory"
"""Tag with the folder the command was given in: an experiment file may hold relative paths."""

REPLAYED = "`python -m orchestrator.replay LOG --track` tracks the run of a log"
"""How to track what `--replay-outbox` and `--resume` cannot take."""


@dataclass(frozen=True, slots=True)
class TrialEvents:
    """A trial with its record and events."""

    label: str
    """Its name in figures; unique among those drawn together."""
    trial: TrialResult
    events: Sequence[Event]
    """Its events; empty where the outbox is gone."""
    plan: Plan | None
    """Its plan; None where the outbox is gone."""
    folder: Path
    """The folder of its files."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run of an experiment."""

    path: Path
    result: ExperimentResult
    trials: list[TrialEvents]
    experiment: dict[str, Any] = field(default_factory=dict)
    """The experiment's values as they were resolved; empty where the outbox is gone."""
    tracking: dict[str, Any] = field(default_factory=dict)
    """State of tracking: `experiment_id`, and MLflow's `runs` by trial (those of references by `reference/NAME`)."""


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """A run that was started before, as its events show it."""

    run_dir: Path
    experiment: Experiment
    started: RunStarted
    """Its first start."""
    num_starts: int
    environment: dict[str, str]
    """The environment of its last start."""
    plans: dict[str, TrialPlan]
    """Plans of the trials that were begun, by name."""
    finished: frozenset[str]
    """Names of the trials with nothing left to do."""
    ended: bool
    """Whether its last driver came to the end, and did not die."""
    failures: dict[str, int]
    """The trials that failed last, with the number of the start in which they did."""
    failed: str
    """Why it failed by itself, so that it would again; "" where it did not, was stopped, or lost its cluster."""
    changes: dict[str, Any]
    """What `--resume --set` has changed since it was begun, this time too, by dotted key."""
    new_changes: dict[str, Any]
    """What it changes this time."""
    size: int
    """Bytes of its events that were read."""
    datasets: dict[str, dict[str, Any]]
    """Fingerprints of `train` and `val` at the first start that noted them; without those that none did."""

    @property
    def is_complete(self) -> bool:
        """Whether all of its trials have finished, also those that are planned."""
        others = sum(plan.device != self.devices[0] for plan in self.plans.values())
        return len(self.finished) >= self.experiment.trials.num_trials + others

    @property
    def devices(self) -> list[Device]:
        """What its trials were begun on, its own device first: earlier versions changed it with the machine."""
        return list(dict.fromkeys(plan.device for plan in self.plans.values()))

    def keep_failures(self, since: int) -> EarlierRun:
        """The run with trials that have failed in a start from number `since` on as finished: they would again."""
        failed = {name for name, start in self.failures.items() if start >= since}
        return replace(self, finished=self.finished | failed)


def read_run_folder(path: Path, result: ExperimentResult | None = None) -> RunFolder:
    """Reads the results of a run, and its events where they are still there.

    Args:
        path: The folder.
        result: Its results, where they were read already.

    Raises:
        ValueError: It holds no results, or results or events that this version cannot read.
    """
    if result is None:
        try:
            result = ExperimentResult.model_validate_json((path / "results.json").read_bytes())
        except OSError as error:
            raise ValueError(f"{path}: not a run's folder: {error}") from error
        except ValidationError as error:
            raise ValueError(f"{path}/results.json: not results that this version reads: {error}") from error
    events: dict[str, list[Event]] = {}
    for event in _events(path):
        events.setdefault(event.trial, []).append(event)
    plans = {plan.name: plan for own in events.values() for plan in _plans(own, path)}
    starts = [event for event in events.get("", []) if isinstance(event, RunStarted)]
    tracking: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # it was not tracked, or the file is damaged
        tracking = orjson.loads((path / "tracking.json").read_bytes())
    return RunFolder(
        path=path,
        result=result,
        trials=[
            TrialEvents(t.name, t, events.get(t.name, []), plans.get(t.name), path / Path(t.name).name)
            for t in result.trials
        ],
        experiment=starts[-1].experiment if starts else {},
        tracking=tracking,
    )


def read_earlier_run(folder: Path, assignments: Sequence[str] = ()) -> EarlierRun:
    """Reads what is needed to go on with a run, and changes what `--set KEY=VALUE` asks for.

    Raises:
        SpecError: Something may not be changed, there is no run in the folder or one that this version cannot read, it
            is elsewhere than when the run was started, or the run was replayed from a log.
    """
    folder = absolute(folder, "RUN_FOLDER")
    try:
        read = list(Outbox(folder / FILE_NAME).read())
    except (OSError, ValueError) as error:
        raise SpecError(f"{folder / FILE_NAME}: {error}") from error
    events = [event for event, _ in read]
    starts = [event for event in events if isinstance(event, RunStarted)]
    if not starts:
        # A replayed log has results and, before it is tracked, no events.
        hint = f"; {REPLAYED}" if (folder / "results.json").exists() else ""
        raise SpecError(f"{folder}: no run was started in this folder (its {FILE_NAME} is missing or empty){hint}")
    plans: dict[str, TrialPlan] = {}
    for plan in _plans(events, folder):
        if isinstance(plan, LoggedPlan):
            raise SpecError(
                f"{folder}: it was replayed from a log ({plan.source}) and has nothing to resume; {REPLAYED}"
            )
        if Path(plan.trial_dir) != folder / plan.name:
            raise SpecError(f"{folder}: the run was made in {Path(plan.trial_dir).parent}; move it back there")
        plans[plan.name] = plan
    last_ends = {event.trial: event for event in events if isinstance(event, TrialEnded)}
    closing = [event for event in events if isinstance(event, RunStarted | RunEnded)]
    last = parse_experiment(starts[-1].experiment, where=str(folder / FILE_NAME))
    experiment, changes = change(last, assignments)
    return EarlierRun(
        run_dir=folder,
        experiment=experiment,
        started=starts[0],
        num_starts=len(starts),
        environment=recorded_environment(starts[-1]),
        plans=plans,
        finished=frozenset(name for name, event in last_ends.items() if event.status == "FINISHED"),
        ended=isinstance(closing[-1], RunEnded),
        failures=_failures(events),
        failed=_failure(closing[-1], last_ends.values()),
        changes={key: value for start in starts for key, value in start.changes.items()} | changes,
        new_changes=changes,
        size=read[-1][1],
        datasets={part: known for start in reversed(starts) for part, known in start.datasets.items()},
    )


def _failures(events: Iterable[Event]) -> dict[str, int]:
    found, start = dict[str, int](), 0
    for event in events:
        if isinstance(event, RunStarted):
            start = event.attempt
        elif isinstance(event, TrialEnded) and event.status == "FAILED":
            found[event.trial] = start
        elif isinstance(event, TrialEnded):
            found.pop(event.trial, None)
    return found


def _failure(last: Event, ends: Iterable[TrialEnded]) -> str:
    """Why a run whose last start or end this is failed by itself; "" where it did not."""
    if not isinstance(last, RunEnded) or last.status != "FAILED" or last.reason:
        return ""
    return next((f"{end.trial}: {end.reason}" for end in ends if end.status == "FAILED"), "")


def count_progress(folder: Path) -> int | None:
    """How many checkpoints and finished trials the events of a run hold; None where they are gone or cannot be read."""
    try:
        (folder / FILE_NAME).stat()
        return sum(
            isinstance(event, CheckpointSaved) or (isinstance(event, TrialEnded) and event.status == "FINISHED")
            for event in _events(folder)
        )
    except OSError:
        return None


def recorded_environment(start: RunStarted) -> dict[str, str]:
    """The environment in which a run was started, as `describe` gave it then."""
    return {key[4:]: text for key, text in start.tags.items() if key[:4] == "run." and key != WORKING_DIRECTORY}


def read_begun_run(folder: Path, given: Experiment) -> EarlierRun | None:
    """The run in a folder that a job goes on with which is started again; None where none was begun there.

    Args:
        folder: The folder.
        given: The experiment as this start has it; it may differ in what decides nothing of what is trained.

    Raises:
        SpecError: The run there is another experiment's, or cannot be gone on with.
    """
    folder = absolute(folder, "RUN_FOLDER")
    try:
        if (folder / LOCK).exists():
            with only_driver(folder, timeout=take_over_timeout(folder)):
                pass  # what the last driver wrote is read once it is gone
        starts = [event for event in _events(folder) if isinstance(event, RunStarted)]
    except OSError:  # also where the folder is not there: whoever begins the run says what is wrong with it
        return None
    if not starts:
        return None
    begun = parse_experiment(starts[-1].experiment, where=str(folder / FILE_NAME))
    try:
        return read_earlier_run(folder, assignments_between(begun, given))
    except SpecError as error:
        raise SpecError(f"--resume auto: {folder}: {error}") from error


def enter_working_directory(run: EarlierRun) -> None:
    """Changes to the folder the run's command was given in, if that is on this machine."""
    with suppress(OSError, KeyError):
        os.chdir(run.started.tags[WORKING_DIRECTORY])


def check_unused(run_dir: Path, earlier: EarlierRun | None) -> None:
    """Refuses a folder that others use: also under the lock, as it may have been held and released meanwhile.

    Args:
        run_dir: The folder.
        earlier: The run there, to go on with; None to begin one.

    Raises:
        SpecError: It has events that `earlier` was read without, holds another run or the checkpoints of one, from
            which a new run would train on, or cannot be read.
    """
    try:
        if earlier and any(Outbox(run_dir / FILE_NAME).read(earlier.size)):
            raise SpecError(f"{run_dir}: another process has gone on with the run meanwhile; give the command again")
        if not earlier and any(has_line(run_dir / name) for name in ("results.json", FILE_NAME)):
            raise SpecError(f"--output {run_dir}: holds another run; name a new folder, or --resume it")
        if left := None if earlier else next(run_dir.glob("*/checkpoints/iter_*"), None):
            what = f"holds the checkpoints of another run ({left.parent}), and its {FILE_NAME} is gone"
            raise SpecError(f"--output {run_dir}: {what}; name a new folder, or remove what is left of it")
    except OSError as error:
        raise SpecError(f"{run_dir}: it cannot be read: {root_cause(error)}") from error


def _events(folder: Path) -> list[Event]:
    return [event for event, _ in Outbox(folder / FILE_NAME).read()]


def _plans(events: Sequence[Event], folder: Path) -> list[Plan]:
    """The plans of the trials that were begun; raises SpecError where this version cannot read one."""
    try:
        return [plan_from_dict(event.plan) for event in events if isinstance(event, TrialStarted)]
    except (KeyError, TypeError, ValidationError) as error:  # a field that this version lacks, or has and misses
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise SpecError(
            f"{folder / FILE_NAME}: not plans that this version reads, use the one that wrote them ({what})"
        ) from error
