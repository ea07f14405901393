"""The root of the repository, and its commands run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_command(
    *arguments: object, cwd: Path, module: str = "orchestrator.run", **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs one of the program's commands as a user would, in the folder `cwd`: its output is buffered, too."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "", **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
