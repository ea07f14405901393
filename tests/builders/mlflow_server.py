"""A real MLflow server on a database that outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.builders.waiting import wait_until_served


class MlflowServer:
    """Runs within its `with` block, and may be killed and started again meanwhile."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.database = folder / "server.db"

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store = f"sqlite:///{self.database}"
        arguments = ["server", "--backend-store-uri", store, "--artifacts-destination", str(self.folder / "artifacts")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *arguments, "--port", str(self.port), "--workers", "1"],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to all its processes."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kills it, as nothing that is stopped in order would be."""
        self.send(signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> str:
        self.start()
        wait_until_served(f"{self.uri}/health", self.process)
        return self.uri

    def __exit__(self, *error: object) -> None:
        self.kill()
