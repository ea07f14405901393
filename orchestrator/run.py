"""The command: `python -m orchestrator.run [CONFIG]`. Loads, checks, launches, reports; does no arithmetic.

Exit codes: 0 done, 1 training failed, 2 the input or the environment is not fit, 130 interrupted.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import importlib
import json
import logging
import os
import shlex
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from orchestrator.experiment.plan import Hardware, expand, generated_root, under
from orchestrator.experiment.reading import load_experiment
from orchestrator.experiment.spec import DEFAULT_CONFIG, Experiment, SpecError
from orchestrator.files import without_credentials

if TYPE_CHECKING:
    from orchestrator.execution.event_pump import EventPump
    from orchestrator.figures.records import ExperimentResult
    from orchestrator.runlog.resume import EarlierRun
    from trainers.contract.events import Event
    from trainers.contract.plan import TrialPlan

DONE, FAILED, UNFIT, INTERRUPTED = 0, 1, 2, 130
EXIT_CODES = {"FINISHED": DONE, "FAILED": FAILED, "KILLED": INTERRUPTED}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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
    quiet: Annotated[bool, typer.Option("--quiet", help="Show failures and the closing table only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; the rest goes to stderr.")] = False,
) -> None:
    """Run an experiment: every trial of an experiment file, tracked in MLflow, ending in a table and a report."""
    console = Console(stderr=as_json)
    # A thread that outlives its cluster must not join another one by itself, as Ray does by default.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        if replay_outbox is not None:
            console.print(_track(replay_outbox), soft_wrap=True)
            raise typer.Exit(DONE)
        earlier = None
        if resume is not None:
            from orchestrator.runlog.resume import enter_working_directory, read_run

            if assignments or output or config != DEFAULT_CONFIG:
                raise SpecError("--resume goes on with the run as it was; give no experiment file, --set or --output")
            earlier = read_run(resume)
            enter_working_directory(earlier)
        experiment = earlier.experiment if earlier else load_experiment(config, assignments)
        output = earlier.run_dir if earlier else output
        if dry_run:
            raise typer.Exit(_show_plan(experiment, output, console, as_json))
        session = Session(
            experiment, output, console, quiet=quiet, as_json=as_json, verify_images=verify_images, earlier=earlier
        )
        raise typer.Exit(session.check() if preflight else session.run())
    except SpecError as error:
        Console(stderr=True).print(f"[bold red]error[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(UNFIT) from None


def _track(folder: Path) -> str:
    """Tracks in MLflow whatever of a run is not there yet; returns what was done, for a person.

    Raises:
        SpecError: There is no run in the folder, it is still being run, or MLflow does not take it.
    """
    from orchestrator.runlog.resume import enter_working_directory, only_driver, read_run
    from orchestrator.tracking.driver import Tracker, tracking_uri

    run = read_run(folder)
    enter_working_directory(run)
    with only_driver(run.run_dir):
        uri = tracking_uri(run.experiment.tracking.uri)
        tracker = Tracker(run.run_dir, uri)
        try:
            tracker.sync()
        except Exception as error:  # whatever MLflow or its store raises
            raise SpecError(f"MLflow at {without_credentials(uri)} does not take it: {error}") from error
        done = f"MLflow at {without_credentials(uri)} has all of {run.run_dir} (run {tracker.run_ids()['']})."
        return done if run.ended else f"{done} It was not ended: `--resume {run.run_dir}` goes on with it."


def _show_plan(experiment: Experiment, output: Path | None, console: Console, as_json: bool) -> int:
    from orchestrator.report.progress import plan_table

    run_dir = _run_dir(experiment, output)
    plans = expand(experiment, Hardware.local(), str(run_dir), generated_root(experiment))
    if as_json:
        print(json.dumps([dataclasses.asdict(plan) for plan in plans], indent=2))
        return DONE
    console.print(plan_table(plans))
    place = f"Results in {run_dir}, tracked in {_tracking_place(experiment)} as {experiment.name!r}."
    console.print(place, soft_wrap=True, markup=False, highlight=False)
    return DONE


class Session:
    """One invocation: checks an experiment, runs its trials and leaves its results.

    Args:
        experiment: What is run.
        output: The run's folder; None for a new one named by the time.
        console: Where people read.
        quiet: Only failures and the closing table are shown.
        as_json: The result goes to stdout as JSON.
        verify_images: Preflight decodes every image.
        earlier: The run to go on with; None for a new one.
    """

    def __init__(
        self,
        experiment: Experiment,
        output: Path | None,
        console: Console,
        *,
        quiet: bool,
        as_json: bool,
        verify_images: bool,
        earlier: EarlierRun | None,
    ) -> None:
        self.experiment, self.console, self.earlier = experiment, console, earlier
        self.quiet, self.as_json, self.verify_images = quiet, as_json, verify_images
        self.run_dir = _run_dir(experiment, output)

    def check(self) -> int:
        """Preflight alone: all findings, exit code 2 on errors."""
        import ray

        from orchestrator.findings import to_json

        findings, _ = self._preflight()
        ray.shutdown()
        if self.as_json:
            print(to_json(findings))
        elif not findings:
            self.console.print("Everything that can be checked is fit.")
        return UNFIT if any(finding.level == "error" for finding in findings) else DONE

    def run(self) -> int:
        """Preflight, then every trial, then results and report; returns the exit code."""
        import ray

        from orchestrator.report.progress import plan_table
        from orchestrator.runlog.resume import only_driver

        if self.earlier is None and any((self.run_dir / name).exists() for name in ("results.json", "events.jsonl")):
            raise SpecError(f"--output {self.run_dir}: holds another run; name a new folder, or --resume it")
        if self.earlier is not None:
            with only_driver(self.run_dir):
                pass  # said before anything is checked or started
        findings, plans = self._preflight(to_train=True)
        if any(finding.level == "error" for finding in findings):
            if self.as_json:
                from orchestrator.findings import to_json

                print(to_json(findings))
            return UNFIT
        if not self.quiet:
            self.console.print(plan_table(plans))
        self.run_dir.mkdir(parents=True, exist_ok=True)
        atexit.register(gc.freeze)  # else Python looks through all that was imported before it ends: a second
        try:
            with only_driver(self.run_dir):
                return self._train(plans)
        finally:
            ray.shutdown()

    def _preflight(self, to_train: bool = False) -> tuple[list[Any], list[TrialPlan]]:
        """Generates data where asked for, starts or joins Ray, and checks; returns findings and final plans.

        Ray is not started where something is wrong already. What is needed only `to_train` is loaded meanwhile.
        """
        from orchestrator.findings import has_errors, print_findings, sort_findings
        from orchestrator.preflight.local import preflight

        data, root = self.experiment.data.generated, generated_root(self.experiment)
        plans = expand(self.experiment, Hardware.local(), str(self.run_dir), root)
        if data is not None:
            from orchestrator.data.generate import generate

            generate(root, **data.model_dump())
        findings = preflight(self.experiment, plans, verify_images=self.verify_images)
        if not has_errors(findings):
            from orchestrator.execution.cluster import start_ray
            from orchestrator.preflight.cluster import preflight_cluster

            if to_train:  # Ray Train takes seconds to import, Ray's daemons to start
                threading.Thread(
                    target=importlib.import_module, args=["orchestrator.execution.workers"], daemon=True
                ).start()
            gc.disable()  # looking for garbage would take a sixth of an import that leaves none
            try:
                hardware = start_ray(self.experiment.resources.address, self.experiment.resources.network_interface)
            finally:
                gc.enable()
            plans = expand(self.experiment, hardware, str(self.run_dir), root)
            findings = sort_findings([*findings, *preflight_cluster(self.experiment, plans)])
        print_findings(findings)
        return findings, plans

    def _train(self, plans: list[TrialPlan]) -> int:
        import ray

        from orchestrator.execution.event_pump import EventPump
        from orchestrator.execution.stop import StopRequest, grace_seconds
        from orchestrator.execution.trial import run_trial
        from orchestrator.experiment.environment import command_line, describe
        from orchestrator.figures.records import ExperimentResult
        from orchestrator.report.progress import ProgressDisplay
        from orchestrator.runlog.outbox import FILE_NAME, Outbox
        from orchestrator.runlog.resume import WORKING_DIRECTORY
        from orchestrator.tracking.driver import Tracker, tracking_uri
        from trainers.contract.events import RunStarted, TrialStarted

        earlier = self.earlier
        uri = tracking_uri(self.experiment.tracking.uri)
        result = ExperimentResult(
            experiment=self.experiment.name,
            description=self.experiment.description,
            status="RUNNING",
            started=_utc(earlier.started.time if earlier else time.time()),
            command=command_line(),
            environment=describe(command_line()),
            mlflow_tracking_uri=without_credentials(uri),
            reference_rows=self.experiment.reference_rows,
        )
        tracker = Tracker(self.run_dir, uri)
        display = ProgressDisplay(self.console, self.quiet)
        stop = StopRequest(grace_seconds(), display.stopping)
        stop.install()
        pump = EventPump(Outbox(self.run_dir / FILE_NAME), [display, tracker, _load_report])
        started = RunStarted(
            trial="",
            attempt=earlier.num_starts if earlier else 0,
            rank=-1,
            time=time.time(),
            experiment=earlier.started.experiment if earlier else self._published(),
            run_id=earlier.started.run_id if earlier else f"{self.experiment.name}/{uuid.uuid4().hex}",
            tags={f"run.{key}": value for key, value in result.environment.items()}
            | {WORKING_DIRECTORY: str(Path.cwd())},
        )
        pump.emit(started)
        gc.freeze()  # all so far stays; only what comes from here on is looked through
        ended = []
        for plan in plans:
            if earlier and plan.name in earlier.finished:
                self._record(result, earlier.plans[plan.name], pump, tracker.run_ids())
                continue
            if stop.requested:
                break
            if earlier and plan.name in earlier.plans:
                plan = earlier.plans[plan.name]
                display(TrialStarted(trial=plan.name, attempt=0, rank=-1, time=0.0, plan=dataclasses.asdict(plan)))
            elif self.experiment.storage.checkpoints:
                # Storage that outlives run folders: a later run of the same name must not find these checkpoints.
                plan = dataclasses.replace(plan, checkpoint_dir=under(plan.checkpoint_dir, started.run_id[-12:]))
            ended.append(run_trial(plan, self.experiment.faults, pump, str(self.run_dir / "ray"), stop))
            self._record(result, plan, pump, tracker.run_ids())
        display.close()
        statuses = {event.status for event in ended}
        result.status = "KILLED" if stop.requested else "FAILED" if "FAILED" in statuses else "FINISHED"
        pump.close()
        with ThreadPoolExecutor(1) as beside:
            beside.submit(ray.shutdown)  # which waits for its processes
            self._finish(result, pump, tracker)
        return EXIT_CODES[result.status]

    def _published(self) -> dict[str, Any]:
        """The experiment's values as they are kept and tracked: a password in the tracking address stays out."""
        values = self.experiment.model_dump(mode="json")
        if values["tracking"]["uri"]:
            values["tracking"]["uri"] = without_credentials(values["tracking"]["uri"])
        return values

    def _record(self, result: ExperimentResult, plan: TrialPlan, pump: EventPump, run_ids: dict[str, str]) -> None:
        """Adds an ended trial to results.json: what is measured is kept whatever comes after."""
        from orchestrator.figures.scaling import repeat_rows, scaling_fits, scaling_rows
        from orchestrator.figures.trial import trial_result
        from orchestrator.report.airank import write_airank
        from orchestrator.report.mlperf import write_mllog

        events = [event for event in pump.events if event.trial == plan.name]
        trial = trial_result(plan, events, run_ids.get(plan.name))
        write_airank(plan, events, trial, Path(plan.trial_dir))
        write_mllog(plan, events, trial, Path(plan.trial_dir))
        result.trials.append(trial)
        result.scaling = scaling_rows(result.trials)
        result.fits = scaling_fits(result.trials)
        result.repeats = repeat_rows(result.trials)
        result.write(self.run_dir / "results.json")

    def _finish(self, result: ExperimentResult, pump: EventPump, tracker: Any) -> None:
        """Writes results and report, ends tracking, and shows the table and where everything is."""
        from orchestrator.report.airank import write_airank_summary
        from orchestrator.report.mlflow_links import mlflow_base, table_address
        from orchestrator.report.table import closing_table
        from orchestrator.report.writer import try_report
        from trainers.contract.events import RunEnded

        result.ended = _utc(time.time())
        result.mlflow_run_id = tracker.run_ids().get("")
        result.write(self.run_dir / "results.json")
        report, report_failure = try_report(result, self.run_dir)
        write_airank_summary(result, self.run_dir)
        status: Literal["FINISHED", "FAILED", "KILLED"] = result.status if result.status != "RUNNING" else "FAILED"
        pump.emit(RunEnded(trial="", attempt=0, rank=-1, time=time.time(), status=status))
        tracked = tracker.finish(timeout=30)
        # Runs that MLflow learnt of only now: their ids belong into the results as well.
        ids = tracker.run_ids()
        result.mlflow_run_id = ids.get("")
        for trial in result.trials:
            trial.mlflow_run_id = ids.get(trial.name)
        result.write(self.run_dir / "results.json")
        if self.as_json:
            sys.stdout.write(result.model_dump_json(indent=2) + "\n")
        self.console.print()
        self.console.print(closing_table(result))
        say = partial(self.console.print, soft_wrap=True, markup=False, highlight=False)
        say(f"Report: {report}")
        if report_failure:
            say(report_failure, style="red")
        if tracked:
            table = table_address(mlflow_base(result), str(tracker.experiment_id()))
            served = "" if (result.mlflow_tracking_uri or "").startswith("http") else "`make ui`, then "
            say(f"MLflow: {served}{table}")
        else:
            say(f"MLflow has not taken everything; {self.run_dir}/events.jsonl keeps it.", style="yellow")
        if result.status == "KILLED":
            say(
                f"Stopped. {self.run_dir} keeps results, events and checkpoints; go on with: "
                f"python -m orchestrator.run --resume {shlex.quote(str(self.run_dir))}",
                style="yellow",
            )


def _load_report(event: Event) -> None:
    """Loads what draws the report while a worker loads detectron2: the driver has nothing else to do then."""
    if event.kind == "worker_started" and event.rank == 0:
        threading.Thread(target=importlib.import_module, args=["orchestrator.report.page"], daemon=True).start()


def _run_dir(experiment: Experiment, output: Path | None) -> Path:
    if output is not None:
        return output.expanduser().absolute()
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    return (Path(experiment.storage.path).expanduser() / experiment.name / stamp).absolute()


def _tracking_place(experiment: Experiment) -> str:
    return experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def _utc(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    app()
