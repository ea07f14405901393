"""What a job knows of itself, and what it must not hand on."""

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from orchestrator.experiment.environment import command_line, describe
from orchestrator.experiment.reading import parse_experiment
from orchestrator.preflight.node import NodeRequest, inspect_node
from orchestrator.preflight.tracking import check_tracking
from tests.builders.experiments import tiny_experiment


def test_a_job_reports_its_id_and_what_its_sender_said(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {"job_submission_id": "job-1", "job_name": "job-1", "submitted_by": "ada", "git_commit": "c0ffee"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}, "metadata": metadata}))
    monkeypatch.setattr("orchestrator.experiment.environment._git", dict)  # a job's copy has no history
    found = describe(["python"])
    assert (found["ray_job_id"], found["ray_job.submitted_by"], found["git_commit"]) == ("job-1", "ada", "c0ffee")


def test_the_environment_and_the_command_can_be_recorded_whatever_their_bytes_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", "caf\udce9.yaml"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1\udce9")
    monkeypatch.setattr("platform.node", lambda: "h\udce9te")
    command = command_line()
    found = describe(command)
    assert command[-1] == r"caf\udce9.yaml" and found["command"].endswith(r"'caf\udce9.yaml'")
    assert (found["OMP_NUM_THREADS"], found["host"]) == (r"1\udce9", r"h\udce9te")
    "".join([*command, *found.values()]).encode()


def test_a_checkout_with_a_file_whose_name_is_not_utf_8_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (
        ["init", "-q"],
        ["commit", "-q", "--allow-empty", "-m", "x"],
        ["config", "core.quotePath", "false"],
    ):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "caf\udce9").touch()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert describe(["python"])["git_dirty"] == "true"


def test_a_worker_that_would_have_the_tracking_password_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    report = inspect_node(NodeRequest(paths={}, folders={}))
    assert report.credentials == ("MLFLOW_TRACKING_PASSWORD",)
    assert "hunter2" not in repr(report)


class Guarded(BaseHTTPRequestHandler):
    """Lets ada in with her password, as MLflow's basic-auth does; knows one name of its own."""

    def do_GET(self) -> None:
        if self.headers["Host"].startswith("localhost"):
            self._answer(403, b"Invalid Host header - possible DNS rebinding attack detected")
        elif self.headers.get("Authorization") == "Basic YWRhOnB3JTQw":  # ada:pw%40
            self._answer(200, b"{}")
        else:
            self._answer(401, b"You are not authenticated.")

    def _answer(self, code: int, text: bytes) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr("orchestrator.preflight.tracking_stores.CONNECT_TIMEOUT_SECONDS", 60.0)
    with HTTPServer(("127.0.0.1", 0), Guarded) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{served.server_port}"
        served.shutdown()


def problems(uri: str) -> list[str]:
    return [finding.code for finding in check_tracking(parse_experiment(tiny_experiment(tracking={"uri": uri}), ""))]


def test_the_tracking_server_is_asked_as_a_run_will_ask_it(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problems(f"http://{server}") == ["tracking_denied"]
    assert problems(f"http://ada:wrong@{server}") == ["tracking_denied"]
    assert problems(f"http://ada:pw%2540@{server}") == []
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pw%40")
    assert problems(f"http://{server}") == []
    monkeypatch.undo()
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr("orchestrator.preflight.tracking_stores.CONNECT_TIMEOUT_SECONDS", 60.0)
    (tmp_path / ".mlflow").mkdir()
    lines = "[mlflow]\nmlflow_tracking_username = ada\nmlflow_tracking_password = pw%40\n"
    (tmp_path / ".mlflow" / "credentials").write_text(lines)
    assert problems(f"http://{server}") == []


def test_a_name_that_the_server_does_not_answer_to_is_distinguished_from_a_password(server: str) -> None:
    assert problems(f"http://{server.replace('127.0.0.1', 'localhost')}") == ["tracking_host"]


def test_a_password_in_the_address_is_not_shown(server: str) -> None:
    experiment = parse_experiment(tiny_experiment(tracking={"uri": f"http://ada:secret@{server}"}), "")
    assert "secret" not in repr(check_tracking(experiment))
