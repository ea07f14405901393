"""The state of a model in MLflow is the one that the checkpoint's manifest names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from orchestrator.tracking.models import log_model
from tests.builders.trials import TrialBuilder, plan
from trainers.contract.events import CheckpointSaved


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    return MlflowClient(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")


@pytest.mark.parametrize(
    ("manifest", "logged"),
    [
        ({"files": {"state-10.pt": {}}}, b"complete"),
        ({"files": {"../state-10.pt": {}}}, None),
        ({"files": ["state-10.pt"]}, None),
        ([], None),
        (None, None),
    ],
    ids=["an interrupted write left another", "a path", "a list", "none", "absent"],
)
def test_the_state_that_is_logged_is_the_manifests(
    client: MlflowClient, tmp_path: Path, manifest: object, logged: bytes | None
) -> None:
    checkpoint = tmp_path / "iter_0000004"
    checkpoint.mkdir()
    (checkpoint / "state-9.pt").write_bytes(b"interrupted")
    for folder in (checkpoint, tmp_path):
        (folder / "state-10.pt").write_bytes(b"complete")
    if manifest is not None:
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    made = TrialBuilder(plan())
    made.loop(1.0)
    made.checkpoint(2.0, 4, 0.0)
    events = [
        dataclasses.replace(event, path=str(checkpoint)) if isinstance(event, CheckpointSaved) else event
        for event in made.events
    ]
    experiment = client.create_experiment(tmp_path.name, artifact_location=(tmp_path / "artifacts").as_uri())
    log_model(client, experiment, client.create_run(experiment).info.run_id, made.trial, events)
    found = [path.read_bytes() for path in (tmp_path / "artifacts").rglob("state.pt")]
    assert found == ([] if logged is None else [logged])
