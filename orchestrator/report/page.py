"""The HTML report: one file without external resources, so that it opens from a mail.

Everything in an experiment file is untrusted: the template escapes all of it, Matplotlib escapes the text of the
figures, and the page's content security policy lets nothing be loaded, and no script run but the one written here. It
sorts and searches tables and chooses curves; all else, and all rows, are there without it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from orchestrator.experiment.reading import to_yaml
from orchestrator.figures.benchmark import verdict_lines
from orchestrator.figures.catalog import SECTIONS
from orchestrator.report.comparison import config_table, differing, environment_table, labels, result_differences
from orchestrator.report.details import detail_tables
from orchestrator.report.drawing import ReportInput
from orchestrator.report.evaluation import DAMAGED, ClassFigures, class_figures
from orchestrator.report.mlflow_links import mlflow_links
from orchestrator.report.plots import PLOTS, anchor_of, section_of
from orchestrator.report.prediction import prediction_notes, prediction_tables
from orchestrator.report.samples import MIN_SCORE, Samples, sample_pictures
from orchestrator.report.table import table_cells, table_rows
from orchestrator.runlog.folder import RunFolder
from trainers.contract.events import LoopStarted

ROOT = Path(__file__).resolve().parents[2]

DEFINED = ("images_per_second", "time_to_train_seconds", "box_ap", "scaling.efficiency", "goodput", "cost")
"""Rows of the catalogue that the results link to, besides those of the plots; each stands for its section."""

NOISE = (
    "The 95 % interval of the ratio does not hold 1: between repeats where there are any, else within the runs, which "
    "cannot see what differs from run to run."
)
"""When a difference counts as more than noise (docs/measurement.md, "Noise")."""


SCRIPTS = ("tables.js", "chooser.js")
"""Files of this folder that the report's script consists of."""

MAX_DETAILED = 3
"""Runs of which one page shows classes, progress and worst images; for each, they are some 1 MB with 80 classes."""

TOO_MANY = (
    f"A page of more than {MAX_DETAILED} runs leaves out classes, progress and worst images: see each run's report."
)


def template(name: str) -> Template:
    """A template of this folder; it escapes all that it shows."""
    loader = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return loader.get_template(name)


def html_page(runs: Sequence[RunFolder], place: Path) -> str:
    """The report on one run, or on several that are compared with the first, for a file in the folder `place`."""
    names = labels(runs)
    several = len(runs) > 1
    trials = [
        replace(trial, label=f"{name} · {trial.label}" if several else trial.label)
        for name, run in zip(names, runs, strict=True)
        for trial in run.trials
    ]
    data = ReportInput({name if several else "": run.result for name, run in zip(names, runs, strict=True)}, trials)
    drawn = [(plot, *plot.svg(data)) for plot in PLOTS]
    return template("report.html.j2").render(
        title=" and ".join(names),
        several=several,
        names=names,
        runs=[
            _run_values(name, run, f"run-{number}", detailed=len(runs) <= MAX_DETAILED)
            for number, (name, run) in enumerate(zip(names, runs, strict=True), 1)
        ],
        figures=drawn,
        details=detail_tables(trials),
        definitions=_definitions(),
        noise=NOISE,
        docs=quote(os.path.relpath(ROOT / "docs" / "measurement.md", place)),
        min_score=MIN_SCORE,
        config_differences=differing([config_table(run) for run in runs]),
        environment_differences=differing([environment_table(run) for run in runs]),
        result_differences=result_differences(runs[0], list(zip(names[1:], runs[1:], strict=True))),
        **script_values(SCRIPTS),
    )


def script_values(names: Sequence[str]) -> dict[str, str]:
    """The script of a page from files of this folder, and the hash by which the page's policy knows it."""
    script = "\n".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names)
    digest = hashlib.sha256(script.encode()).digest()
    return {
        "script": Markup(script),  # noqa: S704 - files of this program
        "script_hash": base64.b64encode(digest).decode(),
    }


def _run_values(name: str, run: RunFolder, prefix: str, *, detailed: bool) -> dict[str, Any]:
    result = run.result
    headings, lines = table_cells(result)
    samples, trial, missing = _samples(run)
    classes, classes_missing = _classes(run, prefix) if detailed else (None, TOO_MANY)
    return {
        "label": name,
        "result": result,
        "headings": headings,
        "rows": list(zip(table_rows(result), lines, strict=True)),
        "verdict": verdict_lines(result),
        "predictions": prediction_tables(result.prediction) if result.prediction else [],
        "prediction_notes": list(prediction_notes(result.prediction)) if result.prediction else [],
        "samples": samples.pictures,
        "legend": {name: "#{:02x}{:02x}{:02x}".format(*color) for name, color in samples.legend.items()},
        "progress": samples.progress if detailed else None,
        "worst": samples.worst if detailed else [],
        "classes": classes,
        "classes_missing": classes_missing,
        "samples_trial": trial,
        "samples_missing": missing,
        "experiment_yaml": to_yaml(run.experiment) if run.experiment else "",
        "config_yaml": next((e.config_yaml for t in run.trials for e in t.events if isinstance(e, LoopStarted)), ""),
        "command": shlex.join(result.command),
        "links": mlflow_links(run),
    }


def _classes(run: RunFolder, prefix: str) -> tuple[ClassFigures | None, str]:
    """Figures by class of the last trial that has any, and the reason where there are none."""
    missing = "No evaluation has figures by class."
    for trial in reversed(run.trials):
        try:
            if found := class_figures(trial, prefix):
                return found, ""
        except DAMAGED as error:
            missing = f"No figures by class: {type(error).__name__}: {error}."
    return None, missing


def _samples(run: RunFolder) -> tuple[Samples, str, str]:
    """Pictures of the last trial that left any, its name, and the reason where there are none."""
    missing = "no evaluation left any"
    for trial in reversed(run.trials):
        if trial.trial.evaluations:
            try:
                return sample_pictures(trial), trial.trial.name, ""
            except DAMAGED as error:
                missing = f"{type(error).__name__}: {error}"
    return Samples([], {}), "", missing


def _definitions() -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Anchor and heading of every section that is linked to, with its figures' headings and definitions."""
    sections = dict.fromkeys(section_of(key) for key in (*(plot.key for plot in PLOTS), *DEFINED))
    return [
        (anchor_of(section), section, [(row.heading, row.definition.replace("`", "")) for row in SECTIONS[section]])
        for section in sections
    ]
