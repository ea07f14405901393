"""`python -m orchestrator.prediction RUN_FOLDER --sizes 64,1024`: predicts from a run that has ended."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.console import Console
from rich.markup import escape

from orchestrator.acceptance.document import read_document
from orchestrator.experiment.paths import absolute
from orchestrator.experiment.prediction_file import Prediction
from orchestrator.experiment.spec import SpecError
from orchestrator.files import write_atomically
from orchestrator.prediction.asking import ask_of_run, parse_sizes
from orchestrator.prediction.predict import predict
from orchestrator.prediction.simulation import Algorithm, Links
from orchestrator.process import prepare_process
from orchestrator.report.prediction import prediction_group
from orchestrator.runlog.folder import read_run_folder

DEFAULT_LATENCY = 10.0
"""Microseconds."""


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a run with trials of two sizes or more.")],
    sizes: Annotated[str, typer.Option(metavar="WORKERS", help="Numbers of workers to predict, e.g. 64,1024.")],
    bandwidth: Annotated[
        float | None, typer.Option(help="Simulate links: GB/s that a worker sends; needs --gradients.", min=1e-6)
    ] = None,
    latency: Annotated[float | None, typer.Option(help="Of a message, microseconds; default: 10.", min=0)] = None,
    links: Annotated[
        Path | None,
        typer.Option(help="acceptance.json: the slowest links measured there, for --bandwidth and --latency."),
    ] = None,
    gradients: Annotated[
        float | None, typer.Option(help="MB of one exchange: R50-FPN in fp32 has 177.", min=1e-6)
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="How gradients are exchanged: ring or tree; default: ring.")
    ] = None,
    mtbf_hours: Annotated[
        float | None, typer.Option(help="Mean time between failures of the largest of --sizes.", min=1e-6)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--to", help="Write the prediction here, for `prediction: FILE` of an experiment.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the prediction as JSON.")] = False,
) -> None:
    """Predicts throughput, time and cost at other sizes from the steps of a run, and simulates failures there."""
    console = Console(width=None if sys.stdout.isatty() else 120, emoji=False)
    try:
        simulated = _links(links, bandwidth, latency, gradients, algorithm)
        prediction = _predict(absolute(run, "RUN_FOLDER"), parse_sizes(sizes, "--sizes"), simulated, mtbf_hours)
        text = prediction.model_dump_json(indent=2) + "\n"
        if output:
            write_atomically(output, text)
    except (SpecError, ValueError, OSError) as error:
        Console(stderr=True, emoji=False).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from error
    if as_json:
        sys.stdout.write(text)
    else:
        console.print(prediction_group(prediction))


def slowest_links(file: Path) -> tuple[float, float]:
    """GB/s of the slowest pair of nodes that an acceptance measured, and microseconds of a message of the latest.

    A pair's bandwidth is that of its best message; its latency is an all-reduce's of one number, which is two messages.

    Raises:
        SpecError: It has no pair, or one that could not be measured.
        OSError, ValueError: It is no acceptance that can be read.
    """
    pairs = [link.values for link in read_document(file).links if len(link.hosts) == 2]
    rates, latencies = (
        [[each.value for each in values if each.key == key and each.value] for values in pairs]
        for key in ("all_reduce", "latency")
    )
    if not all(rates) or not all(latencies) or not pairs:
        raise SpecError(f"--links {file}: it has no pair of nodes, or one whose link could not be measured")
    return min(map(max, rates)), max(map(min, latencies)) / 2


def _links(
    file: Path | None, bandwidth: float | None, latency: float | None, gradients: float | None, given: str | None
) -> Links | None:
    """The links that are simulated, with the `given` algorithm; None to extrapolate what was measured of them."""
    algorithm = given or "ring"
    if file is not None:
        if bandwidth is not None or latency is not None:
            raise SpecError("--links has bandwidth and latency: give no others")
        bandwidth, latency = slowest_links(file)
    if algorithm not in get_args(Algorithm):
        raise SpecError(f"--algorithm {algorithm}: it is none of {', '.join(get_args(Algorithm))}")
    if (bandwidth is None) != (gradients is None):
        raise SpecError(
            "--gradients and --bandwidth or --links need each other: an exchange takes the one over the other"
        )
    if bandwidth is None or gradients is None:
        for option, value in (("--latency", latency), ("--algorithm", given)):
            if value is not None:
                raise SpecError(f"{option}: it has no effect without --bandwidth or --links")
        return None
    microseconds = DEFAULT_LATENCY if latency is None else latency
    return Links(bandwidth * 1e9, microseconds * 1e-6, cast("Algorithm", algorithm), gradients * 1e6)


def _predict(folder: Path, sizes: list[int], links: Links | None, mtbf_hours: float | None) -> Prediction:
    run = read_run_folder(folder)
    if not run.experiment:
        raise SpecError(f"{folder}: it has no events, or was replayed from a log, which has no single steps")
    asked = ask_of_run(folder, run.experiment, sizes)
    if mtbf_hours:
        asked = asked.model_copy(update={"mtbf_worker_hours": mtbf_hours * sizes[-1]})
    return predict(asked, run.trials, links)


if __name__ == "__main__":
    prepare_process()
    typer.run(main)
