"""Runs one trial with Ray Train: the only file that builds a TorchTrainer.

Ray Train retries whatever fails, from the last checkpoint that was reported to it. Here it starts the workers once per
attempt; whether there is another is decided by what went wrong (see `policy`), and workers find their newest checkpoint
that verifies themselves. `Result.metrics` is not used: it is bound to Ray's own checkpoints.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.plan import Hardware
from orchestrator.spec import Faults
from orchestrator.stop import StopRequest
from orchestrator.telemetry import EventPump
from trainers.contract import Attempt, LoopFinished, TrialEnded, TrialPlan, TrialStarted

logger = logging.getLogger(__name__)

RAY_TRAIN_SETTINGS = {
    # The working directory of a worker stays the driver's; every path is absolute anyway.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # A worker's print would show twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # How often the controller looks at the workers; its default of 2 s is added to the end of every trial.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A dead process is noticed by Ray itself; a frozen one after this long, at Ray's default of 600.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


def start_ray(address: str | None) -> Hardware:
    """Joins the cluster around this process or at an address, or starts one on this machine.

    Returns:
        What the cluster offers.

    Raises:
        ConnectionError: There is no cluster at the address.
    """
    for name, value in RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level=logging.WARNING,
        include_dashboard=False if address is None and "RAY_ADDRESS" not in os.environ else None,
        configure_logging=True,
    )
    resources = ray.cluster_resources()
    hosts = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    return Hardware(num_gpus=int(resources.get("GPU", 0)), num_cpus=int(resources.get("CPU", 0)), num_hosts=len(hosts))


def run_trial(plan: TrialPlan, faults: Faults, pump: EventPump, ray_dir: str, stop: StopRequest) -> TrialEnded:
    """Runs a trial to its end, with as many attempts as the policy allows.

    Args:
        plan: The trial.
        faults: What is done about failures.
        pump: Where its events go.
        ray_dir: Folder for Ray Train's own files.
        stop: Set when the user or the job server wants an end.

    Returns:
        How it ended; the same has been told to the pump.
    """

    def told(kind: type[Any], attempt: int, **fields: Any) -> Any:
        event = kind(trial=plan.name, attempt=attempt, rank=-1, time=time.time(), **fields)
        pump.tell(event)
        return event

    told(TrialStarted, 0, plan=dataclasses.asdict(plan))
    pump.order("run", 0)
    error = _attempt(plan, Attempt(), pump, ray_dir, stop)
    pump.drain()
    mine = [event for event in pump.events if event.trial == plan.name]
    finished = [event for event in mine if isinstance(event, LoopFinished)]
    if finished and finished[-1].reason != "interrupted":
        return told(TrialEnded, 0, status="FINISHED", reason="")  # type: ignore[no-any-return]
    if stop.requested:
        return told(TrialEnded, 0, status="KILLED", reason="stopped by the user")  # type: ignore[no-any-return]
    return told(TrialEnded, 0, status="FAILED", reason=str(error))  # type: ignore[no-any-return]


def _attempt(
    plan: TrialPlan, attempt: Attempt, pump: EventPump, ray_dir: str, stop: StopRequest
) -> BaseException | None:
    """Starts the workers once and waits for them; returns what went wrong, if anything did."""
    from trainers.worker import train_loop_per_worker

    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"plan": plan, "attempt": attempt, "telemetry": pump.actor},
        scaling_config=ScalingConfig(
            num_workers=plan.world_size,
            use_gpu=plan.device == "cuda",
            resources_per_worker={"CPU": plan.cpus_per_worker} | ({"GPU": 1} if plan.device == "cuda" else {}),
        ),
        torch_config=TorchConfig(backend="nccl" if plan.device == "cuda" else "gloo"),
        run_config=RunConfig(
            name=f"{plan.name}-attempt{attempt.number}",
            storage_path=ray_dir,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    outcome: list[BaseException | None] = []

    def fit() -> None:
        try:
            trainer.fit()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    # In a thread of its own, so that this one can hear signals and look after the workers meanwhile.
    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    ordered = False
    while thread.is_alive():
        thread.join(timeout=0.2)
        if stop.requested and not ordered:
            pump.order("stop", attempt.number)
            ordered = True
        if stop.overdue:
            return TimeoutError("the workers did not stop in time")
    return outcome[0]
