"""Recomputes a run's record, `results.json`, from its events or from the logs of another program, and compares."""

from __future__ import annotations

import dataclasses
import math
import shlex
import tempfile
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from orchestrator.bundle.contents import RESULTS, BundledRun, derived_files, result_files
from orchestrator.experiment.spec import Experiment
from orchestrator.figures.logged_plan import Plan
from orchestrator.figures.neighbours import with_neighbours
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.figures.scaling import repeat_rows, scaling_fits, scaling_rows
from orchestrator.figures.trial import trial_result
from orchestrator.findings import FindingList
from orchestrator.replay.metrics_json import is_metrics_json
from orchestrator.replay.record import LOG_NAMES, Replayed, experiment_result, replay
from orchestrator.replay.trial import Targets
from orchestrator.replay.unpacking import ReplayError
from orchestrator.report.benchmark import benchmark_result
from orchestrator.report.mlperf import mllog_text
from orchestrator.runlog.folder import recorded_environment
from trainers.contract.events import RunEnded, RunStarted, TrialEnded
from trainers.contract.plan import TrialPlan

NOT_FIGURES = {"mlflow_run_id", "mlflow_tracking_uri", "tracked"}
"""Fields of the record that say where a run is tracked."""

RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-6, 1e-9
"""Differences between machines of what scipy computes; the same machine gives the same digits."""

CLOCK_TOLERANCE_SECONDS = 5.0
"""Between the record's start, which has whole seconds, and the event of it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Recomputed:
    """A run's trials as its events or logs give them."""

    trials: list[TrialResult]
    plans: dict[str, Plan]
    replayed: list[Replayed]
    """Of another program's logs, with the events made of them; empty for a run of this program."""


def recompute(run: BundledRun, findings: FindingList) -> Recomputed:
    """The record of every trial, by the code that publishes it."""
    if run.is_replayed:
        replayed = _replay(run, findings)
        return Recomputed(
            [each.result for each in replayed], {each.plan.name: each.plan for each in replayed}, replayed
        )
    trials, plans = [], {}
    for name, plan in run.plans.items():
        try:
            plans[name] = _changed(plan, run)
            trials.append(with_neighbours(trial_result(plans[name], run.of(name)), run.events))
        except Exception as error:  # noqa: BLE001 - the events may be anybody's, and hold anything
            what = f"its figures cannot be computed from its events: {error}"
            findings.error("not_computable", f"{run.name}/events.jsonl", name, what, "Ask for all of its events")
    return Recomputed(trials, plans, [])


def check_record(run: BundledRun, recomputed: Recomputed, findings: FindingList) -> int:
    """Compares `results.json` with what was recomputed; returns the number of values that agree."""
    place, source = f"{run.name}/{RESULTS}", "logs" if run.is_replayed else "events"
    comparison = _Comparison(place, f"The {source} give", findings)
    published = {trial["name"]: trial for trial in run.stored["trials"]}
    by_name = {trial.name: trial for trial in recomputed.trials}
    for name in by_name.keys() - published.keys():
        findings.error("trial_dropped", place, name, f"the {source} have this trial, the record lacks it", ASK)
    for name in published.keys() - by_name.keys():
        findings.error("trial_invented", place, name, f"the record has this trial, the {source} have no such", ASK)
    for trial in run.result.trials:
        if trial.name in by_name:
            given = trial.model_dump(mode="json")
            comparison.compare(given, by_name[trial.name].model_dump(mode="json"), trial.name, published[trial.name])
    whole = _whole(run, recomputed)
    for key in WHOLE:
        given, true = (each.model_dump(mode="json", include={key})[key] for each in (run.result, whole))
        comparison.compare(given, true, key, run.stored.get(key, ABSENT))
    if not run.is_replayed:
        _check_origin(run, findings)
        _check_asked(run, recomputed.plans, findings)
        for file, content in derived_files(run).items():
            if not (run.folder / file).is_file() or (run.folder / file).read_bytes() != content:
                what = "it is not what the events hold"
                findings.error("config_differs", f"{run.name}/{file}", "", what, "The events hold what ran")
    return comparison.num_agreeing


WHOLE = ("scaling", "fits", "repeats", "benchmark")
"""Fields of the record that are computed from all trials together."""

ASK = "Ask for the whole run"

ABSENT = object()
"""Stands for what a file lacks."""


class _Comparison:
    """Compares a published value, part by part, with what it should be."""

    def __init__(self, place: str, evidence: str, findings: FindingList) -> None:
        self._place, self._evidence, self._findings = place, evidence, findings
        self.num_agreeing = 0

    def compare(self, given: Any, true: Any, where: str, stored: Any = None) -> None:
        """Compares values as JSON has them, below a place.

        Args:
            given: What was published, with defaults for what the file lacks.
            true: What it should be.
            where: The place.
            stored: What the file holds. A figure that it lacks and that is null by default is not stated; the same goes
                for texts of a part that it lacks as a whole, as the records of older versions do.
        """
        if isinstance(given, dict) and isinstance(true, dict):
            for key in [each for each in {**true, **given} if each not in NOT_FIGURES]:
                one, other = given.get(key), true.get(key)
                inner = stored.get(key, ABSENT) if isinstance(stored, dict) else stored
                if inner is ABSENT and (one is None or (one == "" and stored is ABSENT)):
                    continue
                self.compare(one, other, f"{where}.{key}" if where else key, inner)
        elif isinstance(given, list) and isinstance(true, list) and len(given) == len(true):
            inners = stored if isinstance(stored, list) and len(stored) == len(given) else [None] * len(given)
            for index, (one, other, inner) in enumerate(zip(given, true, inners, strict=True)):
                self.compare(one, other, f"{where}[{index}]", inner)
        elif _same(given, true):
            self.num_agreeing += 1
        else:
            what = f"it is {_shown(given)}"
            self._findings.error("figure_differs", self._place, where, what, f"{self._evidence} {_shown(true)}")


def _same(given: Any, true: Any) -> bool:
    numbers = (int, float)
    if isinstance(given, numbers) and isinstance(true, numbers) and bool not in (type(given), type(true)):
        return math.isclose(given, true, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
    return bool(given == true)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"


def _changed(plan: Plan, run: BundledRun) -> Plan:
    """A plan with what `--resume --set` changed of it and figures depend on."""
    starts = [event for event in run.events if isinstance(event, RunStarted)]
    changed = {key for event in starts for key in event.changes}
    prices = ("price_per_accelerator_hour", "price_per_kwh", "carbon_grams_per_kwh")
    sections = {**dict.fromkeys(prices, "resources"), "mtbf_hours": "faults"}
    fields = {
        name: starts[-1].experiment[section][name]
        for name, section in sections.items()
        if f"{section}.{name}" in changed
    }
    return dataclasses.replace(plan, **fields)


def _replay(run: BundledRun, findings: FindingList) -> list[Replayed]:
    """Reads the logs again, as they were read; the same log once only."""
    logs: dict[bytes, Path] = {}
    with tempfile.TemporaryDirectory(prefix="bundle-") as folder:
        for trial in run.result.trials:
            log = next((path for name in LOG_NAMES if (path := run.place(trial.name, name)).is_file()), None)
            if log is not None and log.read_bytes() not in logs:
                place = Path(folder, Path(trial.name).name)
                place.mkdir()
                content = log.read_bytes()
                name = LOG_NAMES[is_metrics_json(content.decode("utf-8", "replace"))]
                (place / name).write_bytes(content)
                logs[content] = place
        targets = {(trial.target_box_ap, trial.target_mask_ap) for trial in run.result.trials}
        given = Targets(*next(iter(targets))) if len(targets) == 1 else None
        try:
            replayed = replay([*logs.values(), *result_files(run)], given)
            order = {trial.name: number for number, trial in enumerate(run.result.trials)}
            return sorted(replayed, key=lambda one: order.get(one.plan.name, len(order)))
        except ReplayError as error:
            what = f"its logs cannot be read: {error}"
        except Exception as error:  # noqa: BLE001 - the logs may be anybody's, and hold anything
            what = f"its figures cannot be computed from its logs: {error}"
    findings.error("not_computable", run.name, "", what, "Ask for the logs as they were written")
    return []


def _whole(run: BundledRun, recomputed: Recomputed) -> ExperimentResult:
    """A record with what is computed from all trials together, by the code that publishes it."""
    if run.is_replayed:
        return experiment_result(run.result.experiment, recomputed.replayed, run.result.command)
    order = [trial.name for trial in run.result.trials]
    trials = [trial for trial in recomputed.trials if trial.name in order]
    trials.sort(key=lambda trial: order.index(trial.name))
    whole = run.result.model_copy(
        update={
            "scaling": scaling_rows(trials),
            "fits": scaling_fits(trials),
            "repeats": repeat_rows(trials),
            "benchmark": None,
        }
    )
    if run.started and run.started.experiment["protocol"]["kind"] == "benchmark":
        logs = [mllog_text(recomputed.plans[trial.name], run.of(trial.name), trial) for trial in trials]
        whole.benchmark = benchmark_result(trials, logs, len(run.started.experiment["trials"]["seeds"]))
    return whole


def _check_origin(run: BundledRun, findings: FindingList) -> None:
    """Compares what the record says of its run with what the run's own events say."""
    place, result = f"{run.name}/{RESULTS}", run.result
    first = next((event for event in run.events if isinstance(event, RunStarted)), None)
    last, ended = run.started, next((e for e in reversed(run.events) if isinstance(e, RunEnded)), None)
    if first is None or last is None:
        findings.error("events_cut", f"{run.name}/events.jsonl", "start", "they do not hold the start of the run", ASK)
        return
    if ended is None or run.events[-1] is not ended:
        findings.error("events_cut", f"{run.name}/events.jsonl", "end", "they do not hold the end of the run", ASK)
    environment, experiment = recorded_environment(last), last.experiment
    statements = {
        "experiment": (result.experiment, experiment.get("name")),
        "description": (result.description, experiment.get("description", "")),
        "reference_rows": ([row.model_dump(mode="json") for row in result.reference_rows], _rows(experiment)),
        "environment": (result.environment, environment),
        "command": (result.command, _words(environment.get("command", ""))),
        "status": (result.status, ended.status if ended else result.status),
    }
    comparison = _Comparison(place, "The events give", findings)
    for key, (given, true) in statements.items():
        comparison.compare(given, true, key)
    trials_ended = max((e.time for e in run.events if isinstance(e, TrialEnded)), default=first.time)
    spans = [("started", result.started, first.time, first.time)]
    spans += [("ended", result.ended or "", trials_ended, ended.time)] if ended else []
    for key, text, earliest, latest in spans:
        moment = _moment(text)
        slack = CLOCK_TOLERANCE_SECONDS
        if moment is None or not earliest - slack < moment < latest + slack:
            true = datetime.fromtimestamp(latest, UTC).isoformat(timespec="seconds")
            findings.error("clock_moved", place, key, f"it is {_shown(text)}", f"The events give {true}")


def _rows(experiment: dict[str, Any]) -> Any:
    model = ExperimentResult.model_validate(
        {"experiment": "", "status": "FINISHED", "started": "", "reference_rows": experiment.get("reference_rows", [])}
    )
    return [row.model_dump(mode="json") for row in model.reference_rows]


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return []


def _moment(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None


def _check_asked(run: BundledRun, plans: dict[str, Plan], findings: FindingList) -> None:
    """Compares the trials with those that the experiment asks for."""
    started = run.started
    if started is None:
        return
    asked = Experiment.model_validate(started.experiment).trials
    scalings = ("weak", "strong") if asked.scaling == "both" else (asked.scaling,)
    wanted = set(product(asked.recipes, scalings, asked.world_sizes, asked.seeds))
    made = {
        (plan.recipe_name, plan.scaling, plan.world_size, plan.seed): name
        for name, plan in plans.items()
        if isinstance(plan, TrialPlan)
    }
    place = f"{run.name}/events.jsonl"
    if run.result.status != "KILLED":
        for recipe, scaling, world_size, seed in sorted(wanted - made.keys(), key=str):
            what = f"the experiment asks for {recipe} on {world_size} workers ({scaling}) with seed {seed}"
            findings.error("trial_dropped", place, f"seed {seed}", what, "The events have no such trial")
    for key in made.keys() - wanted:
        findings.error("trial_invented", place, made[key], "the experiment does not ask for this trial", ASK)
