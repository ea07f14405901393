"""The versions of MLflow's database tables that the installed MLflow knows, read without importing it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path


def revisions() -> tuple[str, set[str]]:
    """The revision that the installed MLflow works with, and all it knows; "" and none where they cannot be found."""
    package = importlib.util.find_spec("mlflow")
    if package is None or package.origin is None:
        return "", set()
    # Each file changes the tables from one revision to the next (Alembic, the tool MLflow uses).
    steps = Path(package.origin).parent.glob("store/db_migrations/versions/*.py")
    text = "\n".join(step.read_text(encoding="utf-8") for step in steps)
    known, before = (set(re.findall(rf'^{name} = "(\w+)"', text, re.M)) for name in ("revision", "down_revision"))
    latest = known - before
    return (latest.pop(), known) if len(latest) == 1 else ("", set())
