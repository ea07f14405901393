"""Addresses of MLflow's pages."""

from __future__ import annotations

from urllib.parse import quote

from orchestrator.figures.records import ExperimentResult
from orchestrator.runlog.folder import RunFolder

MLFLOW_UI = "http://localhost:5000"
"""Where `make ui` serves a store that has no server."""

VIEW_KEY = "benchmark"
"""Of the view of MLflow's table of runs with the columns that matter; stored with the experiment, as MLflow's "Share"
button stores one."""


def mlflow_base(result: ExperimentResult) -> str:
    """Beginning of the addresses of MLflow's pages: the tracking server's, or that of `make ui`."""
    uri = result.mlflow_tracking_uri or ""
    return f"{uri.rstrip('/') if uri.startswith(('http://', 'https://')) else MLFLOW_UI}/#"


def table_address(base: str, experiment_id: str) -> str:
    """Page of the experiment's runs in that view."""
    return f"{base}/experiments/{experiment_id}/runs?viewStateShareKey={VIEW_KEY}&workflowType=machine_learning"


def mlflow_links(run: RunFolder) -> list[tuple[str, str]]:
    """Name and address of the run's pages in MLflow, the table first; none where nothing was tracked."""
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
    runs = f"{base}/experiments/{quote(experiment)}/runs"
    # Without the type, MLflow shows a run among the evaluations of language models.
    return links + [(name, f"{runs}/{quote(i)}?workflowType=machine_learning") for name, i in ids.items()]
