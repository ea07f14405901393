"""`python -m orchestrator.replay LOG…`: a detectron2 log in; the record, the table and the report of a run of ours out.

Nothing of a log is believed that it does not print: a figure it lacks is a dash, with the reason beside it.
"""

from __future__ import annotations

import datetime
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from orchestrator.experiment.spec import Tracking
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.figures.scaling import repeat_rows, scaling_fits, scaling_rows
from orchestrator.figures.trial import trial_result
from orchestrator.replay.lines import ReplayError, read_messages
from orchestrator.replay.metrics import read_metrics
from orchestrator.replay.replayed import RECIPE, Targets, known_targets, replayed_events
from orchestrator.replay.runs import LoggedRun, find_runs
from orchestrator.report.writer import write_report
from orchestrator.report.airank import write_airank, write_airank_summary
from orchestrator.report.mlperf import mllog_text, write_mllog
from orchestrator.report.table import closing_table, number_text, percent_text, seconds_text
from trainers.contract.events import Event, RunEnded, RunStarted, TrialStarted
from trainers.contract.plan import TrialPlan


@dataclass(frozen=True, slots=True)
class Replayed:
    """One run read off a log.

    Attributes:
        source: The log.
        plan: Its plan, as far as the log tells.
        events: Its events.
        result: Its record.
    """

    source: Path
    plan: TrialPlan
    events: list[Event]
    result: TrialResult


def replay(logs: Sequence[Path], targets: Targets | None = None, year: int | None = None) -> list[Replayed]:
    """Reads the runs of some logs.

    Args:
        logs: Files (log.txt, or metrics.json alone) or folders that hold them.
        targets: AP that counts as trained; None for the task's public one, where it has one.
        year: Year of the logs' first lines; None to guess it.

    Raises:
        ReplayError: A file is not detectron2's, holds no training, or mixes runs.
    """
    found = [(path, run) for log in logs for path in [_file(log)] for run in _runs(path, year)]
    names = _names(found)
    told = [
        replayed_events(run, name, targets or known_targets(run), str(path.absolute().parent))
        for (path, run), name in zip(found, names, strict=True)
    ]
    plans = _comparable([plan for plan, _ in told], [run for _, run in found])
    replayed = []
    for (path, _), plan, (_, events) in zip(found, plans, told, strict=True):
        events = [replace(e, plan=asdict(plan)) if isinstance(e, TrialStarted) else e for e in events]
        replayed.append(Replayed(path, plan, events, trial_result(plan, events)))
    return replayed


def experiment_result(name: str, replayed: Sequence[Replayed], command: Sequence[str]) -> ExperimentResult:
    """The record of the runs together, compared with one another."""
    trials = [one.result for one in replayed]
    now = datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
    return ExperimentResult(
        experiment=name,
        description="Read off logs of runs made without this program.",
        status="FINISHED",
        started=now,
        ended=now,
        command=list(command),
        trials=trials,
        scaling=scaling_rows(trials) if len(trials) > 1 else [],
        fits=scaling_fits(trials),
        repeats=repeat_rows(trials),
    )


def details(trial: TrialResult) -> list[str]:
    """What the table has no room for, a line each."""
    stalls = [e.seconds for e in trial.evaluations if e.seconds is not None]
    lines = [
        f"throughput {number_text(trial.images_per_second, 2)} images/s, "
        f"with hooks {number_text(trial.wall_images_per_second, 2)}",
        f"time to train {seconds_text(trial.time_to_train_seconds)} s by all targets, "
        f"{seconds_text(trial.time_to_box_target_seconds)} s by boxes; MLPerf's clock "
        f"{seconds_text(trial.mlperf_seconds)} s; schedule {seconds_text(trial.schedule_seconds)} s",
        f"start-up {seconds_text(trial.startup_seconds)} s; waiting for data {percent_text(trial.data_wait_share)}; "
        f"restarts {trial.num_restarts}, down {seconds_text(trial.downtime_seconds)} s",
    ]
    if trial.scored_iteration is not None:
        lines.append(
            f"targets met at iteration {trial.scored_iteration:,}: box AP {number_text(trial.scored_box_ap, 2)}, "
            f"mask AP {number_text(trial.scored_mask_ap, 2)}"
        )
    if trial.evaluations:
        last = trial.evaluations[-1]
        lines.append(
            f"final at iteration {last.iteration:,}: box AP {number_text(last.box_ap, 2)}, "
            f"mask AP {number_text(last.mask_ap, 2)}"
        )
        lines.append(
            f"{len(stalls)} evaluations, standing still {seconds_text(sum(stalls))} s: "
            + ", ".join(f"{e.iteration:,}: {seconds_text(e.seconds)} s" for e in trial.evaluations)
        )
    return [*lines, *trial.notes]


def _file(log: Path) -> Path:
    if not log.is_dir():
        return log
    for name in ("log.txt", "metrics.json"):
        if (log / name).is_file():
            return log / name
    raise ReplayError(f"{log}: holds neither log.txt nor metrics.json")


def _runs(path: Path, year: int | None) -> list[LoggedRun]:
    if path.suffix == ".json":
        return [read_metrics(path)]
    messages, notes = read_messages(path, year)
    return find_runs(path, messages, notes)


def _names(found: Sequence[tuple[Path, LoggedRun]]) -> list[str]:
    """A name per run, fit for a folder: the file's, or its folder's where every log has the same name."""
    names: list[str] = []
    for path, _ in found:
        stem = path.stem if path.name not in ("log.txt", "metrics.json") else path.absolute().parent.name
        base = "".join(c if c.isalnum() or c in "._-" else "-" for c in stem).strip(".-") or "run"
        taken = sum(name == base or name.startswith(f"{base}-run") for name in names)
        names.append(f"{base}-run{taken + 1}" if taken else base)
    return names


def _comparable(plans: Sequence[TrialPlan], runs: Sequence[LoggedRun]) -> list[TrialPlan]:
    """Says which runs may be compared: same device and detectron2; weak or strong by what was kept."""
    marks = []
    for run in runs:
        environment = run.launches[0].environment
        gpu = next((v for k, v in environment.items() if k.startswith("GPU ") and k != "GPU available"), "")
        marks.append((gpu, environment.get("detectron2", "").split(" ")[0]))
    kept = []
    for plan, mark in zip(plans, marks, strict=True):
        recipe = RECIPE if len(set(marks)) == 1 else f"{RECIPE} {mark[1]} on {mark[0] or 'unknown'}"
        base = min((p for p, m in zip(plans, marks, strict=True) if m == mark), key=lambda p: p.world_size)
        strong = plan.solver.global_batch_size == base.solver.global_batch_size and plan.world_size > base.world_size
        kept.append(replace(plan, recipe_name=recipe, scaling="strong" if strong else "weak"))
    return kept


def write(result: ExperimentResult, replayed: Sequence[Replayed], run_dir: Path) -> None:
    """Leaves what a run of ours leaves: record, report, table, AI-Rank's files, MLPerf's log, the log itself."""
    run_dir.mkdir(parents=True, exist_ok=True)
    result.write(run_dir / "results.json")
    write_report(result, run_dir)
    write_airank_summary(result, run_dir)
    for one in replayed:
        folder = run_dir / one.plan.name
        write_airank(one.plan, one.events, one.result, folder)
        write_mllog(one.plan, one.events, one.result, folder)
        shutil.copyfile(one.source, folder / one.source.name if one.source.suffix == ".json" else folder / "log.txt")


def track(result: ExperimentResult, replayed: Sequence[Replayed], run_dir: Path, uri: str | None) -> str:
    """Puts the runs into MLflow as reference runs, once however often it is asked.

    Args:
        result: Their record, written into `run_dir` already.
        replayed: The runs.
        run_dir: Folder for the events that tracking is fed from.
        uri: The store; None for the one runs of ours go to.

    Returns:
        The store.
    """
    from orchestrator.runlog.outbox import FILE_NAME, Outbox
    from orchestrator.tracking.driver import Tracker, tracking_uri

    # The same logs read in the same way are the same run.
    content = hashlib.sha256(repr([one.plan for one in replayed]).encode())
    for one in replayed:
        content.update(one.source.read_bytes())
    began = min(one.events[0].time for one in replayed)
    ended = max(one.events[-1].time for one in replayed)
    whole: dict[str, Any] = {"trial": "", "attempt": 0, "rank": -1}
    experiment = {
        "name": result.experiment,
        "description": result.description,
        "tracking": Tracking().model_dump(),
        "reference_rows": [],
    }
    tags = {"run.kind": "reference", "run.source": ", ".join(one.source.name for one in replayed)}
    (run_dir / FILE_NAME).unlink(missing_ok=True)
    Outbox(run_dir / FILE_NAME).append(
        RunStarted(**whole, time=began, experiment=experiment, run_id=f"replay-{content.hexdigest()[:16]}", tags=tags),
        *(event for one in replayed for event in one.events),
        RunEnded(**whole, time=ended, status="FINISHED"),
    )
    store = tracking_uri(uri)
    (run_dir / "tracking.json").unlink(missing_ok=True)
    Tracker(run_dir, store).sync()
    return store


def main(
    logs: Annotated[list[Path], typer.Argument(help="detectron2's log.txt, metrics.json, or folders with them.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the record instead of the table.")] = False,
    as_reference: Annotated[bool, typer.Option("--track", help="Put the runs into MLflow as reference runs.")] = False,
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow store; default as for runs of ours.")] = None,
    experiment: Annotated[str, typer.Option(help="Name of the experiment in the record and in MLflow.")] = "replay",
    mllog: Annotated[Path | None, typer.Option(help="Write MLPerf log lines of the run here.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write record, report, table, AI-Rank and MLPerf logs here.")
    ] = None,
    target_box_ap: Annotated[float | None, typer.Option(help="Box AP that counts as trained, 0–100.")] = None,
    target_mask_ap: Annotated[float | None, typer.Option(help="Mask AP that counts as trained, 0–100.")] = None,
    year: Annotated[int | None, typer.Option(help="Year of the first line; the logs have none.")] = None,
) -> None:
    """Reads detectron2 logs of runs made without this program into its record, table and report."""
    targets = None
    if target_box_ap is not None or target_mask_ap is not None:
        targets = Targets(target_box_ap, target_mask_ap)
    told = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="replay-") as aside:
        run_dir = (output or Path(aside)).absolute()
        try:
            replayed = replay(logs, targets, year)
        except ReplayError as error:
            told.print(f"[red]error:[/red] {escape(str(error))}")
            raise typer.Exit(2) from error
        if mllog is not None and len(replayed) > 1:
            told.print(f"[red]error:[/red] --mllog takes one run, as MLPerf's log holds one; here are {len(replayed)}")
            raise typer.Exit(2)
        result = experiment_result(experiment, replayed, sys.argv)
        write(result, replayed, run_dir)
        if mllog is not None:
            mllog.write_text(mllog_text(replayed[0].plan, replayed[0].events, replayed[0].result), encoding="utf-8")
        store = track(result, replayed, run_dir, tracking_uri) if as_reference else None
    if as_json:
        print(result.model_dump_json(indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(closing_table(result))
    for one in replayed:
        console.print(f"[bold]{escape(one.plan.name)}[/bold]")
        for line in details(one.result):
            console.print(f"  {escape(line)}", soft_wrap=True)
    if output:
        console.print(f"Written to {escape(str(output))}")
    if store:
        console.print(f"Tracked in {escape(store.rpartition('@')[2])}, experiment {escape(experiment)}")


if __name__ == "__main__":
    typer.run(main)
