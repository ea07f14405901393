"""What the end of a worker was, from what Ray and Ray Train raise for it."""

from __future__ import annotations

from ray.exceptions import RayActorError
from ray.train import PreemptionError, WorkerGroupError

from orchestrator.execution.ray_internals import cause_of_death
from trainers.contract.events import FailureKind
from trainers.contract.memory import is_out_of_memory
from trainers.contract.storage import is_storage_failure


def death(reason: Exception) -> tuple[FailureKind, str]:
    """The kind of failure that ended a worker's process, and a sentence, from what Ray says about it."""
    text = str(reason)
    kind: FailureKind = "out_of_memory" if "OOM" in text and "memory pressure" in text else "worker_lost"
    return kind, f"its process died: {text.splitlines()[0] if text else type(reason).__name__}"


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
