"""Checks that runs can be tracked where the experiment says, within seconds and without importing MLflow."""

from __future__ import annotations

import base64
import configparser
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

from orchestrator.files import redact
from orchestrator.findings import Finding, FindingList

if TYPE_CHECKING:
    from orchestrator.experiment.spec import Experiment

CONNECT_TIMEOUT_SECONDS = 3.0

DATABASES = {"postgresql": "connect_timeout", "mysql": "connect_timeout", "mssql": "timeout"}
"""Database servers that MLflow writes to without a server of its own, and what their drivers call their time limit."""


def check_tracking(experiment: Experiment) -> list[Finding]:
    """Checks the tracking address: a server answers, a database file can be written, and several hosts can share it."""
    findings = FindingList()
    uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    shown = redact(uri)
    report = findings.warning if experiment.tracking.offline else findings.error
    if uri.startswith(("http://", "https://")):
        problem = _ask_server(uri)
        if problem:
            code, what, hint = problem
            report(code, "tracking.uri", shown, what, hint)
    elif uri.startswith("sqlite:"):
        _check_sqlite(uri, experiment, findings)
    elif urlsplit(uri).scheme.split("+")[0] in DATABASES:
        reason = _ask_database(uri)
        if reason:
            hint = "Start it, install its driver, correct tracking.uri, or set tracking.offline=true and replay later"
            report("tracking_unreachable", "tracking.uri", shown, redact(reason), hint)
    elif uri.startswith("file:") or "://" not in uri:
        hint = "Write sqlite:///mlflow.db, or the address of a server"
        findings.error("tracking_store", "tracking.uri", shown, "MLflow 3 no longer writes plain folders", hint)
    return findings.to_list()


def _ask_server(uri: str) -> tuple[str, str, str] | None:
    """Asks a server for its experiments as a run will; gives code, reason and hint of a refusal, or None."""
    parts = urlsplit(uri)
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
    user, headers = _credentials(parts.username, parts.password)
    request = urllib.request.Request(f"{bare}/api/2.0/mlflow/experiments/search?max_results=1", headers=headers)  # noqa: S310
    start = "Start it (`make mlflow-server`), correct tracking.uri, or set tracking.offline=true and replay later"
    try:
        with urllib.request.urlopen(request, timeout=CONNECT_TIMEOUT_SECONDS) as answer:  # noqa: S310 - http(s)
            answer.read(100)
    except urllib.error.HTTPError as error:
        text = error.read(200).decode(errors="replace").strip()
        if error.code == 403 and "Host header" in text:
            hint = f"Name it to the server: `--allowed-host {parts.hostname}` of `make mlflow-server`"
            return "tracking_host", f"the server does not answer to the name {parts.hostname}", hint
        if error.code in (401, 403):
            given = f"it refuses the user {user} and the password given" if user else "it asks for user and password"
            hint = "Put them into ~/.mlflow/credentials on this host, for the driver alone (docs/cluster.md)"
            return "tracking_denied", f"{given} ({error.code})", hint
        return "tracking_unreachable", f"it answers {error.code}: {text[:120]}", start
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))[:120] or type(error).__name__
        return "tracking_unreachable", f"no MLflow server answers within {CONNECT_TIMEOUT_SECONDS:g} s: {reason}", start
    return None


def _ask_database(uri: str) -> str:
    """Connects to a database as a run will; gives the reason why it cannot be, or ""."""
    import sqlalchemy

    try:
        limit = {DATABASES[urlsplit(uri).scheme.split("+")[0]]: int(CONNECT_TIMEOUT_SECONDS)}
        sqlalchemy.create_engine(uri, connect_args=limit).connect().close()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        # Without what SQLAlchemy adds: the driver's class, and links to its own manual.
        return str(getattr(error, "orig", None) or error).strip().splitlines()[0][:200]
    return ""


def _credentials(user: str | None, password: str | None) -> tuple[str | None, dict[str, str]]:
    """User and header of what MLflow's client sends: of the address, else the environment, else its file."""
    if user:
        user, password = unquote(user), unquote(password or "")
    else:
        user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if not user and not token:
        read = configparser.ConfigParser(interpolation=None)
        read.read(Path.home() / ".mlflow" / "credentials")
        user, password = (
            read.get("mlflow", f"mlflow_tracking_{name}", fallback=None) for name in ("username", "password")
        )
    if user:
        pair = f"{user}:{password or ''}".encode()
        return user, {"Authorization": "Basic " + base64.b64encode(pair).decode()}
    return None, {"Authorization": f"Bearer {token}"} if token else {}


def _check_sqlite(uri: str, experiment: Experiment, findings: FindingList) -> None:
    place = uri.split("?")[0].removeprefix("sqlite:///")
    path = Path(place or "mlflow.db").absolute()
    folder = path.parent
    writable = os.access(path, os.W_OK) if path.exists() else os.access(folder, os.W_OK)
    if not folder.is_dir() or not writable:
        what = "the folder is not there" if not folder.is_dir() else "it cannot be written"
        findings.error("tracking_unwritable", str(path), "tracking.uri", what, "Name a file in a folder you may write")
    if (experiment.resources.num_nodes or 1) > 1:
        what = "SQLite for a run on several hosts: only the driver's host sees the file, and it is lost with that host"
        hint = "Start `mlflow server` on a host that stays, and set tracking.uri to its address"
        report = findings.error if experiment.tracking.uri else findings.warning
        report("tracking_sqlite", str(path), "tracking.uri", what, hint)
