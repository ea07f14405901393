"""Prints the runs of some experiments as JSON, with the sizes of artifacts fetched through the server."""

import json
import sys
import tempfile
from pathlib import Path

from mlflow import MlflowClient, artifacts

client = MlflowClient()
found = []
for name in sys.argv[1:]:
    experiment = client.get_experiment_by_name(name)
    assert experiment, name
    runs = []
    for run in client.search_runs([experiment.experiment_id]):
        folder = artifacts.download_artifacts(run_id=run.info.run_id, dst_path=tempfile.mkdtemp())
        sizes = {path.name: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
        shown = {"status": run.info.status, "tags": run.data.tags, "params": run.data.params}
        histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        points = {key: [point.step for point in history] for key, history in histories.items()}
        runs.append({**shown, "metrics": run.data.metrics, "points": points, "artifacts": sizes})
    found.append(runs)
print(json.dumps(found))
