"""The command: `python -m orchestrator.run [CONFIG]` loads an experiment, checks it, executes it and publishes results.

Exit codes: 0 done, 1 training failed, 2 the input or the environment is not fit, 3 trained and not tracked,
130 interrupted.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from orchestrator.execution.stop import INTERRUPTED, handle_stop_signals

if __name__ == "__main__":  # what follows takes a second
    handle_stop_signals(lambda *_: os._exit(INTERRUPTED))

import typer
from rich.console import Console
from rich.markup import escape

from orchestrator import drive
from orchestrator.drive import DONE, FAILED, UNFIT, Request
from orchestrator.dry_run import show_plan
from orchestrator.execution.supervisor import Supervisor
from orchestrator.experiment.environment import cluster_address
from orchestrator.experiment.plan import Hardware
from orchestrator.experiment.reading import load_experiment
from orchestrator.experiment.references import with_references
from orchestrator.experiment.run_dir import begin_run_dir, new_run_dir
from orchestrator.experiment.spec import DEFAULT_CONFIG, SpecError
from orchestrator.process import drop_unread_output, prepare_process

if TYPE_CHECKING:
    from orchestrator.experiment.prediction_file import Prediction
    from orchestrator.experiment.spec import Experiment
    from orchestrator.runlog.folder import EarlierRun

AUTO = Path("auto")
"""Value of `--resume` for the run in `--output`; a folder of this name is `./auto`."""

RETRY_INTERVAL_SECONDS = 2.0
"""Pause before a run whose process was lost is gone on with, if that did not help the time before."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="The experiment file.")] = DEFAULT_CONFIG,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a field, e.g. trials.world_sizes=[1,8]. Repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results.json and all else; default: runs/EXPERIMENT/UTC-TIME.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_FOLDER|auto",
            help="Go on with an interrupted run: its folder. Finished trials are kept. auto: go on with the one in "
            "--output, or begin it; for jobs that are started again by themselves.",
        ),
    ] = None,
    replay_outbox: Annotated[
        Path | None, typer.Option(help="Track a run's folder in MLflow after the fact, and stop.")
    ] = None,
    predict: Annotated[
        str | None,
        typer.Option(
            metavar="WORKERS",
            help="Predict throughput, time and cost for these numbers of workers, e.g. 64,128, from "
            "a short run on few.",
        ),
    ] = None,
    calibrate: Annotated[
        str | None, typer.Option(metavar="WORKERS", help="Sizes of that run; default: 1, 2 and 8 as there is room.")
    ] = None,
    auto_resume: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Go on by itself when Ray or the driving process is lost, up to N times in a row "
            "without a new checkpoint.",
        ),
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan of every trial and stop.")] = False,
    preflight: Annotated[bool, typer.Option("--preflight", help="Check everything and stop.")] = False,
    verify_images: Annotated[bool, typer.Option("--verify-images", help="Decode every image while checking.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Treat every warning about the data as an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show failures and the closing table only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; the rest goes to stderr.")] = False,
) -> None:
    """Run an experiment: every trial of an experiment file, tracked in MLflow, ending in a table and a report."""
    supervisor = Supervisor()
    prepare_process()
    console = Console(stderr=as_json, emoji=False)
    asked: Prediction | None = None
    # A thread that outlives its cluster must not join another one, as Ray does by default.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        _refuse_without_effect(context)
        if replay_outbox is not None:
            from orchestrator.publish import track_folder

            console.print(track_folder(replay_outbox, assignments or []), soft_wrap=True)
            raise typer.Exit(DONE)
        if resume is not None and resume != AUTO:
            others = _given(context, only=("config", "output", "predict", "calibrate"))
            earlier: EarlierRun | None = _read_earlier(resume, assignments or [], alone=not others)
        else:
            given = with_references(load_experiment(config, assignments))
            if predict is not None or calibrate is not None:
                given, asked = _calibration(given, predict, calibrate)
            earlier = _read_begun_job(output, given, console) if resume == AUTO else None
        experiment = earlier.experiment if earlier else given
        folder = _folder(experiment, output, earlier, begins=not (dry_run or preflight))
        document = sys.stdout if as_json else None
        # Ray prints what its daemons report to stdout, which is to hold one JSON document.
        with redirect_stdout(sys.stderr) if as_json else nullcontext(), folder as run_dir:
            request = Request(experiment, run_dir, earlier, console, quiet, document, verify_images, strict)
            if dry_run or preflight:
                from orchestrator.runlog.folder import check_unused

                check_unused(run_dir, earlier)
            if dry_run:
                raise typer.Exit(show_plan(request, asked))
            if preflight:
                raise typer.Exit(_check(request, supervisor))
            raise typer.Exit(_run(request, supervisor, auto_resume, asked))
    except SpecError as error:
        raise typer.Exit(_report(error)) from None


def _refuse_without_effect(context: typer.Context) -> None:
    """Refuses options that would have no effect next to others."""
    others = _given(context, but=("replay_outbox", "assignments"))
    if context.params["replay_outbox"] is not None and others:
        raise SpecError(f"--replay-outbox goes with --set tracking.uri=ADDRESS alone, not with {others}")
    if context.params["dry_run"] and context.params["preflight"]:
        raise SpecError("--dry-run checks nothing, --preflight everything: give one of them")


def _given(context: typer.Context, *, but: Sequence[str] = (), only: Sequence[str] | None = None) -> str:
    """Names of the options and arguments that the command line has, all `but` some or `only` some of them."""
    names = [
        parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.opts[0].upper()
        for parameter in context.command.params
        if (source := context.get_parameter_source(str(parameter.name))) and source.name == "COMMANDLINE"
        if parameter.name not in but and (only is None or parameter.name in only)
    ]
    return ", ".join(names)


def _folder(
    experiment: Experiment, output: Path | None, earlier: EarlierRun | None, *, begins: bool
) -> AbstractContextManager[Path]:
    """The folder of the run; a new one is made where the run `begins` now."""
    if earlier:
        return nullcontext(earlier.run_dir)
    return begin_run_dir(experiment, output) if begins else nullcontext(new_run_dir(experiment, output))


def _check(request: Request, supervisor: Supervisor) -> int:
    """Preflight alone, in a child process."""
    ending = supervisor.run(partial(_without_traceback, drive.check, request))
    return _give_up(request, None, ending.reason, stopped=supervisor.stopped) if ending.code is None else ending.code


def _calibration(experiment: Experiment, predict: str | None, calibrate: str | None) -> tuple[Experiment, Prediction]:
    """The short experiment that a prediction is made from, and what it is to predict."""
    from orchestrator.prediction.asking import ask, calibration, parse_sizes

    if predict is None:
        raise SpecError(f"--calibrate {calibrate}: it has no effect without --predict")
    asked = ask(experiment, parse_sizes(predict, "--predict"))
    given = parse_sizes(calibrate, "--calibrate") if calibrate is not None else None
    # How much room a cluster has is known once it is joined; preflight then says if it is too little.
    hardware = None if cluster_address(experiment.resources.address) else Hardware.local()
    return calibration(experiment, asked, given, hardware), asked


def _run(request: Request, supervisor: Supervisor, auto_resume: int, asked: Prediction | None) -> int:
    """Drives the run in a child process; where that is lost, goes on with the run or publishes what there is."""
    from orchestrator.runlog.folder import count_progress

    drop_unread_output(sys.stdout, sys.stderr)  # not a document for `--json`: for that, stdout is stderr here

    def working(lost_daemon: Callable[[], str | None] = lambda: None) -> None:
        if asked and not request.earlier:
            from orchestrator.prediction.predict import keep

            try:
                keep(asked, request.run_dir)
            except OSError as error:
                raise SpecError(f"{request.run_dir}: it cannot be written to: {error}") from error
        supervisor.working(lost_daemon)

    began, tries, progress = False, 0, (count_progress(request.run_dir) if request.earlier else 0) or 0
    first_start = request.earlier.num_starts if request.earlier else 0
    while True:
        ending = supervisor.run(partial(_without_traceback, drive.run, request, working))
        if ending.code is not None and not (tries and ending.code == UNFIT):
            return INTERRUPTED if supervisor.stopped else ending.code
        began |= ending.worked
        earlier = _read_begun(request) if began else None
        before, found = progress, count_progress(request.run_dir)
        progress = found or 0
        tries = 1 if progress > before else tries + 1
        reason = ending.reason or "the run could not be started again"
        gives_up = supervisor.stopped or tries > auto_resume or (earlier is not None and earlier.ended)
        if not gives_up:
            text = f"{reason}; going on by itself (start {tries} of {auto_resume} without a new checkpoint)"
            request.console.print(text, style="yellow", soft_wrap=True, markup=False, highlight=False)
            time.sleep(RETRY_INTERVAL_SECONDS if tries > 1 else 0)
        if gives_up:
            code = _give_up(request, earlier, reason, stopped=supervisor.stopped, unreadable=began and found is None)
            return INTERRUPTED if supervisor.stopped else code
        earlier = earlier.keep_failures(first_start) if earlier else request.earlier
        request = dataclasses.replace(request, earlier=earlier, rehearsed=began)


def _give_up(
    request: Request, earlier: EarlierRun | None, reason: str, *, stopped: bool, unreadable: bool = False
) -> int:
    """Ends a run whose process was lost or cut off; returns the exit code."""
    if earlier is not None:
        code = drive.close(request, *(("KILLED", "stopped by the user") if stopped else ("FAILED", reason)))
        return INTERRUPTED if stopped else code
    text = "stopped before training began" if stopped else f"{reason}, before training began"
    if unreadable:
        text = f"{'stopped' if stopped else reason}; {request.run_dir} is gone or cannot be read"
    Console(stderr=True, emoji=False).print(text, soft_wrap=True, markup=False, highlight=False)
    return INTERRUPTED if stopped else FAILED


def _read_begun(request: Request) -> EarlierRun | None:
    """The run in the folder; None where its start was not recorded, so that it is as it was before."""
    from orchestrator.runlog.folder import read_earlier_run

    try:
        found = read_earlier_run(request.run_dir)
    except SpecError:
        return None
    is_new = request.earlier is None or found.num_starts > request.earlier.num_starts
    return found if is_new or not found.ended else None


def _without_traceback(work: Callable[..., int], *arguments: object) -> int:
    try:
        return work(*arguments)
    except SpecError as error:
        return _report(error)


def _report(error: SpecError) -> int:
    Console(stderr=True, emoji=False).print(f"[bold red]error[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return UNFIT


def _read_earlier(folder: Path, assignments: list[str], *, alone: bool) -> EarlierRun:
    """Reads the folder of a run to go on with, and goes where its command was given: it may hold relative paths."""
    from orchestrator.runlog.folder import enter_working_directory, read_earlier_run

    if not alone:
        raise SpecError("--resume goes on with the run as it was; give no experiment file, --output or --predict")
    earlier = read_earlier_run(folder, assignments)
    enter_working_directory(earlier)
    return earlier


def _read_begun_job(output: Path | None, experiment: Experiment, console: Console) -> EarlierRun | None:
    """The run in `--output`, to go on with; None where it begins now. Ends the command where it failed by itself."""
    from orchestrator.runlog.folder import enter_working_directory, read_begun_run

    if output is None:
        raise SpecError("--resume auto: give --output FOLDER, the same at every start of the job")
    earlier = read_begun_run(output, experiment)
    if earlier is None:
        return None
    if earlier.failed:
        text = f"{earlier.run_dir}: the run failed ({earlier.failed}) and would again; --resume FOLDER tries it anyway"
        console.print(text, style="red", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(FAILED)
    enter_working_directory(earlier)
    return earlier


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    app()
