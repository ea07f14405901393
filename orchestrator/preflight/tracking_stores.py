"""Asks an MLflow store whether it takes runs, and what of ours is deleted there, without importing MLflow."""

from __future__ import annotations

import base64
import configparser
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from orchestrator.experiment.paths import unreplaced_variable
from orchestrator.files import existing_parent, is_file, is_folder, redact, without_credentials
from orchestrator.findings import root_cause
from orchestrator.tracking.schema import revisions

CONNECT_TIMEOUT_SECONDS = 3.0

LOCK_TIMEOUT_SECONDS = 5.0
"""Other runs that are tracked in a SQLite file lock it for moments; MLflow itself waits for 20 s."""

START_HINT = "Start it (`make mlflow-server`), or correct the address"

DATABASES = {"postgresql": "connect_timeout", "mysql": "connect_timeout", "mssql": "timeout"}
"""Databases that MLflow writes to without a tracking server, and what their drivers call their time limit."""


class StoreError(Exception):
    """Why a store does not take runs: the parts of a finding."""

    def __init__(self, code: str, what: str, hint: str) -> None:
        super().__init__(what)
        self.code, self.what, self.hint = code, what, hint


@dataclass(frozen=True, slots=True)
class StoreState:
    """What a run will meet in a store."""

    deleted_experiment: str | None = None
    """Id of the experiment, if it is deleted and can be restored."""
    deleted_runs: Sequence[str] = ()
    """Ids of earlier runs that are deleted."""
    artifacts: str | None = None
    """Where the experiment's artifacts go; None for where MLflow puts those of a new one."""


def ask_server(uri: str, experiment: str, runs: Sequence[str]) -> StoreState:
    """Asks a tracking server, as a run will, for an experiment (by name) and earlier runs (by id).

    Raises:
        StoreError: It does not answer, is no MLflow server, or refuses us.
    """
    _call(uri, "experiments/search", max_results="1")
    infos = {run: _call(uri, "runs/get", run_id=run).get("run", {}).get("info", {}) for run in runs}
    if runs and (id := infos[runs[0]].get("experiment_id")):
        answer = _call(uri, "experiments/get", experiment_id=id)
    else:
        answer = _call(uri, "experiments/get-by-name", experiment_name=experiment)
    found = answer.get("experiment", {})
    if found.get("lifecycle_stage") == "deleted":
        return StoreState(deleted_experiment=str(found["experiment_id"]))
    deleted = [run for run, info in infos.items() if info.get("lifecycle_stage") == "deleted"]
    return StoreState(deleted_runs=deleted, artifacts=found.get("artifact_location"))


def _call(uri: str, call: str, **values: str) -> dict[str, Any]:
    """The answer to a call of MLflow's API; empty where what it asks for does not exist."""
    import requests

    parts = urlsplit(uri)
    user, headers = _credentials(parts.username, parts.password)
    is_insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    try:
        answer = requests.get(
            f"{without_credentials(uri).rstrip('/')}/api/2.0/mlflow/{call}",
            values,
            headers=headers,
            timeout=CONNECT_TIMEOUT_SECONDS,
            verify=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or not is_insecure,
        )
    except (OSError, ValueError) as error:  # RequestException, a certificate file that is missing, or no address
        what = f"no MLflow server answers within {CONNECT_TIMEOUT_SECONDS:g} s: {root_cause(error)[:120]}"
        raise StoreError("tracking_unreachable", what, START_HINT) from error
    try:
        content = answer.json()
    except ValueError:
        content = None
    if answer.ok and isinstance(content, dict):
        return content
    if isinstance(content, dict) and content.get("error_code") == "RESOURCE_DOES_NOT_EXIST":
        return {}
    if answer.status_code == 403 and "Host header" in answer.text:
        hint = f"Name it to the server: `--allowed-host {parts.hostname}` of `make mlflow-server`"
        raise StoreError("tracking_host", f"the server does not answer to the name {parts.hostname}", hint)
    if answer.status_code in (401, 403):
        what = f"it refuses the user {user} and the password given" if user else "it asks for user and password"
        hint = "Put them into ~/.mlflow/credentials on this host, which only the driver reads (docs/cluster.md)"
        raise StoreError("tracking_denied", f"{what} ({answer.status_code})", hint)
    what = f"it answers {answer.status_code}: {' '.join(answer.text.split())[:120]}"
    if content is None:
        what = f"this is not an MLflow server: {what}"
    raise StoreError("tracking_unreachable", what, START_HINT)


def _credentials(user: str | None, password: str | None) -> tuple[str | None, dict[str, str]]:
    """The user and header that MLflow's client sends: from the address, else the environment, else its file."""
    if user:
        user, password = unquote(user), unquote(password or "")
    else:
        user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if not user and not token:
        user, password = _credentials_file()
    if user:
        pair = f"{user}:{password or ''}".encode()
        return user, {"Authorization": "Basic " + base64.b64encode(pair).decode()}
    return None, {"Authorization": f"Bearer {token}"} if token else {}


def _credentials_file() -> tuple[str | None, str | None]:
    path, file = Path.home() / ".mlflow" / "credentials", configparser.ConfigParser(interpolation=None)
    try:
        file.read(path)
    except (configparser.Error, UnicodeError) as error:
        what = f"{path} cannot be read: {str(error).splitlines()[0]}"
        hint = "Write it as `[mlflow]`, mlflow_tracking_username = …, mlflow_tracking_password = …"
        raise StoreError("tracking_denied", what, hint) from error
    user, password = (file.get("mlflow", f"mlflow_tracking_{n}", fallback=None) for n in ("username", "password"))
    return user, password


def ask_database(uri: str, experiment: str, runs: Sequence[str]) -> StoreState:
    """Connects to a database and looks for an experiment (by name) and earlier runs (by id).

    Raises:
        StoreError: It does not answer, refuses us, or has another version's tables.
    """
    import sqlalchemy

    limit = {DATABASES[urlsplit(uri).scheme.split("+")[0]]: int(CONNECT_TIMEOUT_SECONDS)}
    try:
        with sqlalchemy.create_engine(uri, connect_args=limit).connect() as connection:
            if not sqlalchemy.inspect(connection).has_table("alembic_version"):
                return StoreState()  # MLflow will make its tables
            return _look_up(
                lambda sql, **values: connection.execute(sqlalchemy.text(sql), values), uri, experiment, runs
            )
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError) as error:
        # Without what SQLAlchemy adds: the driver's class, and links to SQLAlchemy's manual.
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0][:200]
        raise StoreError(
            "tracking_unreachable", redact(reason), "Start it, install its driver, or correct the address"
        ) from error


def sqlite_file(uri: str) -> Path:
    """The file of a SQLite store."""
    return Path(uri.split("?")[0].partition(":///")[2]).absolute()


def ask_sqlite(uri: str, experiment: str, runs: Sequence[str]) -> StoreState:
    """Opens a SQLite file and looks for an experiment (by name) and earlier runs (by id).

    Raises:
        StoreError: It cannot be written, is locked, is no SQLite database, or has another version's tables.
    """
    name = uri.split("?")[0].partition(":///")[2]
    path = Path(name).absolute()
    if not name or ":memory:" in name:
        raise StoreError("tracking_store", "it names no file", "Write sqlite:///mlflow.db")
    if name.startswith("~"):
        home = os.path.expanduser(name)  # noqa: PTH111 - Path.expanduser() may raise
        raise StoreError("tracking_store", "~ is not expanded there", f"Write sqlite:///{home}")
    if variable := unreplaced_variable(path):
        what = f"{variable} is not replaced by the variable's value there"
        raise StoreError("tracking_store", what, "Write the path out")
    if is_folder(path):
        raise StoreError("tracking_store", f"{path} is a folder", f"Write {uri.rstrip('/')}/mlflow.db")
    for each in (existing_parent(path.parent), path):  # SQLite keeps its journal next to the file
        if os.path.exists(each) and not os.access(each, os.W_OK):  # noqa: PTH110 - Path.exists() may raise
            raise StoreError(
                "tracking_unwritable", f"{each} cannot be written", "Name a file in a folder you may write"
            )
    if not is_file(path) or not path.stat().st_size:
        return StoreState()  # MLflow will make it
    with _writable(path) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
            return StoreState()
        return _look_up(lambda sql, **values: connection.execute(sql, values), uri, experiment, runs)


@contextmanager
def _writable(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a SQLite file that holds the lock of a writer, and changes nothing."""
    try:
        with closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT_SECONDS, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        hint = "Name another file"
        if "locked" in str(error):
            hint = "End what uses it (`fuser` names it), or name another file"
        raise StoreError("tracking_unreachable", f"{path}: {error}", hint) from error


def _look_up(select: Callable[..., Any], uri: str, experiment: str, runs: Sequence[str]) -> StoreState:
    """Looks into MLflow's tables, by `select(SQL, name=value)`."""
    (version,) = select("SELECT version_num FROM alembic_version").fetchone() or (None,)
    latest, known = revisions()
    is_old = version in known - {latest}
    if version is None or (is_old and select("SELECT COUNT(*) FROM experiments").fetchone()[0] == 0):
        # MLflow was cut off while it made its tables, after which it makes its default experiment.
        return StoreState()
    if latest and version not in known:
        hint = "Update MLflow here (pyproject.toml, `make lock`), or name another database"
        raise StoreError("tracking_schema", "a newer version of MLflow made its tables", hint)
    if latest and version != latest:
        hint = f"Back it up, then run `mlflow db upgrade {without_credentials(uri)}`, or name another database"
        raise StoreError("tracking_schema", "an older version of MLflow made its tables", hint)
    of_run = (
        "SELECT e.experiment_id, e.lifecycle_stage, e.artifact_location "
        "FROM experiments e JOIN runs r ON r.experiment_id = e.experiment_id WHERE r.run_uuid = :run"
    )
    named = "SELECT experiment_id, lifecycle_stage, artifact_location FROM experiments WHERE name = :name"
    found = select(of_run, run=runs[0]).fetchone() if runs else None
    id, stage, artifacts = found or select(named, name=experiment).fetchone() or (None, "", None)
    if stage == "deleted":
        return StoreState(deleted_experiment=str(id))
    stages = "SELECT lifecycle_stage FROM runs WHERE run_uuid = :run"
    deleted = [run for run in runs if select(stages, run=run).fetchone() == ("deleted",)]
    return StoreState(deleted_runs=deleted, artifacts=artifacts)
