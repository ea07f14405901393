"""The training function that Ray Train calls on every worker.

The driver imports this file to name the function, so torch and detectron2 are imported inside it.
The function runs in a thread that is not the main one, in a process whose working directory is Ray's: paths are
absolute here, and nothing installs signal handlers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from trainers.contract.channel import Channel, Placement

logger = logging.getLogger(__name__)


CONFIRM_TIMEOUT_SECONDS = 30.0
"""Longest wait for the driver to confirm that it has events; after it, the worker goes on without a new checkpoint."""


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Ray Train's entry: trains one rank of a trial.

    Args:
        config: `plan` (TrialPlan), `attempt` (Attempt) and `telemetry` (handle of the telemetry actor).
    """
    entered = time.time()
    import ray
    import ray.train

    context = ray.train.get_context()
    runtime = ray.get_runtime_context()
    telemetry = config["telemetry"]
    placement = Placement(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        host=ray.util.get_node_ip_address(),
        node_id=runtime.get_node_id(),
    )

    def arrived() -> int:
        # Calls of one process are answered in their order: when this one is, all that was pushed before has arrived.
        return int(ray.get(telemetry.arrived.remote(), timeout=CONFIRM_TIMEOUT_SECONDS))

    def flush() -> None:
        _answer(arrived)

    def wait_until_persisted() -> bool:
        number, deadline = arrived(), time.monotonic() + CONFIRM_TIMEOUT_SECONDS
        while ray.get(telemetry.written.remote(), timeout=CONFIRM_TIMEOUT_SECONDS) < number:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    channel = Channel(
        push=lambda event: telemetry.push.remote(event),
        beat=lambda heartbeat: ray.get(telemetry.beat.remote(heartbeat), timeout=10),
        flush=flush,
        wait_until_persisted=lambda: bool(_answer(wait_until_persisted)),
    )
    from trainers import before_step
    from trainers.rank import Rank  # torch and detectron2: seconds that belong to the clock

    Rank(config["plan"], config["attempt"], placement, channel, before_step.from_environment()).train(entered)


def _answer(ask: Callable[[], int]) -> int | None:
    """What the driver says; training does not end because it is away for a while, it ends the run if it stays away."""
    try:
        return ask()
    except Exception as error:
        logger.warning("the driver does not confirm what it has: %r", error)
        return None
