"""Logs the acceptance of a cluster as a run of its experiment, so that clusters can be compared there."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mlflow.entities import Metric, RunTag
from mlflow.tracking import MlflowClient

from orchestrator.files import without_credentials
from orchestrator.findings import root_cause
from orchestrator.process import user_name
from orchestrator.tracking.driver import TrackingError
from orchestrator.tracking.mlflow_runs import MAX_METRICS
from orchestrator.tracking.text import fit, fit_tags

KIND = "acceptance"
"""Tag `kind` of the run."""


def log_acceptance(
    uri: str,
    experiment: str,
    name: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    files: Sequence[Path],
) -> str:
    """Logs a run that has ended, and returns its id.

    Args:
        uri: MLflow's store.
        experiment: Name of the experiment.
        name: Of the run.
        metrics: By the name below `acceptance/`.
        tags: What distinguishes the cluster from others.
        files: Logged as artifacts.

    Raises:
        TrackingError: The store refused or did not answer; a run that was begun there is ended as failed.
        KeyboardInterrupt: It was cut off; the run is ended as killed.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    for each in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(each).setLevel(logging.CRITICAL)
    try:
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else client.create_experiment(experiment)
        run_id = str(client.create_run(experiment_id, run_name=fit(name, "name")).info.run_id)
        try:
            _fill(client, run_id, metrics, tags, files)
            client.set_terminated(run_id, "FINISHED")
        except BaseException as error:
            with suppress(Exception):  # what went wrong first is what is reported
                client.set_terminated(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        return run_id
    except Exception as error:  # whatever the store, its client and its driver raise
        reason = " ".join(without_credentials(root_cause(error)).split())[:300]
        raise TrackingError(f"MLflow at {without_credentials(uri)} does not take the acceptance: {reason}") from error


def _fill(
    client: MlflowClient, run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str], files: Sequence[Path]
) -> None:
    now = int(time.time() * 1000)
    points = [Metric(fit(f"{KIND}/{key}", "unique key"), value, now, 0) for key, value in metrics.items()]
    for start in range(0, len(points), MAX_METRICS):
        client.log_batch(run_id, metrics=points[start : start + MAX_METRICS])
    tagged = {"kind": KIND, "mlflow.user": user_name(), **tags}
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in fit_tags(tagged).items()])
    for file in files:
        client.log_artifact(run_id, str(file))
