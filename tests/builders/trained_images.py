"""Notes on disk which images a worker trains on, one file for each process: what `$BENCHMARK_BEFORE_STEP` may name.

It is used on other hosts, where it is the only file of the tests: it imports nothing of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "TRAINED_IMAGES"
"""Names the folder for the notes."""


def recording() -> Callable[[], None]:
    """Has every batch noted once both passes over it are done: host, process, iteration, and ids of its images."""
    import ray

    from trainers.passes import Passes

    host, train_on = ray.util.get_node_ip_address(), Passes.train_on
    file = Path(os.environ[FOLDER_VARIABLE]) / f"{host}-{os.getpid()}.jsonl"

    def noted(self: Passes, inputs: Any, iteration: int, part: int = 0) -> Any:
        losses = train_on(self, inputs, iteration, part)
        note = {"host": host, "pid": os.getpid(), "iteration": iteration, "ids": [each["image_id"] for each in inputs]}
        with file.open("a", encoding="utf-8") as notes:
            notes.write(json.dumps(note) + "\n")
        return losses

    Passes.train_on = noted  # type: ignore[method-assign]
    return lambda: None
