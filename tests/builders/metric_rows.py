"""Looks for metric points that an MLflow store has twice."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path


def repeated_points(store: Path) -> list[tuple[str, str, int, int]]:
    """Run, metric, step and number of the points of which an SQLite store of MLflow's has more than one.

    Any other file has none.
    """
    if not store.read_bytes().startswith(b"SQLite format 3"):
        return []
    with closing(sqlite3.connect(f"{store.absolute().as_uri()}?mode=ro", uri=True)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"metrics", "runs"} <= tables:
            return []
        query = "SELECT run_uuid, key, step, COUNT(*) FROM metrics GROUP BY run_uuid, key, step HAVING COUNT(*) > 1"
        return list(database.execute(query))
