"""From logs to the record, files and MLflow runs that this program's own runs leave."""

from __future__ import annotations

import datetime
import hashlib
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.experiment.spec import Tracking
from orchestrator.figures.benchmark_records import BenchmarkResult
from orchestrator.figures.logged_plan import LoggedPlan
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.figures.scaling import repeat_rows, scaling_fits, scaling_rows
from orchestrator.figures.trial import trial_result
from orchestrator.files import is_file, is_folder
from orchestrator.replay.launches import Launch
from orchestrator.replay.messages import read_messages
from orchestrator.replay.metrics_json import is_metrics_json, read_metrics
from orchestrator.replay.mllog import BENCHMARK, MllogRun, description_file, find_mllog_runs, is_mllog, system_name
from orchestrator.replay.mlperf import mlperf_events
from orchestrator.replay.mlperf_plan import mlperf_plan
from orchestrator.replay.runs import LoggedRun, find_runs
from orchestrator.replay.trial import RECIPE, Targets, gpu_name, known_targets, logged_plan, replayed_events
from orchestrator.replay.unpacking import ReplayError, read_text
from orchestrator.report.airank import write_airank, write_airank_summary
from orchestrator.report.benchmark import benchmark_result
from orchestrator.report.mlperf import LOG_NAME, RULESET, failed_rules, write_mllog
from orchestrator.report.writer import write_report
from trainers.contract.events import Event, LogReplayed, RunEnded, RunStarted

LOG_NAMES = ("log.txt", "metrics.json")
"""Files that detectron2 leaves in its output folder, the better one first."""

MLPERF_RESULTS = "result_*.txt"
"""Files of a folder of MLPerf's results: the runs of one system."""

RULESETS = (RULESET, "3.0.0", "2.1.0", "2.0.0", "1.1.0", "1.0.0")
"""Rules of MLPerf Training for Mask R-CNN, the newest first: a log does not say of which round it is."""

SUBMISSIONS = "submissions"
"""Folder of a replayed run with MLPerf's results as their submissions have them."""

PACKED = ("", ".gz", ".xz", ".bz2")
"""What is added to their names where they were packed."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """One run read from a log."""

    source: Path
    """The log."""
    is_mllog: bool
    """Whether it is a result of MLPerf's, which says less than its place in a submission."""
    plan: LoggedPlan
    events: list[Event]
    result: TrialResult


def replay(logs: Sequence[Path], targets: Targets | None = None, year: int | None = None) -> list[Replayed]:
    """Reads the runs of some logs.

    Args:
        logs: Files (log.txt, metrics.json alone, MLPerf's results) or folders that hold them.
        targets: AP that counts as trained; None for the task's public one, where it has one.
        year: Year of the logs' first lines; None to guess it.

    Raises:
        ReplayError: A file is neither detectron2's nor MLPerf's, holds no training, or mixes runs.
    """
    runs = [run for log in logs for run in _runs(log, year)]
    named = zip(runs, _names(runs), strict=True)
    plans = _comparable([_plan(run, name, targets) for run, name in named], runs)
    events = [
        mlperf_events(run, plan) if isinstance(run, MllogRun) else replayed_events(run, plan)
        for run, plan in zip(runs, plans, strict=True)
    ]
    return [
        Replayed(run.source, isinstance(run, MllogRun), p, e, trial_result(p, e))
        for run, p, e in zip(runs, plans, events, strict=True)
    ]


def _plan(run: LoggedRun | MllogRun, name: str, targets: Targets | None) -> LoggedPlan:
    if isinstance(run, MllogRun):
        return mlperf_plan(run, name, targets)
    return logged_plan(run, name, targets or known_targets(run))


def experiment_result(name: str, replayed: Sequence[Replayed], command: Sequence[str]) -> ExperimentResult:
    """The record of the runs together, compared with one another, as an experiment of that name."""
    trials = [one.result for one in replayed]
    now = datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
    return ExperimentResult(
        experiment=name, description="Read from the logs of runs of another program.", status="FINISHED", started=now,
        ended=now, command=list(command), trials=trials, scaling=scaling_rows(trials) if len(trials) > 1 else [],
        fits=scaling_fits(trials), repeats=repeat_rows(trials), benchmark=_benchmark(replayed),
    )  # fmt: skip


def _benchmark(replayed: Sequence[Replayed]) -> BenchmarkResult | None:
    """The score of several runs of one system of MLPerf's, checked by the rules of its round; None for other logs."""
    setups = {(one.plan.recipe_name, one.plan.world_size) for one in replayed}
    ended = [event for one in replayed for event in one.events if isinstance(event, LogReplayed)]
    sources = dict.fromkeys(one.source for one in replayed)
    if len(setups) > 1 or not all(event.run_status for event in ended) or not 1 < len(sources) == len(replayed):
        return None
    logs = [read_text(source)[0] for source in sources]
    ruleset = next((rules for rules in RULESETS if not failed_rules(logs[0], rules)), RULESET)
    return benchmark_result([one.result for one in replayed], logs, len(replayed), ruleset)


def write(result: ExperimentResult, replayed: Sequence[Replayed], run_dir: Path) -> None:
    """Writes what a run of this program leaves: record, report, table, AI-Rank's and MLPerf's logs, the log itself."""
    run_dir.mkdir(parents=True, exist_ok=True)
    result.write(run_dir / "results.json")
    write_report(result, run_dir)
    write_airank_summary(result, run_dir)
    for one in replayed:
        folder = run_dir / one.plan.name
        write_airank(one.plan, one.events, one.result, folder)
        write_mllog(one.plan, one.events, one.result, folder)
        plain = one.source.suffix not in (".json", *PACKED[1:])
        shutil.copyfile(one.source, folder / ("log.txt" if plain else one.source.name))
    for log, copy in submission_files([one.source for one in replayed if one.is_mllog]).items():
        target = run_dir / SUBMISSIONS / copy
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, target)


def submission_files(logs: Sequence[Path]) -> dict[Path, Path]:
    """Where results of MLPerf's, and the descriptions of their systems, are kept so that they read the same again."""
    submissions: list[Path] = []
    files: dict[Path, Path] = {}
    for log in logs:
        file, root = description_file(log), log.absolute().parent
        if file:
            root = file.parent.parent
        if root not in submissions:
            submissions.append(root)
        number = Path(str(submissions.index(root)))
        system = number / "results" / system_name(log)
        files[log] = (system / BENCHMARK if file else system) / log.name
        if file and file.is_file():
            files[file] = number / "systems" / file.name
    return files


def track(result: ExperimentResult, replayed: Sequence[Replayed], run_dir: Path, uri: str | None) -> str:
    """Logs the runs to MLflow as reference runs, the same logs once only; returns the store's address.

    `run_dir` has their record, and gets the events that tracking reads; a `uri` of None is the default store. Where it
    is cut off (KeyboardInterrupt), or the store refuses something (TrackingError), no run is left as running there.
    """
    from orchestrator.runlog.outbox import FILE_NAME, Outbox
    from orchestrator.tracking.driver import Tracker, TrackingError, tracking_uri

    # The same logs read in the same way are the same run.
    read_as = [(one.plan.name, one.plan.target_box_ap, one.plan.target_mask_ap) for one in replayed]
    content = hashlib.sha256(repr(read_as).encode())
    for one in replayed:
        content.update(one.source.read_bytes())
    whole: dict[str, Any] = {"trial": "", "attempt": 0, "rank": -1}
    experiment = {
        "name": result.experiment, "description": result.description, "tracking": Tracking().model_dump(),
        "reference_rows": [],
    }  # fmt: skip
    tags = {"run.kind": "reference", "run.source": ", ".join(one.source.name for one in replayed)}
    run_id = f"replay-{content.hexdigest()[:16]}"
    began, ended = min(one.events[0].time for one in replayed), max(one.events[-1].time for one in replayed)
    (run_dir / FILE_NAME).unlink(missing_ok=True)
    Outbox(run_dir / FILE_NAME).append(
        RunStarted(**whole, time=began, experiment=experiment, run_id=run_id, tags=tags),
        *(event for one in replayed for event in one.events),
        RunEnded(**whole, time=ended, status="FINISHED"),
    )
    store = tracking_uri(uri)
    (run_dir / "tracking.json").unlink(missing_ok=True)
    tracker = Tracker(run_dir, store)
    try:
        tracker.sync()
    except (TrackingError, KeyboardInterrupt):
        with suppress(TrackingError):  # what went wrong first is what is reported
            tracker.fail("its log was not tracked to the end")
        raise
    return store


def _runs(path: Path, year: int | None) -> Sequence[LoggedRun | MllogRun]:
    if is_folder(path):
        if results := sorted([*path.glob(MLPERF_RESULTS), *path.glob(f"{BENCHMARK}/{MLPERF_RESULTS}")]):
            return [run for file in results for run in find_mllog_runs(file, *read_text(file))]
        files = [path / f"{name}{packed}" for name in LOG_NAMES for packed in PACKED]
        inside = next((file for file in files if is_file(file)), None)
        if inside is None:
            raise ReplayError(f"{path}: holds neither {' nor '.join((*LOG_NAMES, MLPERF_RESULTS))}")
        path = inside
    text, notes = read_text(path)
    if is_mllog(text):
        return find_mllog_runs(path, text, notes)
    if is_metrics_json(text):
        return read_metrics(path, text, notes)
    messages, found = read_messages(path, text, year)
    return find_runs(path, messages, [*notes, *found])


def _names(runs: Sequence[LoggedRun | MllogRun]) -> list[str]:
    """A name per run, fit for a folder: its file's, or its folder's where the file has a name that many have."""
    names: list[str] = []
    for run in runs:
        path = run.source.absolute()
        name = path.name.removesuffix(path.suffix) if path.suffix in PACKED else path.name
        stem = path.parent.name if name in (*LOG_NAMES, LOG_NAME) else Path(name).stem
        stem = f"{system_name(path)}-{stem}" if path.match(MLPERF_RESULTS) else stem
        base = "".join(c if c.isalnum() or c in "._-" else "-" for c in stem).strip(".-") or "run"
        taken = sum(name == base or name.startswith(f"{base}-run") for name in names)
        names.append(f"{base}-run{taken + 1}" if taken else base)
    return names


def _comparable(plans: Sequence[LoggedPlan], runs: Sequence[LoggedRun | MllogRun]) -> list[LoggedPlan]:
    """The plans with a recipe that names GPU and version where these differ, and strong scaling where it was that.

    Those of MLPerf's logs stay as they are: their recipe names the system.
    """
    marks = [None if isinstance(run, MllogRun) else _mark(run.launches[0]) for run in runs]
    comparable = []
    for plan, mark in zip(plans, marks, strict=True):
        if mark is None:
            comparable.append(plan)
            continue
        recipe = RECIPE if len({*marks} - {None}) == 1 else f"{RECIPE} {mark[1]} on {mark[0] or 'unknown'}"
        base = min((p for p, m in zip(plans, marks, strict=True) if m == mark), key=lambda p: p.world_size)
        batch = plan.solver.global_batch_size
        strong = batch is not None and batch == base.solver.global_batch_size and plan.world_size > base.world_size
        comparable.append(replace(plan, recipe_name=recipe, scaling="strong" if strong else "weak"))
    return comparable


def _mark(head: Launch) -> tuple[str | None, str]:
    """What makes runs of detectron2 comparable: GPU and version."""
    return gpu_name(head), head.environment.get("detectron2", "").split(" ")[0]
