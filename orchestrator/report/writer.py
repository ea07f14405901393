"""Writes the report of a run, and the comparison of several: HTML with figures, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from orchestrator.experiment.environment import DASHBOARD
from orchestrator.figures.records import ExperimentResult
from orchestrator.files import write_atomically
from orchestrator.report.comparison import (
    COMPARED,
    config_table,
    differing,
    environment_table,
    labels,
    result_differences,
)
from orchestrator.report.table import csv_table, escape_markdown, markdown_table, neutral_cell
from orchestrator.runlog.folder import RunFolder, read_run_folder

FAILURE_FILE = "report-failure.txt"


def write_report(result: ExperimentResult, run_dir: Path) -> list[Path]:
    """Writes report.html, report.md and table.csv next to results.json and returns their paths, the HTML first."""
    return write_run(read_run_folder(run_dir, result), run_dir)


def try_report(result: ExperimentResult, run_dir: Path) -> tuple[Path, str]:
    """Writes the report of a run that has ended; an error in it does not fail the run.

    Returns the report that could be made (report.md where report.html failed), and what went wrong, or "".
    """
    try:
        return write_report(result, run_dir)[0], ""
    except Exception as error:  # noqa: BLE001 - whatever the report stumbles over, the run's results are safe
        with suppress(OSError):  # which may be the reason
            (run_dir / FAILURE_FILE).write_text(traceback.format_exc(), encoding="utf-8")
        what = f"report.html could not be made ({type(error).__name__}: {error}); see {run_dir / FAILURE_FILE}"
        return run_dir / "report.md", f"{what}. Rebuild it: python -m orchestrator.report {run_dir}"


def write_run(run: RunFolder, place: Path) -> list[Path]:
    """Writes the report of a run that was read back into any folder; as `write_report`."""
    from orchestrator.report.page import html_page

    write_atomically(place / "report.md", markdown_report(run.result))
    write_atomically(place / "table.csv", csv_table(run.result))
    write_atomically(place / "report.html", html_page([run], place))
    return [place / name for name in ("report.html", "report.md", "table.csv")]


def write_comparison(runs: Sequence[RunFolder], place: Path) -> list[Path]:
    """Writes comparison.html, comparison.md and comparison.csv: every run against the first; returns their paths."""
    from orchestrator.report.page import html_page

    (place / "comparison.md").write_text(markdown_comparison(runs), encoding="utf-8")
    (place / "comparison.csv").write_text(csv_comparison(runs), encoding="utf-8")
    (place / "comparison.html").write_text(html_page(runs, place), encoding="utf-8")
    return [place / name for name in ("comparison.html", "comparison.md", "comparison.csv")]


def markdown_report(result: ExperimentResult) -> str:
    """The report as Markdown."""
    page = result.environment.get(DASHBOARD, "")
    lines = [
        f"# {escape_markdown(result.experiment)}",
        "",
        escape_markdown(result.description),
        "",
        f"{result.status.capitalize()}; started {result.started}, ended {result.ended or '–'} (UTC).",
        "",
        *([f"In [Ray's dashboard](<{quote(page, safe=':/#[]')}>).", ""] if page.startswith("http") else []),
        markdown_table(result),
    ]
    failed = [trial for trial in result.trials if trial.status != "FINISHED"]
    if failed:
        lines += ["## Not finished", ""]
        lines += [f"- {escape_markdown(t.name)}: {t.status.lower()}: {escape_markdown(t.reason)}" for t in failed]
        lines.append("")
    noted = [f"- {escape_markdown(t.name)}: {escape_markdown(note)}" for t in result.trials for note in t.notes]
    if noted:
        lines += ["## Notes", "", *noted, ""]
    lines += ["## Environment", "", *_markdown_rows(["", ""], result.environment.items())]
    return "\n".join(lines) + "\n"


def markdown_comparison(runs: Sequence[RunFolder]) -> str:
    """Several runs side by side as Markdown."""
    names = labels(runs)
    lines = [f"# {' and '.join(map(escape_markdown, names))}", ""]
    for name, run in zip(names, runs, strict=True):
        lines += [f"## {escape_markdown(name)}", "", markdown_table(run.result)]
    lines += [f"## What differs from {escape_markdown(names[0])}", ""]
    differences = result_differences(runs[0], list(zip(names[1:], runs[1:], strict=True)))
    compared = [(d.other_label, d.what, d.figure, d.base, d.other, d.ratio, d.verdict) for d in differences]
    headings = ["Run", "Trial", "Figure", names[0], "Other", "Ratio (95 % interval)", "More than noise?"]
    lines += _markdown_rows(headings, compared)
    for title, table in (("Config", config_table), ("Environment", environment_table)):
        rows = [(key, *values) for key, values in differing([table(run) for run in runs])]
        lines += ["", f"### {title}", "", *(_markdown_rows(["Key", *names], rows) if rows else ["Nothing."])]
    return "\n".join(lines) + "\n"


def csv_comparison(runs: Sequence[RunFolder]) -> str:
    """Every trial of every run with the figures that are compared, at full precision."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("run", "trial", "world_size", *(figure.key for figure in COMPARED), "cost", "cost_to_target"))
    for name, run in zip(labels(runs), runs, strict=True):
        for trial in run.result.trials:
            figures = [*(figure.of(trial) for figure in COMPARED), trial.cost, trial.cost_to_target]
            writer.writerow([neutral_cell(cell) for cell in (name, trial.name, trial.world_size, *figures)])
    return text.getvalue()


def _markdown_rows(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(escape_markdown, row))} |" for row in (headings, *rows)]
    return [lines[0], "|" + ":---|" * len(headings), *lines[1:]]
