"""Prints an experiment's runs as JSON, with the artifacts fetched through the server; run on a host that may ask it."""

import json
import sys
import tempfile
from pathlib import Path

from mlflow import MlflowClient, artifacts

client = MlflowClient()
experiment = client.get_experiment_by_name(sys.argv[1])
assert experiment
runs = []
for run in client.search_runs([experiment.experiment_id]):
    files = {}
    for entry in client.list_artifacts(run.info.run_id):
        path = artifacts.download_artifacts(
            run_id=run.info.run_id, artifact_path=entry.path, dst_path=tempfile.mkdtemp()
        )
        with Path(path).open("rb") as file:
            files[entry.path] = len(file.read())
    shown = {"status": run.info.status, "tags": run.data.tags, "params": run.data.params, "artifacts": files}
    runs.append({**shown, "metrics": run.data.metrics})
print(json.dumps(runs))
