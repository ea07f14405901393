"""results.json as a report for people: Markdown, with the seed's table, and what it was made with."""

from __future__ import annotations

from pathlib import Path

from orchestrator.records import ExperimentResult
from orchestrator.table import csv_table, escape_markdown, markdown_table


def write_report(result: ExperimentResult, run_dir: Path) -> list[Path]:
    """Writes report.md and table.csv beside results.json and returns their paths."""
    report, table = run_dir / "report.md", run_dir / "table.csv"
    report.write_text(markdown_report(result), encoding="utf-8")
    table.write_text(csv_table(result), encoding="utf-8")
    return [report, table]


def markdown_report(result: ExperimentResult) -> str:
    """The report as Markdown."""
    lines = [
        f"# {escape_markdown(result.experiment)}",
        "",
        escape_markdown(result.description),
        "",
        f"{result.status.capitalize()}; started {result.started}, ended {result.ended or '–'} (UTC).",
        "",
        markdown_table(result),
    ]
    failed = [trial for trial in result.trials if trial.status != "FINISHED"]
    if failed:
        lines += ["## Not finished", ""]
        lines += [f"- {escape_markdown(t.name)}: {t.status.lower()}: {escape_markdown(t.reason)}" for t in failed]
        lines.append("")
    lines += ["## Environment", "", "| | |", "|:---|:---|"]
    lines += [f"| {escape_markdown(key)} | {escape_markdown(value)} |" for key, value in result.environment.items()]
    return "\n".join(lines) + "\n"
