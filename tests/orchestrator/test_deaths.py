"""What the end of a worker's process is recorded as: lost, or out of memory where Ray or the kernel counts that."""

from __future__ import annotations

from ray.exceptions import OutOfMemoryError, RayActorError

from orchestrator.execution.deaths import death
from trainers.contract.memory import oom_kills_text

RAY_KILLED = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 69c8) was "
    "22.90GB used / 23.54GB limit (0.97)\nOOM kill reason: Memory usage exceeded threshold"
)
SIGKILL = (
    "The actor died unexpectedly before finishing this task.\n\tpid: 4991\nThe actor is dead because its worker "
    "process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection "
    "error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer due to high "
    "memory usage"
)
"""Both as Ray 2.60 says it."""


def test_rays_own_monitor_of_memory_is_believed() -> None:
    kind, message = death(OutOfMemoryError(RAY_KILLED))
    assert kind == "out_of_memory"
    assert message == f"its process died: {RAY_KILLED.splitlines()[0]}"


def test_a_killed_process_is_out_of_memory_only_where_the_kernel_counted_that() -> None:
    reason = RayActorError(error_msg=SIGKILL)
    kind, message = death(reason)
    assert kind == "worker_lost" and message.startswith("its process died: The actor died unexpectedly")
    kind, message = death(reason, oom_kills_text(3, 4))
    assert kind == "out_of_memory"
    assert message.startswith("its process died: since it started, the kernel has killed a process on its node")
