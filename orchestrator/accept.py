"""The command `python -m orchestrator.accept [CONFIG]`: measures a cluster before it is paid for, and names slow nodes.

Exit codes: 0 all nodes and links are as good as their peers, 1 one falls behind or is faulty, 2 one cannot be measured
or the input is not fit, 3 all are good and MLflow did not take the result, 130 interrupted.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console
from rich.markup import escape

from orchestrator.drive import NOT_TRACKED, UNFIT
from orchestrator.execution.stop import INTERRUPTED, handle_stop_signals
from orchestrator.execution.supervisor import Supervisor
from orchestrator.experiment.plan import expand, generated_root
from orchestrator.experiment.reading import load_experiment
from orchestrator.experiment.run_dir import begin_run_dir
from orchestrator.experiment.spec import DEFAULT_CONFIG, SpecError
from orchestrator.findings import Finding, has_errors, print_findings
from orchestrator.process import prepare_process

if TYPE_CHECKING:
    from orchestrator.acceptance.document import Acceptance
    from orchestrator.experiment.spec import Experiment


@dataclass(frozen=True, slots=True)
class Request:
    """What one invocation of the command was asked to do."""

    experiment: Experiment
    folder: Path
    """Where the results go."""
    against: Acceptance | None
    """Another cluster's."""
    short: bool
    """Measure what preflight measures."""
    json_output: TextIO | None
    """Where acceptance.json is printed; None where it is not asked for."""
    console: Console
    working: Callable[[], None]
    """Called once a signal no longer cuts this off, but asks for an end."""


def main(
    config: Annotated[
        Path, typer.Argument(help="The experiment file: its cluster, device, data, storage and tracking.")
    ] = DEFAULT_CONFIG,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field. Repeatable.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for acceptance.json and .html; default: runs/EXPERIMENT/UTC-TIME.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another acceptance.json, or its folder: shown next to this one.")
    ] = None,
    short: Annotated[bool, typer.Option("--short", help="Only what a run's preflight measures: seconds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print acceptance.json; the rest goes to stderr.")] = False,
) -> None:
    """Measure every node of a cluster and the links between them, and name those that fall behind their peers."""
    supervisor = Supervisor()
    prepare_process()
    console = Console(stderr=as_json, emoji=False)
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        other = _read(against) if against else None
        experiment = load_experiment(config, assignments)
        document = sys.stdout if as_json else None
        with begin_run_dir(experiment, output) as folder:
            request = Request(experiment, folder, other, short, document, console, supervisor.working)
            ending = supervisor.run(partial(_without_traceback, request))
    except SpecError as error:
        raise typer.Exit(_report(str(error))) from None
    if supervisor.stopped:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(_report(ending.reason) if ending.code is None else ending.code)


def _read(path: Path) -> Acceptance:
    from orchestrator.acceptance.document import read_document

    try:
        return read_document(path)
    except (OSError, ValueError) as error:
        raise SpecError(f"--against: {error}") from error


def _report(text: str) -> int:
    Console(stderr=True, emoji=False).print(f"[bold red]error[/] {escape(text)}", highlight=False, soft_wrap=True)
    return UNFIT


def _without_traceback(request: Request) -> int:
    try:
        # Ray prints what its daemons report to stdout, which is to hold one JSON document.
        with redirect_stdout(sys.stderr) if request.json_output else nullcontext():
            return _accept(request)
    except (SpecError, OSError) as error:
        return _report(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED


def _interrupt(*_: object) -> None:
    """Ends what is under way, once: ending a run in MLflow is not cut off."""
    handle_stop_signals(lambda *_: None)
    raise KeyboardInterrupt


def _accept(request: Request) -> int:
    from orchestrator.acceptance.cluster import accept, worker_nodes
    from orchestrator.acceptance.document import write_document
    from orchestrator.acceptance.measuring import FULL, SHORT
    from orchestrator.acceptance.page import write_page
    from orchestrator.execution.cluster import shutdown, start_ray
    from orchestrator.execution.nodes import list_nodes
    from orchestrator.experiment.environment import describe
    from orchestrator.preflight.cluster import check_token
    from orchestrator.preflight.settings import check_settings

    experiment, resources = request.experiment, request.experiment.resources
    findings: list[Finding] = check_settings(experiment)
    request.folder.mkdir(parents=True, exist_ok=True)
    cluster = None
    if not has_errors(findings):
        cluster = start_ray(resources.address, resources.network_interface)
        findings += check_token(list_nodes())
    print_findings([each for each in findings if each.level == "error"])
    if has_errors(findings) or cluster is None:
        return UNFIT
    trials = expand(experiment, cluster.hardware, str(request.folder.absolute()), generated_root(experiment))
    nodes = list_nodes()
    if not (members := worker_nodes(trials, nodes)):
        raise SpecError(f"no node of the cluster takes a worker on {trials[0].device}")
    hosts = ", ".join(node.host for node in members)
    _line(request, f"Measuring {len(members)} node{'s' * (len(members) > 1)}: {hosts}")
    scope = SHORT if request.short else FULL
    acceptance = accept(trials, nodes, scope, describe(["python", "-m", "orchestrator.accept", *sys.argv[1:]]))
    shutdown()
    files = [write_document(acceptance, request.folder), write_page(acceptance, request.folder, request.against)]
    _show(request, acceptance)
    tracked = _track(request, acceptance, files)
    request.console.print(f"Results in {request.folder}", soft_wrap=True, markup=False, highlight=False)
    if request.json_output:
        print(files[0].read_text(encoding="utf-8"), file=request.json_output, flush=True)
    return acceptance.exit_code or (0 if tracked else NOT_TRACKED)


def _show(request: Request, acceptance: Acceptance) -> None:
    from rich import box
    from rich.table import Table

    from orchestrator.acceptance.table import missing, rows

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ["", "median", "worst", "where", *(["other", "ratio"] if request.against else [])]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("", "where") else "right", overflow="fold")
    for row in rows(acceptance, request.against):
        texts = [f"{row.quantity} ({row.unit})", row.median, row.worst, row.worst_at]
        table.add_row(*map(escape, texts + ([row.other, row.ratio] if request.against else [])))
    request.console.print(table)
    for place, reason in missing(acceptance):
        _line(request, f"not measured: {place}: {reason}")
    for verdict in acceptance.verdicts:
        _line(request, f"{'falls behind' if verdict.level == 'behind' else 'hint'}: {verdict.place}: {verdict.what}")
    if not acceptance.exit_code:
        alone = len(acceptance.nodes) == 1 and len(acceptance.nodes[0].gpus) < 2
        _line(request, "One node: there is nothing to compare it with." if alone else "All are as good as their peers.")


def _line(request: Request, text: str) -> None:
    request.console.print(text, soft_wrap=True, markup=False, highlight=False)


def _track(request: Request, acceptance: Acceptance, files: list[Path]) -> bool:
    """Logs the result in MLflow; returns whether it has it, or need not."""
    from orchestrator.tracking.acceptance import log_acceptance
    from orchestrator.tracking.driver import TrackingError, tracking_uri

    metrics = {"/".join(filter(None, name)): value for name, value in acceptance.medians().items()}
    for node in acceptance.nodes:
        for key in dict.fromkeys(each.key for each in node.values):
            values = [each.value for each in node.values if each.key == key and each.value is not None]
            if values and key != "gpu_fault":
                metrics[f"{node.host}/{key}"] = statistics.median(values)
    tags = {
        "outcome": ("fit", "behind", "not measured")[acceptance.exit_code],
        "hosts": ", ".join(node.host for node in acceptance.nodes),
        "slow_hosts": ", ".join(acceptance.slow_hosts()),
        "device": acceptance.device,
        "device_name": next((gpu for node in acceptance.nodes for gpu in node.gpus), acceptance.nodes[0].processor),
        "num_nodes": str(len(acceptance.nodes)),
        "mlflow.note.content": "\n\n".join(f"{each.place}: {each.what}" for each in acceptance.verdicts) or "all fit",
    }
    tracking = request.experiment.tracking
    handle_stop_signals(_interrupt)
    request.working()
    try:
        name = f"acceptance {acceptance.started}"
        log_acceptance(tracking_uri(tracking.uri), request.experiment.name, name, metrics, tags, files)
    except TrackingError as error:
        _line(request, f"not tracked: {error}")
        return tracking.offline
    return True


if __name__ == "__main__":
    typer.run(main)
