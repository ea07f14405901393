"""Keeps what every worker of an attempt was doing when some were found stuck, before these are killed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from orchestrator.execution.nodes import call_on_nodes, list_nodes
from trainers import flight_recorder, stacks
from trainers.contract.events import WorkerStarted

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 20.0
"""Longest wait for all nodes: one that is lost does not answer."""


def save_stuck(workers: Sequence[WorkerStarted], trial_dir: str) -> str:
    """Writes `stuck-attemptN-rankR.txt` into a trial's folder, for every worker that is still there.

    Where they use NCCL, `stuck-attemptN-rankR.nccl` has torch's record of their last collectives.

    Args:
        workers: Those of one attempt.
        trial_dir: The trial's folder; it is not made where it is gone.

    Returns:
        The files' names for a message, with `*` for the rank; "" where there is none.
    """
    hosted = {node: {w.pid: w for w in workers if w.pid and w.node_id == node.id} for node in list_nodes()}
    calls = {node: (list(pids),) for node, pids in hosted.items() if pids}
    names = ""
    for node, outcome in call_on_nodes(_ask, calls, TIMEOUT_SECONDS).items():
        if isinstance(outcome, Exception):
            logger.warning("%s does not say what its workers are doing: %s", node.host, outcome)
            continue
        for pid, (text, record) in outcome.items():
            worker = hosted[node][pid]
            name = f"stuck-attempt{worker.attempt}-rank"
            with suppress(OSError):
                path = Path(trial_dir) / f"{name}{worker.rank}"
                heading = f"rank {worker.rank} on {worker.host}, when a rank was found stuck\n"
                path.with_suffix(".txt").write_text(heading + text, encoding="utf-8")
                names = f"{name}*"
                if record:
                    path.with_suffix(".nccl").write_bytes(record)
    return names


def _ask(pids: Sequence[int]) -> dict[int, tuple[str, bytes | None]]:
    """What processes of this node are doing, and which collectives they have come to."""
    texts = stacks.request(pids)
    with ThreadPoolExecutor(max_workers=len(pids)) as pool:
        records = dict(zip(pids, pool.map(flight_recorder.fetch, pids), strict=True))
    return {pid: (text, records[pid]) for pid, text in texts.items()}
