"""The environment a result was made in: git commit, versions, host, command. An allow-list keeps secrets out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from orchestrator.files import without_credentials

PACKAGES = ("ray", "torch", "torchvision", "detectron2", "sal-detectron2", "pycocotools", "mlflow", "numpy")

VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
"""Environment variables that are recorded; no other is."""

DASHBOARD = "ray_dashboard"
"""Key of the run's page in Ray's dashboard, where there is one."""

found: dict[str, str] = {}
"""What this process finds out after its start, such as `DASHBOARD`; part of its environment from then on."""

CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""Environment variables that give access to the tracking server, which only the driver has."""


def describe(argv: list[str]) -> dict[str, str]:
    """The environment of this process, which was started by the command line `argv`; without secrets."""
    environment = {
        "command": shlex.join(argv),
        "host": platform.node(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "cpus": str(os.cpu_count()),
        **_job(),
        **_git(),
        **package_versions(),
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
        **found,
    }
    return {key: _as_utf8(text) for key, text in environment.items()}


def package_versions() -> dict[str, str]:
    """Versions of the packages that figures depend on; those that are not installed are left out."""
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def package_hashes(names: Iterable[str] | None = None) -> dict[str, str]:
    """The packages of these names, or all, that are installed, by name: `VERSION sha256:HASH`.

    The hash is over the hashes of its files, as its RECORD lists them: another build of the same version has another
    one. What the installation adds (bytecode, scripts, notes of the installer) does not count. A package without a
    RECORD has no hash.
    """
    found: dict[str, str] = {}
    for package in importlib.metadata.distributions() if names is None else _installed(names):
        lines = (package.read_text("RECORD") or "").splitlines()
        files = sorted(line for line in lines if ",sha256=" in line and ".dist-info/" not in line and line[:2] != "..")
        content = "\n".join(files).encode()
        digest = f" sha256:{hashlib.sha256(content).hexdigest()}" if files else ""
        found.setdefault(str(package.metadata["Name"]), f"{package.version}{digest}")
    return dict(sorted(found.items()))


def _installed(names: Iterable[str]) -> Iterator[importlib.metadata.Distribution]:
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            yield importlib.metadata.distribution(name)


def command_line() -> list[str]:
    """This process's command, as one would type it, without the user and password in an address; it is UTF-8."""
    main = sys.modules["__main__"].__spec__
    command = ["python", "-m", main.name, *sys.argv[1:]] if main else ["python", *sys.argv]
    return [_as_utf8(without_credentials(part)) for part in command]


def _as_utf8(text: str) -> str:
    r"""Text that JSON can hold: a byte that was not UTF-8, which Python keeps as half a character, becomes `\udcXX`."""
    return text.encode(errors="backslashreplace").decode()


def cluster_address(configured: str | None) -> str | None:
    """The Ray cluster to join: the one configured, else the one this job runs in; None where a local one is started."""
    address = configured or os.environ.get("RAY_ADDRESS")
    return None if address in ("", "local") else address


def _job() -> dict[str, str]:
    """The Ray job around this process: its id and its metadata, such as the commit of the code."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    metadata = {str(key): str(value) for key, value in job.get("metadata", {}).items()}
    names = {"job_submission_id": "ray_job_id", "git_commit": "git_commit"}
    return {names.get(key, f"ray_job.{key}"): value for key, value in metadata.items() if key != "job_name"}


def _git() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(root), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return {}
    return {"git_commit": commit, "git_dirty": str(bool(git("status", "--porcelain"))).lower()}
