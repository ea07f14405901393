"""Keeps what every worker of an attempt was doing when some were found stuck, before these are killed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from orchestrator.execution.nodes import call_on_nodes, list_nodes
from trainers import stacks
from trainers.contract.events import WorkerStarted

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 15.0
"""Longest wait for all nodes: one that is lost does not answer."""


def save_stacks(workers: Sequence[WorkerStarted], trial_dir: str) -> str:
    """Writes `stuck-attemptN-rankR.txt` into a trial's folder, for every worker that is still there.

    Args:
        workers: Those of one attempt.
        trial_dir: The trial's folder; it is not made where it is gone.

    Returns:
        The files' names for a message, with `*` for the rank; "" where there is none.
    """
    hosted = {node: {w.pid: w for w in workers if w.pid and w.node_id == node.id} for node in list_nodes()}
    calls = {node: (list(pids),) for node, pids in hosted.items() if pids}
    names = ""
    for node, outcome in call_on_nodes(stacks.request, calls, TIMEOUT_SECONDS).items():
        if isinstance(outcome, Exception):
            logger.warning("%s does not say what its workers are doing: %s", node.host, outcome)
            continue
        for pid, text in outcome.items():
            worker = hosted[node][pid]
            name = f"stuck-attempt{worker.attempt}-rank{{}}.txt"
            with suppress(OSError):
                heading = f"rank {worker.rank} on {worker.host}, when a rank was found stuck\n"
                (Path(trial_dir) / name.format(worker.rank)).write_text(heading + text, encoding="utf-8")
                names = name.format("*")
    return names
