"""The Ray cluster: joined or started, and which of its nodes are there for a trial's workers."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from typing import Any

import ray
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

from orchestrator.experiment.environment import CREDENTIALS
from orchestrator.experiment.placement import capacity, equal_shares
from orchestrator.experiment.plan import Hardware
from orchestrator.experiment.spec import SpecError
from trainers.contract.plan import TrialPlan

CONNECT_TIMEOUT_SECONDS = 1.0
"""Longest wait for a node's Ray daemon to take a connection."""

JOIN_TIMEOUT_SECONDS = 5.0
"""Longest wait for a cluster's head to take a connection."""

RAY_TRAIN_SETTINGS = {
    # The working directory of a worker stays the driver's; every path is absolute anyway.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # A worker's print would show twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # How often the controller looks at the workers; its default of 2 s is added to the end of every trial.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # The driver looks for nodes that are to be taken away itself (`draining_nodes`).
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # The controller runs in the driver, whose terminal is the user's; what it has to say comes as an exception.
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
"""Of Ray Train, for all processes: a cluster that is started here inherits them, one that is joined is told them."""

_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}


def start_ray(address: str | None, network_interface: str | None = None) -> Hardware:
    """Joins the cluster at an address or the one this job runs in, or starts one of its own on this machine.

    A cluster that merely happens to run on this machine is somebody else's: it is joined only by `address: auto`.

    Args:
        address: Of a cluster; None for the one around this job, else a new one.
        network_interface: Interface for NCCL and gloo on all hosts; None for what their environment says.

    Returns:
        What the cluster offers; where it has GPUs, the CPUs beside them.

    Raises:
        SpecError: There is no cluster at the address, or it does not let us in.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise SpecError(f"RAY_ADDRESS {address}: a job server; send the run there: `make submit ADDRESS={address}`")
    if address and (reason := _nobody_listens(address)):
        raise SpecError(
            f"the Ray cluster at {address} cannot be joined: {reason}. Start one there (`ray start --head`), correct "
            "resources.address or RAY_ADDRESS, or leave both out for a cluster of this machine's own"
        )
    settings = dict(RAY_TRAIN_SETTINGS)
    if network_interface:
        settings |= {f"{library}_SOCKET_IFNAME": network_interface for library in ("NCCL", "GLOO")}
    # What the job's own environment names stays; Ray would refuse to have it twice.
    settings = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(settings)
    # A cluster of one's own guards itself with a token: wanted, and nothing for the user to act on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    # A cluster that is started here inherits this environment; its workers need no credentials.
    held = {name: os.environ.pop(name) for name in CREDENTIALS if name in os.environ}
    try:
        if address:
            ray.init(address=address, runtime_env={"env_vars": settings}, **_QUIET)
        else:
            _start_own()
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise SpecError(f"the Ray cluster at {address or 'this machine'} cannot be joined: {error}") from error
    finally:
        os.environ.update(held)
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    counted = [each for each in alive if each.get("GPU")] or alive
    gpus, cpus = (int(sum(each.get(name, 0) for each in counted)) for name in ("GPU", "CPU"))
    return Hardware(num_gpus=gpus, num_cpus=cpus)


def _nobody_listens(address: str) -> str:
    """Why no connection to HOST:PORT can be made, or "": Ray itself tries for more than half a minute."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=JOIN_TIMEOUT_SECONDS).close()
        except (OSError, OverflowError) as error:
            return str(error)
    return ""


def _start_own() -> None:
    # Ray would have workers give way to all else on the machine, the driver and its own daemons among it.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray's hook for a process that it starts. Imports make objects by the hundred thousand and no garbage, and looking
    # for it takes a sixth of their time. Who lives long turns it on again: `Telemetry`, `Rank`.
    os.environ.setdefault(WORKER_PROCESS_SETUP_HOOK_ENV_VAR, "gc.disable")
    # Ray Train calls the training function in a thread, for which glibc would keep memory apart, in pieces that it maps
    # and gives back also where freed memory is to be kept (`trainers.speedups.apply.keep_memory`).
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    # Ray looks for the dashboard's libraries by importing them, in this process and in two daemons, also where there is
    # to be no dashboard. Without them it is Ray's minimal installation, which starts sooner.
    name = "ray.dashboard.optional_deps"
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        ray.init(address="local", include_dashboard=False, **_QUIET)
    finally:
        del sys.modules[name]


def choose_nodes(plan: TrialPlan) -> list[dict[str, str]] | None:
    """Names each worker's node, equally many workers a node; None where there are not the nodes for it now."""
    alive = {node["NodeID"] for node in ray.nodes()} - draining_nodes() - lost_nodes()
    capacities = {
        node: capacity(plan, int(free.get("GPU", 0)), int(free.get("CPU", 0)))
        for node, free in ray._private.state.available_resources_per_node().items()
        if node in alive
    }
    shares = equal_shares(capacities, plan.world_size, plan.num_nodes)
    return [{"ray.io/node-id": node} for node, each in shares.items() for _ in range(each)] if shares else None


def draining_nodes() -> set[str]:
    """Nodes that are to be taken away soon: a spot instance's notice, a node that is scaled down."""
    # What Ray Train's own preemption watcher asks; asked from here, it costs the workers no barrier.
    return set(ray._private.state.state.get_draining_nodes())


def lost_nodes() -> set[str]:
    """Nodes that are gone, also where Ray does not know it yet: it waits for heartbeats, for 10 s and more."""
    return {node["NodeID"] for node in ray.nodes() if not (node["Alive"] and _answers(node))}


def _answers(node: dict[str, Any]) -> bool:
    with contextlib.suppress(OSError):
        address = (node["NodeManagerAddress"], node["NodeManagerPort"])
        socket.create_connection(address, timeout=CONNECT_TIMEOUT_SECONDS).close()
        return True
    return False
