"""The command: `python -m orchestrator.run [CONFIG]` loads an experiment, checks it, executes it and publishes results.

Exit codes: 0 done, 1 training failed, 2 the input or the environment is not fit, 3 trained and not tracked,
130 interrupted.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console
from rich.markup import escape

from orchestrator.experiment.plan import Hardware, expand, generated_root, new_run_dir, under
from orchestrator.experiment.reading import load_experiment
from orchestrator.experiment.spec import DEFAULT_CONFIG, Experiment, SpecError
from orchestrator.findings import Finding, has_errors, print_findings, sort_findings, to_json
from orchestrator.preflight.settings import check_settings
from orchestrator.process import LastingConsole, prepare_process
from orchestrator.report.plan_table import plan_table

if TYPE_CHECKING:
    from orchestrator.publish import Status
    from orchestrator.runlog.folder import EarlierRun
    from trainers.contract.events import Event
    from trainers.contract.plan import TrialPlan

DONE, FAILED, UNFIT, NOT_TRACKED, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES: dict[Status, int] = {"FINISHED": DONE, "FAILED": FAILED, "KILLED": INTERRUPTED}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Request:
    """What one invocation of the command was asked to do."""

    experiment: Experiment
    """The experiment."""
    run_dir: Path
    """Folder of the run."""
    earlier: EarlierRun | None
    """The run to go on with; None for a new one."""
    console: Console
    """Output for people."""
    quiet: bool
    """Show failures and the closing table only."""
    json_output: TextIO | None
    """Where the result is printed as JSON; None where it is not asked for."""
    verify_images: bool
    """Decode every image while checking."""
    strict: bool
    """Treat warnings about the data as errors."""

    def print_json(self, document: str) -> None:
        """Prints a document where one is asked for."""
        if self.json_output:
            LastingConsole(file=self.json_output).out(document, highlight=False)


@app.command()
def main(
    config: Annotated[Path, typer.Argument(help="The experiment file.")] = DEFAULT_CONFIG,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a field, e.g. trials.world_sizes=[1,8]. Repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results.json and all else; default: runs/EXPERIMENT/UTC-TIME.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with an interrupted run: its folder. Finished trials are kept.")
    ] = None,
    replay_outbox: Annotated[
        Path | None, typer.Option(help="Track a run's folder in MLflow after the fact, and stop.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan of every trial and stop.")] = False,
    preflight: Annotated[bool, typer.Option("--preflight", help="Check everything and stop.")] = False,
    verify_images: Annotated[bool, typer.Option("--verify-images", help="Decode every image while checking.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Treat every warning about the data as an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show failures and the closing table only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; the rest goes to stderr.")] = False,
) -> None:
    """Run an experiment: every trial of an experiment file, tracked in MLflow, ending in a table and a report."""
    prepare_process()
    console = LastingConsole(stderr=as_json)
    # A thread that outlives its cluster must not join another one, as Ray does by default.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        if replay_outbox is not None:
            from orchestrator.publish import track_folder

            console.print(track_folder(replay_outbox), soft_wrap=True)
            raise typer.Exit(DONE)
        others = bool(assignments or output or config != DEFAULT_CONFIG)
        earlier = _read_earlier(resume, alone=not others) if resume is not None else None
        experiment = earlier.experiment if earlier else load_experiment(config, assignments)
        run_dir = earlier.run_dir if earlier else new_run_dir(experiment, output)
        request = Request(
            experiment, run_dir, earlier, console, quiet, sys.stdout if as_json else None, verify_images, strict
        )
        # Ray prints what its daemons report to stdout, which is to hold one JSON document.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            raise typer.Exit(_show_plan(request) if dry_run else _check(request) if preflight else _run(request))
    except SpecError as error:
        Console(stderr=True).print(f"[bold red]error[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(UNFIT) from None


def _show_plan(request: Request) -> int:
    findings = check_settings(request.experiment)
    print_findings(findings)
    if has_errors(findings):
        request.print_json(to_json(findings))
        return UNFIT
    plans = _plans(request, Hardware.local())
    if request.json_output:
        request.print_json(json.dumps([dataclasses.asdict(plan) for plan in plans], indent=2))
        return DONE
    request.console.print(plan_table(plans))
    store = request.experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    place = f"Results in {request.run_dir}, tracked in {store} as {request.experiment.name!r}."
    request.console.print(place, soft_wrap=True, markup=False, highlight=False)
    return DONE


def _check(request: Request) -> int:
    """Preflight alone: all findings, exit code 2 on errors."""
    findings, _ = _preflight(request)
    _leave_ray()
    request.print_json(to_json(findings))
    if not request.json_output and not findings:
        request.console.print("Everything that can be checked is fit.")
    return UNFIT if has_errors(findings) else DONE


def _run(request: Request) -> int:
    """Preflight, then every trial, then results and report."""
    from orchestrator.runlog.folder import only_driver

    if request.earlier:
        with only_driver(request.run_dir):
            pass  # refused before anything is checked or started
    elif any((request.run_dir / name).exists() for name in ("results.json", "events.jsonl")):
        raise SpecError(f"--output {request.run_dir}: holds another run; name a new folder, or --resume it")
    findings, plans = _preflight(request, to_train=True)
    if has_errors(findings):
        request.print_json(to_json(findings))
        return UNFIT
    if not request.quiet:
        request.console.print(plan_table(plans))
    request.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with only_driver(request.run_dir):
            return _execute(request, plans)
    finally:
        _leave_ray()


def _preflight(request: Request, *, to_train: bool = False) -> tuple[list[Finding], list[TrialPlan]]:
    """Generates data where asked for, starts or joins Ray, and checks; returns findings and final plans.

    Where something is wrong already, Ray is not started and the rehearsal not waited for.
    """
    from orchestrator.preflight.local import joins_cluster, preflight
    from orchestrator.preflight.rehearsal import Rehearsal
    from orchestrator.preflight.tracking import check_earlier_tracking

    experiment = request.experiment
    try:
        plans = _plans(request, Hardware.local())
    except SpecError:
        if not has_errors(check_settings(experiment)):
            raise
        plans = []  # the reason is among the findings
    if experiment.data.generated is not None:
        from orchestrator.data.generate import generate

        generate(generated_root(experiment), **experiment.data.generated.model_dump())
    with Rehearsal(plans, elsewhere=joins_cluster(experiment)) as rehearsal:
        checks = {"verify_images": request.verify_images, "strict": request.strict}
        findings = preflight(experiment, plans, **checks, rehearsal=rehearsal)
        if request.earlier:
            findings = sort_findings([*findings, *check_earlier_tracking(experiment, request.run_dir)])
        if not has_errors(findings):
            plans, more = _check_cluster(request, to_train=to_train)
            findings = sort_findings([*findings, *more, *rehearsal.findings()])
    print_findings(findings)
    return findings, plans


def _check_cluster(request: Request, *, to_train: bool) -> tuple[list[TrialPlan], list[Finding]]:
    """Starts or joins Ray and checks the cluster; returns the final plans and the findings."""
    from orchestrator.execution.cluster import start_ray
    from orchestrator.preflight.cluster import preflight_cluster

    if to_train:
        _import_in_background("orchestrator.execution.workers")  # seconds, while Ray's daemons start
    resources = request.experiment.resources
    cluster = start_ray(resources.address, resources.network_interface, dashboard=resources.dashboard)
    if cluster.dashboard and not request.quiet:
        request.console.print(f"Ray's dashboard: {cluster.dashboard}", soft_wrap=True, highlight=False)
    plans = _plans(request, cluster.hardware)
    return plans, preflight_cluster(request.experiment, plans)


def _execute(request: Request, plans: list[TrialPlan]) -> int:
    """Runs the trials one after the other until a signal comes, and publishes what they measured."""
    from orchestrator.execution.event_pump import EventPump
    from orchestrator.execution.stop import StopRequest, grace_seconds
    from orchestrator.execution.trial import run_trial
    from orchestrator.publish import Publication
    from orchestrator.report.progress import ProgressDisplay
    from orchestrator.runlog.outbox import FILE_NAME, Outbox
    from orchestrator.tracking.driver import Tracker, tracking_uri
    from trainers.contract.events import TrialStarted

    earlier = request.earlier
    tracker = Tracker(request.run_dir, tracking_uri(request.experiment.tracking.uri))
    display = ProgressDisplay(request.console, request.quiet)
    stop = StopRequest(grace_seconds(), display.stopping)
    stop.install()
    pump = EventPump(Outbox(request.run_dir / FILE_NAME), [display, tracker, _load_report])
    publication = Publication(request.experiment, request.run_dir, tracker, earlier)
    started = publication.run_started()
    pump.emit(started)
    statuses: set[Status] = set()
    for plan in _final_plans(request, plans, started.run_id):
        finished = earlier is not None and plan.name in earlier.finished
        if stop.requested and not finished:
            break
        if not finished:
            if earlier and plan.name in earlier.plans:
                display(TrialStarted(trial=plan.name, attempt=0, rank=-1, time=0.0, plan=dataclasses.asdict(plan)))
            ended = run_trial(plan, request.experiment.faults, pump, str(request.run_dir / "ray"), stop)
            statuses.add(ended.status)
        publication.add_trial(plan, pump.events)
    display.close()
    pump.close()
    status: Status = "KILLED" if stop.requested else "FAILED" if "FAILED" in statuses else "FINISHED"
    with ThreadPoolExecutor(1) as background:
        background.submit(_leave_ray)  # waits for Ray's processes to end
        tracked = publication.finish(status, pump.emit, request.console, stop.seconds_left)
    request.print_json(publication.to_json())
    if not tracked:
        publication.show_untracked(request.console)
    return exit_code(status, tracked=tracked or request.experiment.tracking.offline)


def exit_code(status: Status, *, tracked: bool) -> int:
    """The exit code of a run that ended so; `tracked` is whether MLflow has all that it is to have now."""
    return NOT_TRACKED if status == "FINISHED" and not tracked else EXIT_CODES[status]


def _final_plans(request: Request, plans: list[TrialPlan], run_id: str) -> list[TrialPlan]:
    """The plans as the trials were begun with, or begin with now."""
    begun = request.earlier.plans if request.earlier else {}
    if request.experiment.storage.checkpoints:
        # Storage that outlives run folders: a later run of the same name must not find these checkpoints.
        plans = [dataclasses.replace(each, checkpoint_dir=under(each.checkpoint_dir, run_id[-12:])) for each in plans]
    return [begun.get(plan.name, plan) for plan in plans]


def _load_report(event: Event) -> None:
    """Imports what draws the report while a worker loads detectron2: the driver has nothing else to do then."""
    if event.kind == "worker_started" and event.rank == 0:
        _import_in_background("orchestrator.report.page")


def _import_in_background(module: str) -> None:
    threading.Thread(target=importlib.import_module, args=[module], daemon=True).start()


def _leave_ray() -> None:
    from orchestrator.execution.cluster import shutdown

    shutdown()


def _read_earlier(folder: Path, *, alone: bool) -> EarlierRun:
    """Reads the folder of a run to go on with, and goes where its command was given: it may hold relative paths."""
    from orchestrator.runlog.folder import enter_working_directory, read_earlier_run

    if not alone:
        raise SpecError("--resume goes on with the run as it was; give no experiment file, --set or --output")
    earlier = read_earlier_run(folder)
    enter_working_directory(earlier)
    return earlier


def _plans(request: Request, hardware: Hardware) -> list[TrialPlan]:
    return expand(request.experiment, hardware, str(request.run_dir), generated_root(request.experiment))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    app()
