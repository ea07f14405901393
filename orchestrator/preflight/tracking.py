"""Checks that runs can be tracked where the experiment says, within seconds and without importing MLflow."""

from __future__ import annotations

import base64
import configparser
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from orchestrator.files import redact, without_credentials
from orchestrator.findings import Finding, FindingList, root_cause

if TYPE_CHECKING:
    from orchestrator.experiment.spec import Experiment

CONNECT_TIMEOUT_SECONDS = 3.0

START_HINT = "Start it (`make mlflow-server`), correct tracking.uri, or set tracking.offline=true and replay later"

DATABASES = {"postgresql": "connect_timeout", "mysql": "connect_timeout", "mssql": "timeout"}
"""Databases that MLflow writes to without a tracking server, and what their drivers call their time limit."""


def check_tracking(experiment: Experiment) -> list[Finding]:
    """Checks that the tracking server answers or the database can be written, and that several hosts can share it."""
    findings = FindingList()
    uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    shown = redact(uri)
    report = findings.warning if experiment.tracking.offline else findings.error
    if uri.startswith(("http://", "https://")):
        if problem := _ask_server(uri):
            code, what, hint = problem
            report(code, "tracking.uri", shown, what, hint)
    elif uri.startswith("sqlite:"):
        _check_sqlite(uri, experiment, findings)
    elif urlsplit(uri).scheme.split("+")[0] in DATABASES:
        if reason := _ask_database(uri):
            hint = "Start it, install its driver, correct tracking.uri, or set tracking.offline=true and replay later"
            report("tracking_unreachable", "tracking.uri", shown, redact(reason), hint)
    elif uri.startswith("file:") or "://" not in uri:
        hint = "Write sqlite:///mlflow.db, or the address of a server"
        findings.error("tracking_store", "tracking.uri", shown, "MLflow 3 no longer writes plain folders", hint)
    return findings.to_list()


def _ask_server(uri: str) -> tuple[str, str, str] | None:
    """Asks a server for its experiments, as a run will; returns code, what and hint of a finding, or None."""
    import requests

    parts = urlsplit(uri)
    user, headers = _credentials(parts.username, parts.password)
    is_insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    try:
        answer = requests.get(
            f"{without_credentials(uri).rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1",
            headers=headers,
            timeout=CONNECT_TIMEOUT_SECONDS,
            verify=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or not is_insecure,
        )
    except OSError as error:  # RequestException, or a certificate file that is missing
        what = f"no MLflow server answers within {CONNECT_TIMEOUT_SECONDS:g} s: {root_cause(error)[:120]}"
        return "tracking_unreachable", what, START_HINT
    if answer.ok:
        return None
    if answer.status_code == 403 and "Host header" in answer.text:
        hint = f"Name it to the server: `--allowed-host {parts.hostname}` of `make mlflow-server`"
        return "tracking_host", f"the server does not answer to the name {parts.hostname}", hint
    if answer.status_code in (401, 403):
        what = f"it refuses the user {user} and the password given" if user else "it asks for user and password"
        hint = "Put them into ~/.mlflow/credentials on this host, which only the driver reads (docs/cluster.md)"
        return "tracking_denied", f"{what} ({answer.status_code})", hint
    return "tracking_unreachable", f"it answers {answer.status_code}: {answer.text.strip()[:120]}", START_HINT


def _ask_database(uri: str) -> str:
    """Connects to a database, as a run will; returns the reason why that fails, or ""."""
    import sqlalchemy

    try:
        limit = {DATABASES[urlsplit(uri).scheme.split("+")[0]]: int(CONNECT_TIMEOUT_SECONDS)}
        sqlalchemy.create_engine(uri, connect_args=limit).connect().close()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        # Without what SQLAlchemy adds: the driver's class, and links to SQLAlchemy's manual.
        return str(getattr(error, "orig", None) or error).strip().splitlines()[0][:200]
    return ""


def _credentials(user: str | None, password: str | None) -> tuple[str | None, dict[str, str]]:
    """The user and header that MLflow's client sends: from the address, else the environment, else its file."""
    if user:
        user, password = unquote(user), unquote(password or "")
    else:
        user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if not user and not token:
        file = configparser.ConfigParser(interpolation=None)
        file.read(Path.home() / ".mlflow" / "credentials")
        user, password = (file.get("mlflow", f"mlflow_tracking_{n}", fallback=None) for n in ("username", "password"))
    if user:
        pair = f"{user}:{password or ''}".encode()
        return user, {"Authorization": "Basic " + base64.b64encode(pair).decode()}
    return None, {"Authorization": f"Bearer {token}"} if token else {}


def _check_sqlite(uri: str, experiment: Experiment, findings: FindingList) -> None:
    path = Path(uri.split("?")[0].removeprefix("sqlite:///") or "mlflow.db").absolute()
    folder = path.parent
    if not os.access(path if path.exists() else folder, os.W_OK):
        what = "it cannot be written" if folder.is_dir() else "the folder does not exist"
        findings.error("tracking_unwritable", str(path), "tracking.uri", what, "Name a file in a folder you may write")
    if (experiment.resources.num_nodes or 1) > 1:
        what = "SQLite for a run on several hosts: only the driver's host sees the file, and it is lost with that host"
        hint = "Start `mlflow server` on a host that stays, and set tracking.uri to its address"
        report = findings.error if experiment.tracking.uri else findings.warning
        report("tracking_sqlite", str(path), "tracking.uri", what, hint)
