"""Checks that runs can be tracked where the experiment says, within seconds and without importing MLflow."""

from __future__ import annotations

import importlib.metadata
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from orchestrator.files import existing_parent, redact
from orchestrator.findings import Finding, FindingList
from orchestrator.preflight.tracking_stores import (
    DATABASES,
    StoreError,
    StoreState,
    ask_database,
    ask_server,
    ask_sqlite,
    sqlite_file,
)
from orchestrator.tracking.driver import Tracker, restore_command, tracking_uri

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.experiment.spec import Experiment

UNCHECKED = ("databricks", "databricks-uc", "uc")
"""Stores that MLflow knows and that are not looked into."""

IGNORED = {
    "MLFLOW_EXPERIMENT_NAME": "runs go to the experiment that `name` names",
    "MLFLOW_EXPERIMENT_ID": "runs go to the experiment that `name` names",
    "MLFLOW_RUN_ID": "every run and every trial has its own run in MLflow",
}
"""MLflow's variables that this program does not use, and what is done instead."""


def check_tracking(experiment: Experiment, runs: Sequence[str] = ()) -> list[Finding]:
    """Checks that runs can be tracked: the store takes them, nothing of them is deleted, several hosts can share it.

    Args:
        experiment: What is run.
        runs: MLflow's ids of the runs of an earlier start that is gone on with, the parent's first.
    """
    findings = FindingList()
    uri = tracking_uri(experiment.tracking.uri)
    _check_environment(experiment, findings)
    for finding in check_store(uri, experiment.name, runs):
        if finding.code in ("tracking_store", "tracking_unwritable"):  # nothing can be replayed there later either
            findings.add(finding)
        elif experiment.tracking.offline:
            findings.add(replace(finding, level="warning"))
        else:
            findings.add(replace(finding, hint=f"{finding.hint}; or set tracking.offline=true and replay later"))
    if uri.startswith("sqlite") and (experiment.resources.num_nodes or 1) > 1:
        what = "SQLite for a run on several hosts: only the driver's host sees the file, and it is lost with that host"
        hint = "Start `mlflow server` on a host that stays, and set tracking.uri to its address"
        report = findings.error if experiment.tracking.uri else findings.warning
        report("tracking_sqlite", str(sqlite_file(uri)), "tracking.uri", what, hint)
    return findings.to_list()


def check_store(uri: str, experiment: str, runs: Sequence[str] = ()) -> list[Finding]:
    """Checks that a store takes runs, and that an experiment (by name) and earlier runs (by id) are not deleted there.

    Where the first of the runs exists, its experiment is the one that is checked, whatever that is called by now.

    Returns:
        Errors.
    """
    findings, shown = FindingList(), redact(uri)
    try:
        state = _ask(uri, experiment, runs)
    except StoreError as problem:
        findings.error(problem.code, "tracking.uri", shown, redact(problem.what), problem.hint)
        return findings.to_list()
    if state.deleted_experiment:
        command = restore_command("experiment", state.deleted_experiment, uri)
        what = f"the experiment {experiment!r} was deleted there"
        findings.error("tracking_deleted", "name", shown, what, f"Restore it (`{command}`), or take another name")
    for run in state.deleted_runs:
        hint = f"Restore it (`{restore_command('run', run, uri)}`), or start a new run"
        findings.error("tracking_deleted", "tracking.uri", shown, f"the run {run} was deleted there", hint)
    if state.artifacts is None and not uri.startswith(("sqlite", *DATABASES)):
        return findings.to_list()  # a server decides where artifacts of a new experiment go
    place = (state.artifacts or str(Path.cwd() / "mlruns")).removeprefix("file://")
    if place.startswith("/") and not os.access(existing_parent(Path(place)), os.W_OK):
        what = f"the experiment's artifacts go to {place}, which cannot be written"
        hint = "Start the command in a folder that you may write, or take a server that stores artifacts"
        findings.error("tracking_unwritable", "tracking.uri", shown, what, hint)
    return findings.to_list()


def check_earlier_tracking(experiment: Experiment, run_dir: Path) -> list[Finding]:
    """Checks that a run that is gone on with can be tracked in the MLflow runs it has already."""
    return check_tracking(experiment, list(Tracker(run_dir, tracking_uri(experiment.tracking.uri)).run_ids().values()))


def _ask(uri: str, experiment: str, runs: Sequence[str]) -> StoreState:
    """What a run will meet in the store.

    Raises:
        StoreError: It does not take runs.
    """
    try:
        scheme = urlsplit(uri).scheme.split("+")[0]
    except ValueError as error:
        raise StoreError("tracking_store", f"it is not an address: {error}", "Write HOST:PORT after http://") from error
    if uri != uri.strip():
        raise StoreError("tracking_store", "a space before or after it", "Take the space out")
    if uri != uri.encode(errors="replace").decode():
        raise StoreError("tracking_store", "it is not UTF-8, and no record can hold it", "Take another name")
    if scheme in ("http", "https"):
        return ask_server(uri, experiment, runs)
    if scheme == "sqlite":
        return ask_sqlite(uri, experiment, runs)
    if scheme in DATABASES:
        return ask_database(uri, experiment, runs)
    plugins = {plugin.name for plugin in importlib.metadata.entry_points(group="mlflow.tracking_store")}
    if not plugins.union(UNCHECKED) & {scheme, uri}:
        raise _unknown_store(uri, scheme, plugins)
    return StoreState()


def _unknown_store(uri: str, scheme: str, plugins: set[str]) -> StoreError:
    if re.match(r"[\w.-]+:\d+(/|$)", uri):
        what, hint = "the address of a server begins with http:// or https://", f"Write http://{uri}"
    elif scheme == "postgres":
        what, hint = "MLflow knows no postgres://", "Write postgresql://"
    elif scheme in ("", "file") or "://" not in uri:
        what, hint = "MLflow 3 no longer writes plain folders", "Write sqlite:///mlflow.db, or the address of a server"
    else:
        known = ", ".join(sorted({"http", "https", "sqlite", *DATABASES, *UNCHECKED, *plugins}))
        what, hint = f"MLflow knows no store {scheme}://", f"Take one of {known}"
    return StoreError("tracking_store", what, hint)


def _check_environment(experiment: Experiment, findings: FindingList) -> None:
    """Warns of MLflow's variables that have no effect here."""
    for name, instead in IGNORED.items():
        if name in os.environ:
            findings.warning("tracking_variable", name, "", f"it has no effect: {instead}", f"Unset {name}")
    variable, configured = os.environ.get("MLFLOW_TRACKING_URI"), experiment.tracking.uri
    if variable and configured and variable.rstrip("/") != configured.rstrip("/"):
        what = f"{redact(variable)} has no effect: tracking.uri is {redact(configured)}"
        findings.warning("tracking_variable", "MLFLOW_TRACKING_URI", "", what, "Unset one of the two")
