"""The HTML report: one file without scripts or addresses to load from, that opens from a mail.

Everything an experiment file can hold is hostile input: the template escapes all of it, figures come with their text
escaped by Matplotlib, and the page's own policy lets nothing be loaded or run.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.experiment.reading import to_yaml
from orchestrator.figures.catalog import mlflow_base, table_address
from orchestrator.figures.record_parts import Sections
from orchestrator.report import plots as figures
from orchestrator.report.comparison import config_table, differing, environment_table, labels, result_differences
from orchestrator.report.plots import ReportInput
from orchestrator.report.samples import MIN_SCORE, Sample, sample_pictures
from orchestrator.report.table import number_text, percent_text, seconds_text, table_cells, table_rows
from orchestrator.runlog.folder import RunFolder, TrialEvents
from trainers.contract.events import LoopStarted

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class FigureKind:
    """A figure of the report.

    Attributes:
        function: Name of the function in `orchestrator.report.plots` that draws it.
        title: Its heading.
        reading: How to read it.
        anchor: Heading of docs/measurement.md that defines what it shows.
        definition: The same definition in a sentence, for a report that travels without the docs.
    """

    function: str
    title: str
    reading: str
    anchor: str
    definition: str


KINDS = (
    FigureKind(
        "throughput", "Throughput against workers", "Dotted: ideal, from the smallest size. Bars: 95 % interval.",
        "throughput", "Images all workers trained on in the measured window, over its wall time on the slowest worker; "
        "warm-up iterations and hooks (evaluation, checkpoints) left out.",
    ),
    FigureKind(
        "accuracy_over_time", "AP over time", "Each point is one evaluation, at the moment its figures were known.",
        "time-to-train", "The seed's clock runs from the first thing the training function does and never pauses; time "
        "to train ends with the evaluation that first meets the target.",
    ),
    FigureKind(
        "accuracy_over_iterations", "AP over iterations", "The same evaluations by iterations trained.",
        "accuracy", "COCO's AP (mean over IoU 0.50 to 0.95) for boxes and for masks, on the scale of 0 to 100.",
    ),
    FigureKind(
        "wall_clock", "Where the wall clock went", "All seconds of a trial; the sections add up to its wall time.",
        "wall-clock", "Rank 0's line of time from the driver's start of the trial to its end, cut into sections; what "
        "is left over is shown as other.",
    ),
    FigureKind(
        "time_line", "Time line and restarts", "Triangles: the workers were started again.",
        "downtime", "Downtime: from the last sign of progress before a failure to the first batch asked for after it. "
        "It stays on the seed's clock.",
    ),
    FigureKind(
        "step_times", "Step times", "Read across: the share of the steps that took at most so long.",
        "step-times", "Wall time of every step after the warm-up, all ranks together, hooks left out.",
    ),
    FigureKind(
        "rank_skew", "Skew between ranks", "A rank above 0 makes the others wait.",
        "rank-skew", "A worker's step time without its wait for the others' gradients, against the median worker's; "
        "where that wait is not known, its median step.",
    ),
    FigureKind(
        "drift", "Throughput along the run", "Level: steady. Falling: something wears out or heats up.",
        "drift", "Throughput over consecutive stretches of the run, warm-up and hooks left out.",
    ),
    FigureKind(
        "losses", "Loss", "Total loss, mean over the workers and over each window of steps.",
        "losses", "detectron2's total loss: the sum of its parts, averaged over workers and the steps of a window.",
    ),
    FigureKind(
        "loss_parts", "Loss by part", "The last trial's loss, part by part.",
        "losses", "detectron2's losses by their names: classification, boxes and masks, and the proposals' two.",
    ),
    FigureKind(
        "learning_rate", "Learning rate", "Warm-up, then the steps of the schedule.",
        "learning-rate", "The learning rate of the last step of each window, scaled by detectron2's own rule.",
    ),
)  # fmt: skip

OTHER_DEFINITIONS = {
    "efficiency": ("Speed-up and efficiency", "Throughput over that of the smallest world size, over the same "
                   "iterations where both have them; efficiency divides it by the ratio of the workers: 1 is ideal."),
    "cost": ("Cost", "Price per accelerator-hour times workers times hours: of the whole trial from the driver's start "
             "to its end, and of the time to train; in the currency of the price."),
    "noise": ("More than noise", "The 95 % interval of the ratio does not hold 1: between repeats where there are any, "
              "else within the runs, which cannot see what differs from run to run."),
}  # fmt: skip
"""By anchor: what is defined besides the figures."""


def html_page(runs: Sequence[RunFolder], place: Path) -> str:
    """The report on one run, or on several with the first as the one compared with.

    Args:
        runs: The runs.
        place: Folder the page is written to; links to the definitions are relative to it.
    """
    names = labels(runs)
    several = len(runs) > 1
    stories = [
        TrialEvents(f"{name} · {s.label}" if several else s.label, s.trial, s.events, s.plan, s.folder)
        for name, run in zip(names, runs, strict=True)
        for s in run.stories
    ]
    material = ReportInput(
        {name if several else "": run.result for name, run in zip(names, runs, strict=True)}, stories
    )
    drawn = []
    for kind in KINDS:
        svg, missing = figures.draw(getattr(figures, kind.function), material, kind.function.replace("_", "-"))
        drawn.append((kind, Markup(svg), missing))  # noqa: S704 - Matplotlib escapes the text in its SVG
    loader = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    loader.filters |= {
        "seconds": lambda seconds: seconds_text(seconds).replace("-0.0", "0.0"),
        "number": number_text,
        "percent": percent_text,
    }
    docs = ROOT / "docs" / "measurement.md"
    return loader.get_template("report.html.j2").render(
        title=" and ".join(names),
        several=several,
        runs=[_run_values(name, run) for name, run in zip(names, runs, strict=True)],
        stories=stories,
        figures=drawn,
        kinds=KINDS,
        other_definitions=OTHER_DEFINITIONS,
        docs=quote(os.path.relpath(docs, place)),
        section_names=[name for name in Sections.model_fields if name != "wall"],
        least_score=MIN_SCORE,
        config_differences=differing([config_table(run) for run in runs]),
        environment_differences=differing([environment_table(run) for run in runs]),
        result_differences=result_differences(runs[0], list(zip(names[1:], runs[1:], strict=True))),
        names=names,
    )


def _run_values(name: str, run: RunFolder) -> dict[str, Any]:
    result = run.result
    headings, cells = table_cells(result)
    samples, trial, missing = _samples(run)
    config = next((e.config_yaml for s in run.stories for e in s.events if isinstance(e, LoopStarted)), "")
    return {
        "label": name,
        "result": result,
        "headings": headings,
        "rows": list(zip(table_rows(result), cells, strict=True)),
        "samples": samples,
        "samples_trial": trial,
        "samples_missing": missing,
        "experiment_yaml": to_yaml(run.experiment) if run.experiment else "",
        "config_yaml": config,
        "command": shlex.join(result.command),
        "links": mlflow_links(run),
    }


def _samples(run: RunFolder) -> tuple[list[Sample], str, str]:
    """Pictures of the last trial that left any, its name, and the reason where there are none."""
    missing = "no evaluation kept any"
    for story in reversed(run.stories):
        if story.trial.evaluations:
            try:
                return sample_pictures(story), story.trial.name, ""
            except (OSError, ValueError, KeyError) as error:
                missing = f"{type(error).__name__}: {error}"
    return [], "", missing


def mlflow_links(run: RunFolder) -> list[tuple[str, str]]:
    """Name and address of the run's pages in MLflow, the table first; none where tracking knows no run."""
    base = mlflow_base(run.result)
    experiment = str(run.tracking.get("experiment_id") or "")
    ids: dict[str, str] = {t.name: t.mlflow_run_id for t in run.result.trials if t.mlflow_run_id}
    if not experiment or not ids:
        return []
    references = {name: i for name, i in run.tracking.get("runs", {}).items() if name.startswith("reference/")}
    listed = quote("[" + ",".join(f'"{i}"' for i in [*ids.values(), *references.values()]) + "]")
    compared = f"{base}/compare-runs?runs={listed}&experiments=%5B%22{quote(experiment)}%22%5D"
    table = table_address(base, quote(experiment))
    links = [("Table of all runs", table), ("Compare these trials and the references", compared)]
    if run.result.mlflow_run_id:
        ids = {"This run (parent)": run.result.mlflow_run_id, **ids}
    return links + [(name, f"{base}/experiments/{quote(experiment)}/runs/{quote(i)}") for name, i in ids.items()]
