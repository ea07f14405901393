"""What the end of a worker was, from what Ray and Ray Train raise for it."""

from __future__ import annotations

from collections.abc import Sequence

from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import PreemptionError, WorkerGroupError

from orchestrator.execution.cluster import is_local
from orchestrator.execution.nodes import call_on_nodes, list_nodes
from orchestrator.execution.ray_internals import cause_of_death
from trainers.contract.events import FailureKind, WorkerStarted
from trainers.contract.memory import is_out_of_memory, oom_kills, oom_kills_text
from trainers.contract.storage import is_storage_failure

OOM_KILLS_TIMEOUT_SECONDS = 5.0
"""Longest wait for the nodes of lost workers to say whether the kernel has killed any."""


def death(reason: Exception, killed: str = "") -> tuple[FailureKind, str]:
    """The kind of failure that ended a worker's process, and a sentence.

    Args:
        reason: What Ray says about it; an OutOfMemoryError where Ray's own monitor of memory ended the process.
        killed: What `killed_for_memory` says of this worker; "" for nothing.
    """
    text = str(reason)
    kind: FailureKind = "out_of_memory" if killed or isinstance(reason, OutOfMemoryError) else "worker_lost"
    return kind, f"its process died: {killed or (text.splitlines()[0] if text else type(reason).__name__)}"


def killed_for_memory(workers: Sequence[WorkerStarted]) -> dict[int, str]:
    """What the nodes of lost workers say of processes that the kernel killed since these workers began, by rank.

    Ray does not know which signal ended a process. Ranks whose node has seen no such kill, or does not answer, are left
    out.
    """
    homes = {worker.node_id for worker in workers if worker.oom_kills is not None}
    if is_local():  # in this process's control group; a call may have to wait for a process to start
        counts: dict[str, object] = dict.fromkeys(homes, oom_kills())
    else:
        nodes = {node: () for node in list_nodes() if node.id in homes}
        counts = {node.id: count for node, count in call_on_nodes(oom_kills, nodes, OOM_KILLS_TIMEOUT_SECONDS).items()}
    texts = {
        worker.rank: oom_kills_text(worker.oom_kills, count)
        for worker in workers
        if isinstance(count := counts.get(worker.node_id), int)
    }
    return {rank: text for rank, text in texts.items() if text}


def kind_of(error: BaseException | None) -> FailureKind:
    """The kind of failure that an exception is which the worker could not report, or which is Ray's own."""
    if error is None:
        return "unknown"
    return "out_of_memory" if is_out_of_memory(error) else "storage" if is_storage_failure(error) else "unknown"


def is_preemption(error: Exception | None) -> bool:
    """Whether workers ended because their node was taken away, with or without Ray Train having had notice of it."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    causes = (cause_of_death(failure) for failure in failures)
    return isinstance(error, PreemptionError) or any(
        isinstance(cause, RayActorError) and cause.preempted for cause in causes
    )
