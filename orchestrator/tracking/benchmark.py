"""The summary of a benchmark in MLflow: the parent run has the score above its trials, a row for each system."""

from __future__ import annotations

from pathlib import Path

from mlflow.tracking import MlflowClient

from orchestrator.experiment.spec import ReferenceRow
from orchestrator.figures.benchmark import verdict_lines
from orchestrator.figures.catalog import FIGURES
from orchestrator.figures.records import ExperimentResult
from orchestrator.report.benchmark import FOLDER

KIND = "benchmark"
"""Tag `kind` of the parent run, which is `experiment` for other protocols."""

HEADLINE = ("score_minutes", "images_per_second", "watt_hours_to_target", "cost_to_target")
"""What systems are compared by."""

VIEW = {
    "selectedColumns": [
        *(f"metrics.`{FIGURES[f'benchmark.{key}'].mlflow}`" for key in HEADLINE),
        *(f"tags.`{name}`" for name in ("verdict", "device_name", "recipe")),
    ],
    "searchFilter": "tags.kind != 'trial' AND tags.kind != 'experiment' AND tags.kind != 'acceptance'",
    "orderByKey": "metrics.`benchmark/score_minutes`",
    "orderByAsc": True,
}
"""MLflow's table of the runs of a benchmark: a row for each system, and the published ones."""


def summary_tags(result: ExperimentResult) -> dict[str, str]:
    """Tags of the summary: the verdict, and what distinguishes the system from others."""
    if result.benchmark is None:
        return {}
    score, verdict = verdict_lines(result)
    tags = {"score": score, "verdict": verdict.partition(": ")[2]}
    for trial in result.trials[:1]:
        values = {"device_name": trial.device_name, "recipe": trial.recipe, "num_nodes": trial.num_nodes}
        tags |= {name: str(value) for name, value in {**values, "world_size": trial.world_size}.items() if value}
    return tags


def published(row: ReferenceRow) -> dict[str, float | None]:
    """Figures of a published row under the names of a summary: where it has MLPerf's clock, it is a score."""
    if row.mlperf_seconds is None:
        return {}
    return {"benchmark/score_minutes": row.mlperf_seconds / 60, "benchmark/images_per_second": row.images_per_second}


def log_package(client: MlflowClient, run_id: str, run_dir: Path) -> None:
    """Logs MLPerf's logs of the runs, in the layout of a submission, where there are any."""
    if (run_dir / FOLDER).is_dir():
        client.log_artifacts(run_id, str(run_dir / FOLDER), FOLDER)
