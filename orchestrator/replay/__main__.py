"""`python -m orchestrator.replay LOG…`: logs of detectron2 and MLPerf in this program's record, table and report."""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from orchestrator.experiment.references import read_references
from orchestrator.experiment.spec import ReferenceRow, SpecError
from orchestrator.figures.figure import number_text, percent_text, rate_text, seconds_text
from orchestrator.figures.records import TrialResult
from orchestrator.findings import print_findings
from orchestrator.preflight.scales import PROBLEM, meant_ap
from orchestrator.preflight.tracking import check_store
from orchestrator.process import prepare_process
from orchestrator.replay.record import Replayed, experiment_result, replay, track, write
from orchestrator.replay.trial import Targets
from orchestrator.replay.unpacking import ReplayError
from orchestrator.report.mlperf import mllog_text
from orchestrator.report.table import closing_table
from orchestrator.tracking.driver import TrackingError
from orchestrator.tracking.driver import tracking_uri as store_address


def main(
    logs: Annotated[
        list[Path], typer.Argument(help="detectron2's log.txt, metrics.json, MLPerf's results, or folders.")
    ],
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
    references: Annotated[
        list[Path] | None, typer.Option(help="Show the published figures of this file (references/mlperf.yaml).")
    ] = None,
    year: Annotated[int | None, typer.Option(help="Year of the first line; the logs have none.")] = None,
) -> None:
    """Reads logs of runs made without this program, detectron2's or MLPerf's, into its record, table and report."""
    targets = _targets(target_box_ap, target_mask_ap)
    if tracking_uri is not None and not as_reference:
        raise _refusal("--tracking-uri: it has no effect without --track")
    if as_reference and (findings := check_store(store_address(tracking_uri), experiment)):
        print_findings(findings)
        raise typer.Exit(2)
    with tempfile.TemporaryDirectory(prefix="replay-") as temporary:
        run_dir = (output or Path(temporary)).absolute()
        replayed = _read(logs, targets, year, single=mllog is not None)
        result = experiment_result(experiment, replayed, sys.argv)
        result.reference_rows = _references(references or [])
        try:
            write(result, replayed, run_dir)
            if mllog is not None:
                mllog.write_text(mllog_text(replayed[0].plan, replayed[0].events, replayed[0].result), encoding="utf-8")
            store = track(result, replayed, run_dir, tracking_uri) if as_reference else None
        except (TrackingError, OSError) as error:
            raise _refusal(str(error)) from error
    if as_json:
        print(result.model_dump_json(indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 160, emoji=False)
    console.print(closing_table(result))
    met = [t for t in result.trials if t.mlperf_seconds is not None and t.images_per_second is not None]
    if result.benchmark and met:
        rate = statistics.median(t.images_per_second or 0.0 for t in met)
        all_met = all(t.scored_iteration is not None for t in met)
        which = "that met the targets" if all_met else "whose run_stop says success"
        console.print(f"Throughput: {rate_text(rate)} images/s, median of the {len(met)} runs {which}")
    for one in replayed:
        console.print(f"[bold]{escape(one.plan.name)}[/bold]")
        for line in details(one.result):
            console.print(f"  {escape(line)}", soft_wrap=True)
    if output:
        console.print(f"Written to {escape(str(output))}")
    if store:
        console.print(f"Tracked in {escape(store.rpartition('@')[2])}, experiment {escape(experiment)}")


def _targets(box_ap: float | None, mask_ap: float | None) -> Targets | None:
    """The targets that were given, if any; one that is no AP ends the command."""
    for option, ap in (("--target-box-ap", box_ap), ("--target-mask-ap", mask_ap)):
        if ap is not None and not 0 <= ap <= 100:
            raise _refusal(f"{option} is {ap:g}: AP is 0 to 100")
        if meant := meant_ap(ap):
            raise _refusal(f"{option} is {ap:g}: {PROBLEM}. {meant}")
    return Targets(box_ap, mask_ap) if box_ap is not None or mask_ap is not None else None


def details(trial: TrialResult) -> list[str]:
    """Figures that the table has no room for, a line each."""
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
            + (f", keypoint AP {number_text(last.keypoint_ap, 2)}" if last.keypoint_ap is not None else "")
        )
        lines.append(
            f"evaluations: {len(trial.evaluations)}, training stalled for {seconds_text(trial.evaluation_seconds)} s: "
            + ", ".join(f"{e.iteration:,}: {seconds_text(e.seconds)} s" for e in trial.evaluations)
        )
    return [*lines, *trial.notes]


def _read(logs: list[Path], targets: Targets | None, year: int | None, *, single: bool) -> list[Replayed]:
    """Reads the runs; a log that cannot be read, or several runs where a `single` one is needed, end the command."""
    try:
        replayed = replay(logs, targets, year)
    except ReplayError as error:
        raise _refusal(str(error)) from error
    if single and len(replayed) > 1:
        raise _refusal(f"--mllog takes one run, as MLPerf's log holds one; here are {len(replayed)}")
    return replayed


def _references(files: list[Path]) -> list[ReferenceRow]:
    """Published figures; a file that holds none ends the command."""
    try:
        return [row for file in files for row in read_references(file)]
    except SpecError as error:
        raise _refusal(str(error)) from error


def _refusal(text: str) -> typer.Exit:
    Console(stderr=True, emoji=False).print(f"[red]error:[/red] {escape(text)}", soft_wrap=True)
    return typer.Exit(2)


if __name__ == "__main__":
    prepare_process()
    typer.run(main)
