"""The run of an acceptance in MLflow has an end, also where it cannot be logged or is cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.entities import RunInfo
from mlflow.tracking import MlflowClient

from orchestrator.tracking.acceptance import log_acceptance
from orchestrator.tracking.driver import TrackingError
from tests.builders.commands import ROOT
from tests.builders.experiments import tiny_experiment, write_experiment
from tests.builders.waiting import wait_for


def run_info(uri: str, experiment: str) -> RunInfo:
    client = MlflowClient(uri)
    (found,) = (each for each in client.search_experiments() if each.name == experiment)
    (run,) = client.search_runs([found.experiment_id])
    return run.info


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [(OSError("no room"), TrackingError, "FAILED"), (KeyboardInterrupt(), KeyboardInterrupt, "KILLED")],
)
def test_a_run_that_cannot_be_logged_is_ended(
    error: BaseException, raised: type[BaseException], status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(MlflowClient, "log_artifact", fail)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with pytest.raises(raised):
        log_acceptance(uri, "tiny", "acceptance", {"decode": 800.0}, {}, [tmp_path / "acceptance.json"])
    assert run_info(uri, "tiny").status == status and run_info(uri, "tiny").end_time


TRACKED = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import typer
from mlflow.tracking import MlflowClient
from orchestrator import accept
from orchestrator.acceptance.document import Acceptance, NodeRecord

def hold(*_):
    open("ready", "w").close()
    while True:
        time.sleep(0.05)

def measured(request):
    node = NodeRecord("a", "10.0.0.1", 8, "EPYC", (), (), 0.001, 0.0005, "")
    acceptance = Acceptance("tiny", "2026-11-26T17:00:00+00:00", "cpu", True, (node,), (), (), 1.0)
    return accept._track(request, acceptance, ["acceptance.json"])

MlflowClient.log_artifact, accept._accept = hold, measured
typer.run(accept.main)
"""


def test_a_signal_while_the_run_is_logged_ends_it_as_killed(tmp_path: Path) -> None:
    file, uri = write_experiment(tmp_path, tiny_experiment()), f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = subprocess.Popen(
        [sys.executable, "-c", TRACKED, file, "--output", tmp_path / "out", "--set", f"tracking.uri={uri}"],
        cwd=tmp_path, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(lambda: (tmp_path / "ready").exists() or command.poll() is not None)
    command.send_signal(signal.SIGINT)
    output, _ = command.communicate(timeout=600)
    assert command.returncode == 130 and "Traceback" not in output, output
    assert run_info(uri, "tiny").status == "KILLED"
