"""Checks that Ray can start on this machine, or that its cluster's address is one, before Ray is asked."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.experiment.environment import cluster_address
from orchestrator.files import existing_parent
from orchestrator.findings import Finding, FindingList

if TYPE_CHECKING:
    from orchestrator.experiment.spec import Experiment

CONNECT_TIMEOUT_SECONDS = 5.0
"""Longest wait for a cluster's head to accept a connection: Ray itself tries for more than half a minute."""

ADDRESS = re.compile(r"(?P<scheme>ray://)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")

HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
"""How an HTTP/2 connection, and so one of gRPC, begins: the preface and an empty frame of settings (RFC 9113, 3.4)."""

MAX_SOCKET_PATH = 107
"""Bytes of the name of a Unix socket on Linux, without the zero at its end."""

SOCKETS = ("plasma_store", "dash_MetricsHead")
"""Longest of Ray's names of sockets, without and with its dashboard."""

MIN_FREE_BYTES = 64 * 2**20
"""Space for the logs that Ray writes during a run."""


def check_ray(experiment: Experiment) -> list[Finding]:
    """Checks the address of the cluster to join, or where none is named, the folder in which Ray starts one."""
    findings = FindingList()
    address = cluster_address(experiment.resources.address)
    if os.environ.get("RAY_TRAIN_V2_ENABLED", "1").lower() not in ("1", "true"):
        hint = "Unset RAY_TRAIN_V2_ENABLED"
        findings.error("ray_setting", "RAY_TRAIN_V2_ENABLED", "", "this program needs version 2 of Ray Train", hint)
    if address is None:
        _check_folder(findings, dashboard=experiment.resources.dashboard)
    elif address != "auto":
        _check_address(address, "resources.address" if experiment.resources.address else "RAY_ADDRESS", findings)
    return findings.to_list()


def _check_address(address: str, place: str, findings: FindingList) -> None:
    found = ADDRESS.fullmatch(address)
    if address.startswith(("http://", "https://")):
        hint = f"Send the run there with `make submit ADDRESS={address}`, or name the cluster as HOST:6379"
        findings.error("ray_address", place, address, "this is the address of a job server", hint)
    elif found is None or not 0 < int(found["port"]) < 2**16:
        host = re.sub(r"^\w+://|:.*$|/.*$|\s", "", address) or "HOST"
        what = f"{address!r} is not the address of a Ray cluster"
        findings.error("ray_address", place, "", what, f"Write HOST:PORT, such as {host}:6379, or `auto`")
    elif reason := _reason_silent(found["host"].strip("[]"), int(found["port"])):
        hint = "Start one there (`ray start --head`), correct the address, or leave it out for a local cluster"
        findings.error("ray_unreachable", place, address, f"the cluster there cannot be joined: {reason}", hint)


def _reason_silent(host: str, port: int) -> str:
    """Why no gRPC server answers, as Ray's are, or "": Ray itself would wait for minutes."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true"):
                return ""
            connection.sendall(HTTP2_GREETING)
            answer = connection.recv(9)
    except (OSError, UnicodeError) as error:
        return f"{error}"
    # The type of the first frame; HTTP/2 begins with its settings.
    return "" if answer[3:4] == b"\x04" else "what listens there is not Ray (its dashboard has another port)"


def _check_folder(findings: FindingList, *, dashboard: bool) -> None:
    """Checks the folder that Ray's sessions lie in: `ray` in $RAY_TMPDIR, else $TMPDIR, else /tmp."""
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "")
    value = os.environ.get(variable, "/tmp")  # noqa: S108 - Ray's own choice
    place, hint = variable or "temporary folder", "Export RAY_TMPDIR=/tmp, or another short folder that you may write"
    folder = Path(value, "ray")
    session = f"session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"  # noqa: DTZ005 - as Ray names it
    length = len(os.fsencode(folder / session / "sockets" / SOCKETS[dashboard]))
    if not folder.is_absolute():
        findings.error("ray_folder", place, value, "Ray needs an absolute path", hint)
    elif length > MAX_SOCKET_PATH:
        what = f"too long for Ray's sockets: their paths would have {length} bytes, Linux takes {MAX_SOCKET_PATH}"
        findings.error("ray_folder", place, value, f"{what} ({length - MAX_SOCKET_PATH} too many)", hint)
    elif reason := _reason_unusable(folder):
        findings.error("ray_folder", place, value, f"Ray cannot start there: {reason}", hint)


def _reason_unusable(folder: Path) -> str:
    """Why no files can be made in a folder that exists or can be made, or ""."""
    try:
        parent = existing_parent(folder)
        with tempfile.TemporaryFile(dir=parent):
            free = shutil.disk_usage(parent).free
    except OSError as error:
        return f"{error.strerror or error}"
    return f"{free / 2**20:.0f} MiB are free, it needs {MIN_FREE_BYTES / 2**20:.0f}" if free < MIN_FREE_BYTES else ""
