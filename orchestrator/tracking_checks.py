"""Checks that runs can be tracked where the experiment says, within seconds and without importing MLflow."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.findings import Finding, FindingList
from orchestrator.model_checks import redact

if TYPE_CHECKING:
    from orchestrator.spec import Experiment

REACH_SECONDS = 3.0


def check_tracking(experiment: Experiment) -> list[Finding]:
    """Checks the tracking address: a server answers, a database file can be written, and several hosts can share it."""
    findings = FindingList()
    uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    shown = redact(uri)
    report = findings.warning if experiment.tracking.offline else findings.error
    if uri.startswith(("http://", "https://")):
        reason = _reach(uri)
        if reason:
            what = f"no MLflow server answers within {REACH_SECONDS:g} s: {reason}"
            mend = "Start it (`mlflow server`), correct tracking.uri, or set tracking.offline=true and replay later"
            report("tracking_unreachable", "tracking.uri", shown, what, mend)
    elif uri.startswith("sqlite:"):
        _check_sqlite(uri, experiment, findings)
    elif uri.startswith("file:") or "://" not in uri:
        mend = "Write sqlite:///mlflow.db, or the address of a server"
        findings.error("tracking_store", "tracking.uri", shown, "MLflow 3 no longer writes plain folders", mend)
    return findings.to_list()


def _reach(uri: str) -> str:
    """Asks a server for its health; gives the reason why it does not answer, or ""."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=REACH_SECONDS) as answer:  # noqa: S310 - http(s)
            answer.read(100)
    except urllib.error.HTTPError as error:
        # It answers, so it is there; whether it lets us in shows at the first call, with its own words.
        return "" if error.code in (401, 403) else f"it answers {error.code}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return str(reason)[:120] or type(error).__name__
    return ""


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
        mend = "Start `mlflow server` on a host that stays, and set tracking.uri to its address"
        report = findings.error if experiment.tracking.uri else findings.warning
        report("tracking_sqlite", str(path), "tracking.uri", what, mend)
