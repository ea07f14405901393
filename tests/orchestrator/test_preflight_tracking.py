"""A store that will not take a run, or in which its experiment was deleted, is found before the run starts."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
from mlflow.tracking import MlflowClient

from orchestrator.experiment.reading import parse_experiment
from orchestrator.findings import Finding
from orchestrator.preflight import tracking_stores
from orchestrator.preflight.tracking import check_tracking
from orchestrator.tracking.schema import revisions
from tests.builders.experiments import tiny_experiment


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def check(uri: str | None, *runs: str, **tracking: object) -> list[Finding]:
    return check_tracking(parse_experiment(tiny_experiment(tracking={"uri": uri, **tracking}), "test"), runs)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("sqlite://", "sqlite:///mlflow.db"),
        ("sqlite:///:memory:", "sqlite:///mlflow.db"),
        ("sqlite:mlflow.db", "sqlite:///mlflow.db"),
        ("sqlite:///~/mlflow.db", "~ is not expanded"),
        ("sqlite:///$HOME/mlflow.db", "$HOME is not replaced"),
        (" sqlite:///mlflow.db", "a space"),
        ("sqlite:////data/caf\udce9.db", "not UTF-8"),
        ("sqlite3:///mlflow.db", "MLflow knows no store sqlite3://"),
        ("htp://host:5000", "MLflow knows no store htp://"),
        ("s3://bucket/mlflow", "MLflow knows no store s3://"),
        ("postgres://user:secret@host/mlflow", "postgresql://"),
        ("localhost:5000", "http://localhost:5000"),
        ("10.0.0.1:5000/", "http://10.0.0.1:5000/"),
        ("http://[host", "not an address"),
        ("mlruns", "no longer writes plain folders"),
        ("/data/mlruns", "no longer writes plain folders"),
        ("file:///data/mlruns", "no longer writes plain folders"),
        (r"C:\mlruns", "no longer writes plain folders"),
    ],
)
@pytest.mark.parametrize("offline", [False, True])
def test_an_address_that_is_no_store_is_refused_with_what_to_write(uri: str, words: str, *, offline: bool) -> None:
    (finding,) = check(uri, offline=offline)
    assert (finding.level, finding.code, finding.file) == ("error", "tracking_store", "tracking.uri")
    assert words in f"{finding.what} {finding.hint}" and "secret" not in finding.to_line()


@pytest.mark.parametrize("uri", ["http://127.0.0.1:99999", "http://", "https://user:secret@", "http://" + "a" * 80])
def test_an_address_that_cannot_be_asked_is_one_line(uri: str) -> None:
    (finding,) = check(uri)
    assert finding.code == "tracking_unreachable" and "secret" not in finding.to_line()
    assert "\n" not in finding.to_line()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the experiment `tiny` is deleted, and another is not."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    client = MlflowClient(f"sqlite:///{path}")
    client.delete_experiment(client.create_experiment("tiny"))
    client.create_experiment("other")
    return path


@pytest.fixture
def store(database: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    path = tmp_path / "mlflow.db"
    path.write_bytes(database.read_bytes())
    return path


def execute(store: Path, statement: str, *values: str) -> None:
    with closing(sqlite3.connect(store)) as connection:
        connection.execute(statement, values)
        connection.commit()


def test_a_deleted_experiment_comes_with_the_command_that_restores_it(store: Path) -> None:
    (finding,) = check(f"sqlite:///{store}")
    assert (finding.level, finding.code, finding.file) == ("error", "tracking_deleted", "name")
    assert "the experiment 'tiny' was deleted" in finding.what and "another name" in finding.hint
    assert f"MLFLOW_TRACKING_URI=sqlite:///{store} mlflow experiments restore -x 1" in finding.hint
    MlflowClient(f"sqlite:///{store}").restore_experiment("1")
    assert check(f"sqlite:///{store}") == []


def test_a_deleted_run_that_is_gone_on_with_is_found(store: Path) -> None:
    client = MlflowClient(f"sqlite:///{store}")
    client.restore_experiment("1")
    kept, deleted = (client.create_run("1").info.run_id for _ in range(2))
    client.delete_run(deleted)
    (finding,) = check(f"sqlite:///{store}", kept, deleted)
    assert finding.code == "tracking_deleted" and f"mlflow runs restore --run-id {deleted}" in finding.hint


def test_the_tables_of_another_version_are_refused_with_what_to_do(store: Path) -> None:
    latest, known = revisions()
    for version, words in (("ffffffffffff", "a newer version"), (min(known - {latest}), "mlflow db upgrade")):
        execute(store, "UPDATE alembic_version SET version_num = ?", version)
        (finding,) = check(f"sqlite:///{store}")
        assert finding.code == "tracking_schema" and words in f"{finding.what} {finding.hint}"


def test_the_latest_version_is_the_one_that_mlflow_gives_a_new_store(store: Path) -> None:
    with closing(sqlite3.connect(store)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (revisions()[0],)


def test_a_locked_database_is_an_error_and_a_warning_offline(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_stores, "LOCK_TIMEOUT_SECONDS", 0.1)
    with closing(sqlite3.connect(store, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for offline, level in ((False, "error"), (True, "warning")):
            (finding,) = check(f"sqlite:///{store}", offline=offline)
            assert (finding.level, finding.code) == (level, "tracking_unreachable")
            assert "database is locked" in finding.what and "fuser" in finding.hint


def test_a_check_of_a_database_changes_nothing(store: Path) -> None:
    before = store.read_bytes()
    check(f"sqlite:///{store}")
    assert store.read_bytes() == before and [path.name for path in store.parent.iterdir()] == [store.name]


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("not a database at all, " * 100)
    (finding,) = check("sqlite:///notes.db")
    assert "file is not a database" in finding.what
    (tmp_path / "folder").mkdir()
    (finding,) = check("sqlite:///folder")
    assert "is a folder" in finding.what and "sqlite:///folder/mlflow.db" in finding.hint


def test_a_new_an_empty_and_a_foreign_database_are_fit(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    execute(tmp_path / "foreign.db", "CREATE TABLE experiments (name TEXT)")
    for name in ("new.db", "empty.db", "foreign.db", "folder/that/mlflow/makes.db"):
        assert check(f"sqlite:///{name}") == []
    assert not (tmp_path / "new.db").exists() and not (tmp_path / "folder").exists()


@pytest.fixture
def locked_folders(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Paths that cannot be written, as it would be for a user other than root."""
    paths: set[str] = set()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) not in paths and access(path, mode))
    return paths


def test_a_database_that_cannot_be_written_is_named(store: Path, locked_folders: set[str]) -> None:
    for place in (store, store.parent):
        locked_folders.clear()
        locked_folders.add(str(place))
        finding = check(f"sqlite:///{store}")[0]
        assert finding.code == "tracking_unwritable" and f"{place} cannot be written" in finding.what


def test_a_folder_for_artifacts_that_cannot_be_written_is_found(
    store: Path, tmp_path: Path, locked_folders: set[str], server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    locked_folders.add(str(elsewhere))
    (finding,) = check(f"sqlite:///{tmp_path}/new.db")
    assert finding.code == "tracking_unwritable" and f"artifacts go to {elsewhere}/mlruns" in finding.what
    MlflowClient(f"sqlite:///{store}").restore_experiment("1")
    assert check(f"sqlite:///{store}") == [], "the experiment's are where they were before"
    assert check(server) == []
    answer = {"experiment_id": "1", "lifecycle_stage": "active", "artifact_location": f"file://{elsewhere}/1"}
    Server.answers["experiments/get-by-name"] = (200, {"experiment": answer})
    (finding,) = check(server)
    assert f"artifacts go to {elsewhere}/1" in finding.what


class Server(BaseHTTPRequestHandler):
    """Answers like an MLflow server, or like what users take for one."""

    answers: ClassVar[dict[str, tuple[int, Any]]] = {}
    """Status and content by the end of the path."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        status, content = self.answers[parts.path.rpartition("mlflow/")[2]]
        if isinstance(content, dict) and "runs" in content:
            content = {"run": content["runs"].get(parse_qs(parts.query)["run_id"][0])}
        data = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with the experiment `tiny` that takes everything."""
    answers = {
        "experiments/search": (200, {}),
        "experiments/get-by-name": (404, missing()),
        "runs/get": (404, missing()),
    }
    monkeypatch.setattr(Server, "answers", answers)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def missing() -> dict[str, str]:
    return {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "No such thing"}


def test_a_server_without_the_experiment_is_fit(server: str) -> None:
    assert check(server, "a" * 32) == []


def test_a_server_on_which_the_experiment_or_a_run_is_deleted_is_found(server: str) -> None:
    Server.answers["runs/get"] = (200, {"runs": {"b": {"info": {"lifecycle_stage": "deleted"}}}})
    (finding,) = check(server, "b")
    assert f"MLFLOW_TRACKING_URI={server} mlflow runs restore --run-id b" in finding.hint
    Server.answers["experiments/get-by-name"] = (
        200, {"experiment": {"experiment_id": "7", "lifecycle_stage": "deleted"}}
    )  # fmt: skip
    (finding,) = check(server, "b")
    assert f"MLFLOW_TRACKING_URI={server} mlflow experiments restore -x 7" in finding.hint
    Server.answers["runs/get"] = (200, {"runs": {"b": {"info": {"experiment_id": "8"}}}})
    Server.answers["experiments/get"] = (200, {"experiment": {"experiment_id": "8", "lifecycle_stage": "active"}})
    assert check(server, "b") == [], "it is in another one, which had this name"


@pytest.mark.parametrize(
    ("call", "status", "content", "code", "words"),
    [
        (
            "experiments/search",
            401,
            "You are not authenticated.",
            "tracking_denied",
            "it asks for user and password (401)",
        ),
        ("experiments/search", 403, "Invalid Host header", "tracking_host", "--allowed-host 127.0.0.1"),
        ("experiments/search", 403, "Permission denied", "tracking_denied", "(403)"),
        ("experiments/get-by-name", 403, "Permission denied", "tracking_denied", "(403)"),
        ("experiments/search", 200, "<html>Sign in</html>", "tracking_unreachable", "this is not an MLflow server"),
        ("experiments/search", 404, "<html>\n\nNot found</html>", "tracking_unreachable", "it answers 404: <html> Not"),
        ("experiments/search", 503, {"error_code": "TEMPORARILY_UNAVAILABLE"}, "tracking_unreachable", "answers 503"),
    ],
)
def test_a_server_that_refuses_is_one_line(
    server: str, call: str, status: int, content: Any, code: str, words: str
) -> None:
    Server.answers[call] = (status, content)
    (finding,) = check(server)
    assert finding.code == code and words in finding.to_line() and "\n" not in finding.to_line()


def test_the_refusal_of_a_password_names_the_user_and_keeps_the_password(server: str) -> None:
    Server.answers["experiments/search"] = (401, "no")
    (finding,) = check(server.replace("//", "//alice:s3cret@"))
    assert "the user alice" in finding.what and "s3cret" not in finding.to_line()


def test_a_broken_file_of_credentials_is_named(server: str, tmp_path: Path) -> None:
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text("mlflow_tracking_username = alice\n")
    (finding,) = check(server)
    assert finding.code == "tracking_denied" and ".mlflow/credentials cannot be read" in finding.what


def test_variables_of_mlflow_that_have_no_effect_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check("sqlite:///new.db") == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@elsewhere:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    warnings = {finding.file: finding for finding in check("sqlite:///new.db")}
    assert warnings.keys() == {"MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"}
    assert {finding.level for finding in warnings.values()} == {"warning"}
    assert "tracking.uri is sqlite:///new.db" in warnings["MLFLOW_TRACKING_URI"].what
    assert "secret" not in warnings["MLFLOW_TRACKING_URI"].what


def test_the_store_of_the_environment_is_the_one_that_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    (finding,) = check(None)
    assert finding.code == "tracking_store" and finding.id == "mlruns"
