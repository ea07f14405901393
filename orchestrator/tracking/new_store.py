"""Makes the SQLite database of a new store, whole or not at all."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path


def make_store(uri: str, connect: Callable[[str], object]) -> None:
    """Makes the tables of a SQLite store that has none yet; does nothing for any other store.

    MLflow makes its tables in dozens of steps; where it is cut off in one of them, it often cannot go on later. So they
    are made elsewhere and copied all at once.

    Args:
        uri: The store's address.
        connect: Connects to the store at an address, and has MLflow make its tables there.

    Raises:
        Exception: Whatever MLflow, SQLite or the operating system say where it cannot be made.
    """
    path = Path(uri.partition(":///")[2])
    if not uri.startswith("sqlite") or "?" in uri or (path.is_file() and path.stat().st_size):
        return
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "mlflow.db")
        connect(f"sqlite:///{made}")
        _copy(made, path)


def _copy(made: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(made)) as source, closing(sqlite3.connect(path, isolation_level=None)) as target:
        target.execute("BEGIN IMMEDIATE")
        if not target.execute("SELECT 1 FROM sqlite_master").fetchone():  # else another run has been faster
            for statement in source.iterdump():
                if statement not in ("BEGIN TRANSACTION;", "COMMIT;"):
                    target.execute(statement)
        target.execute("COMMIT")
