"""Drives a run: preflight, then every trial, then results and report; or preflight alone."""

from __future__ import annotations

import dataclasses
import importlib
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from orchestrator.execution.stop import INTERRUPTED
from orchestrator.experiment.plan import Hardware, draw_data, expand, generated_root
from orchestrator.experiment.spec import Experiment, SpecError
from orchestrator.findings import Finding, has_errors, print_findings, sort_findings, to_json
from orchestrator.preflight.settings import check_settings
from orchestrator.report.plan_table import plan_table, side_by_side_note
from orchestrator.runlog.plans import final_plans

if TYPE_CHECKING:
    from orchestrator.execution.cluster import Cluster
    from orchestrator.execution.event_log import EventLog
    from orchestrator.execution.stop import StopRequest
    from orchestrator.publish import Publication, Status
    from orchestrator.runlog.folder import EarlierRun
    from trainers.contract.events import Event, TrialEnded
    from trainers.contract.plan import TrialPlan

Datasets = dict[str, dict[str, Any]]
"""Fingerprints of `train` and `val` (`RunStarted.datasets`)."""

DONE, FAILED, UNFIT, NOT_TRACKED = 0, 1, 2, 3
EXIT_CODES: dict[Status, int] = {"FINISHED": DONE, "FAILED": FAILED, "KILLED": INTERRUPTED}


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
    rehearsed: bool = False
    """Model and weights have been tried by this command: it goes on with a run by itself."""

    def print_json(self, document: str) -> None:
        """Prints a document where one is asked for."""
        if self.json_output:
            Console(file=self.json_output).out(document, highlight=False)


def check(request: Request) -> int:
    """Preflight alone: all findings, exit code 2 on errors."""
    findings, _, _ = _preflight(request)
    _leave_ray()
    request.print_json(to_json(findings))
    if not request.json_output and not findings:
        request.console.print("Everything that can be checked is fit.")
    return UNFIT if has_errors(findings) else DONE


def run(request: Request, working: Callable[..., None]) -> int:
    """Preflight, then every trial, then results and report.

    Args:
        request: What was asked for.
        working: Called once a signal no longer cuts this off, but asks for an end; with what names a lost daemon.

    Returns:
        The exit code.

    Raises:
        ClusterLostError: The local Ray cluster is gone; `close` does what is left to do, in another process.
    """
    from orchestrator.runlog.folder import check_unused
    from orchestrator.runlog.lock import only_driver

    with only_driver(request.run_dir) if request.earlier else nullcontext():
        check_unused(request.run_dir, request.earlier)  # refused before anything is checked or started
    findings, plans, datasets = _preflight(request, to_train=True)
    if has_errors(findings):
        request.print_json(to_json(findings))
        return UNFIT
    if not request.quiet:
        request.console.print(plan_table(plans, _side_by_side(request, plans)))
    request.run_dir.mkdir(parents=True, exist_ok=True)
    with only_driver(request.run_dir, os.getppid()):
        check_unused(request.run_dir, request.earlier)  # others may have used it meanwhile
        return _execute(request, plans, datasets, working)


def _side_by_side(request: Request, plans: list[TrialPlan]) -> str:
    """How many trials are run at a time on the cluster, in a line."""
    from orchestrator.execution.nodes import list_nodes

    excluded = plans[0].excluded_hosts
    hosts = {node.id: (node.num_gpus, node.num_cpus) for node in list_nodes() if node.address not in excluded}
    return side_by_side_note(plans, request.experiment.trials.concurrent, hosts)


def close(request: Request, status: Status, reason: str) -> int:
    """Publishes the results of a run whose process was lost; returns the exit code.

    Args:
        request: What was asked for.
        status: How the run ended.
        reason: Why.
    """
    from orchestrator.closing import close_run

    request.console.show_cursor()  # a progress bar hides it
    publication, tracked = close_run(request.experiment, request.run_dir, status, reason, request.console)
    if tracked is None:
        request.print_json(publication.to_json())
        return FAILED
    return _conclude(request, publication, publication.status, tracked=tracked)


def _preflight(request: Request, *, to_train: bool = False) -> tuple[list[Finding], list[TrialPlan], Datasets]:
    """Generates data where asked for, starts or joins Ray, and checks; returns findings, final plans and data sets.

    Where something is wrong already, Ray is not started and the rehearsal not waited for. A cluster that decides what
    the trials run on is joined before: they are planned, and checked, for its devices.
    """
    from orchestrator.preflight.earlier import check_earlier_data
    from orchestrator.preflight.local import joins_cluster, preflight
    from orchestrator.preflight.ray_setup import check_ray
    from orchestrator.preflight.rehearsal import Rehearsal
    from orchestrator.preflight.tracking import check_earlier_tracking

    experiment, cluster = request.experiment, None
    is_left_to_cluster = joins_cluster(experiment) and experiment.resources.device == "auto"

    def is_unfit() -> bool:
        return has_errors([*check_settings(experiment), *(check_ray(experiment) if is_left_to_cluster else ())])

    try:
        if is_left_to_cluster and not is_unfit():
            cluster = _start_ray(request, to_train=to_train)
        plans = plan_trials(request, cluster.hardware if cluster else Hardware.local())
    except SpecError:
        if cluster or not is_unfit():
            raise
        plans = []  # the reason is among the findings
    draw_data(experiment)
    datasets: Datasets = {}
    rehearses = nullcontext() if request.rehearsed else Rehearsal(plans, elsewhere=joins_cluster(experiment))
    with rehearses as rehearsal:
        checks = {"verify_images": request.verify_images, "strict": request.strict, "resumes": bool(request.earlier)}
        findings = preflight(experiment, plans, **checks, rehearsal=rehearsal, datasets=datasets)
        if request.earlier:
            findings += check_earlier_tracking(experiment, request.run_dir)
            findings = sort_findings([*findings, *check_earlier_data(request.earlier, plans, datasets)])
        if not has_errors(findings):
            plans, more = _check_cluster(request, cluster or _start_ray(request, to_train=to_train))
            findings = sort_findings([*findings, *more, *(rehearsal.findings() if rehearsal else ())])
    print_findings(findings)
    return findings, plans, datasets


def _start_ray(request: Request, *, to_train: bool) -> Cluster:
    """Starts or joins Ray."""
    from orchestrator.execution.cluster import start_ray

    # Both import torch: seconds, while Ray's daemons start.
    _import_in_background("orchestrator.preflight.cluster", *["orchestrator.execution.workers"] * to_train)
    resources = request.experiment.resources
    cluster = start_ray(resources.address, resources.network_interface, dashboard=resources.dashboard)
    if cluster.dashboard and not request.quiet:
        request.console.print(f"Ray's dashboard: {cluster.dashboard}", soft_wrap=True, highlight=False)
    return cluster


def _check_cluster(request: Request, cluster: Cluster) -> tuple[list[TrialPlan], list[Finding]]:
    """Checks the cluster; returns the final plans and the findings."""
    plans = plan_trials(request, cluster.hardware)
    from orchestrator.preflight.cluster import preflight_cluster  # not before Ray starts: it waits for torch

    excluded: set[str] = set()
    findings = preflight_cluster(request.experiment, plans, excluded)
    return [dataclasses.replace(plan, excluded_hosts=tuple(sorted(excluded))) for plan in plans], findings


def _execute(request: Request, plans: list[TrialPlan], datasets: Datasets, working: Callable[..., None]) -> int:
    """Runs the trials until a signal comes, and publishes what they measured."""
    from orchestrator.execution.cluster import lost_daemon
    from orchestrator.execution.event_log import EventLog
    from orchestrator.execution.gauges import Gauges
    from orchestrator.execution.stop import StopRequest, grace_seconds
    from orchestrator.publish import Publication
    from orchestrator.report.progress import ProgressDisplay
    from orchestrator.runlog.outbox import FILE_NAME, Outbox, RunFolderError
    from orchestrator.tracking.driver import Tracker, tracking_uri

    earlier = request.earlier
    tracker = Tracker(request.run_dir, tracking_uri(request.experiment.tracking.uri))
    left = [plan for plan in plans if earlier is None or plan.name not in earlier.finished]
    display = ProgressDisplay(request.console, request.quiet, left)
    stop = StopRequest(grace_seconds(), display.stopping)
    stop.install()
    working(lost_daemon)
    outbox = Outbox(request.run_dir / FILE_NAME)
    log = EventLog(outbox, [display, tracker, _load_report])
    publication = Publication(request.experiment, request.run_dir, tracker, earlier, outbox)
    try:
        log.emit(publication.run_started(datasets), *publication.damage())
        with Gauges(log.events):
            status = _run_trials(request, plans, log, publication, stop)
        display.close()
        # Waits for Ray's processes to end; a cluster that is lost meanwhile is not waited for.
        threading.Thread(target=_leave_ray, daemon=True).start()
        tracked = publication.finish(status, log.emit, request.console, stop.seconds_left)
    except RunFolderError as error:
        display.close()
        publication.give_up(error, request.console)
        request.print_json(publication.to_json())
        return FAILED
    code = _conclude(request, publication, status, tracked=tracked)
    return INTERRUPTED if stop.requested else code


def _run_trials(
    request: Request, plans: list[TrialPlan], log: EventLog, publication: Publication, stop: StopRequest
) -> Status:
    """Runs the trials that have not finished, and publishes each; returns how the run ended."""
    from orchestrator.execution.nodes import fits_next_to
    from orchestrator.execution.side_by_side import Calls, TrialRunner, run_side_by_side
    from trainers.contract.events import RunStarted

    earlier, concurrent = request.earlier, request.experiment.trials.concurrent
    started = next(event for event in log.events if isinstance(event, RunStarted))
    plans = plans if earlier else final_plans(request.experiment, plans, started.run_id)
    runner = TrialRunner(log, request.experiment.faults, str(request.run_dir / "ray"), stop)

    def ended(plan: TrialPlan, _event: TrialEnded) -> None:
        publication.add_trial(plan, log.events)

    finished = [plan for plan in plans if earlier and plan.name in earlier.finished]
    for plan in finished:
        publication.add_trial(plan, log.events)
    left = [plan for plan in plans if plan not in finished]
    most = len(left) if concurrent == "auto" else concurrent
    run_side_by_side(left, most, Calls(runner.run, fits_next_to, ended, log.give_up), stop)
    runner.close()
    return "KILLED" if stop.requested else "FAILED" if publication.has_failed_trials else "FINISHED"


def _conclude(request: Request, publication: Publication, status: Status, *, tracked: bool) -> int:
    """The last of what is printed, and the exit code."""
    request.print_json(publication.to_json())
    if not tracked:
        publication.show_untracked(request.console)
    return exit_code(status, tracked=tracked or request.experiment.tracking.offline)


def exit_code(status: Status, *, tracked: bool) -> int:
    """The exit code of a run that ended so; `tracked` is whether MLflow has all that it is to have now."""
    return NOT_TRACKED if status == "FINISHED" and not tracked else EXIT_CODES[status]


def _load_report(event: Event) -> None:
    """Imports what draws the report while a worker loads detectron2: the driver has nothing else to do then."""
    if event.kind == "worker_started" and event.rank == 0:
        _import_in_background("orchestrator.report.page")


def _import_in_background(*modules: str) -> None:
    threading.Thread(target=lambda: [importlib.import_module(each) for each in modules], daemon=True).start()


def _leave_ray() -> None:
    from orchestrator.execution.cluster import shutdown

    shutdown()


def plan_trials(request: Request, hardware: Hardware) -> list[TrialPlan]:
    """The plans of all trials, on so much hardware; of a run that is gone on with, as they were begun."""
    experiment, earlier = request.experiment, request.earlier
    where = hardware, str(request.run_dir), generated_root(experiment)
    if earlier is None:
        return expand(experiment, *where)
    # Trials are named after their device: on another one they would begin again, under other names.
    plans = expand(experiment, *where, next(iter(earlier.devices), None))
    for other in earlier.devices[1:]:
        plans += [plan for plan in expand(experiment, *where, other) if plan.name in earlier.plans]
    return final_plans(experiment, plans, earlier.started.run_id, earlier)
