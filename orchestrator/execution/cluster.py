"""The Ray cluster of a run: joined or started, shown, and left."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray

from orchestrator.experiment.environment import CREDENTIALS, DASHBOARD, cluster_address, found
from orchestrator.experiment.plan import Hardware
from orchestrator.experiment.spec import SpecError
from orchestrator.files import existing_parent
from orchestrator.gpus import list_gpus
from trainers.contract.cpus import num_usable_cpus

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_SECONDS = 5.0
"""Longest wait for the dashboard to accept a connection."""

SETTINGS = {
    # The working directory of a worker stays the driver's; every path is absolute anyway.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # A worker's print would show twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # How often the controller looks at the workers; its default of 2 s is added to the end of every trial.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # How often it looks for nodes that are about to be taken away; a spot market may give notice of 30 s.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
"""Ray Train's settings, for all processes of a run."""

LOCAL_SETTINGS = {
    # Nobody takes away the one node, and the process that looks for it costs a start of every trial a second.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # By default, workers give way to everything else on the machine, the driver and Ray's daemons included.
    "RAY_worker_niceness": "0",
    # Ray Train calls the training function in a thread, for which glibc would use a separate arena, whose pieces it
    # maps and returns even where freed memory is to be kept (`trainers.speedups.apply.process_settings`).
    "MALLOC_ARENA_MAX": "1",
}
"""Settings of a cluster that is started for this run, as far as the environment does not name them."""

VISIBLE = {
    # Ray's API has Ray Train's runs and their workers then (`/api/train/v2/runs/v1`).
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # And the head's logs have each change of them (`export_events/event_EXPORT_TRAIN_STATE.log`).
    "RAY_enable_export_api_write_config": "EXPORT_TRAIN_RUN,EXPORT_TRAIN_RUN_ATTEMPT",
}
"""Settings with which a cluster shows its runs, where there is a dashboard. Ray's metrics are on by default."""

NO_API_SERVER = "http://127.0.0.1:1"
"""Where nothing answers: what the processes of a local cluster take for the address of Ray's API server.

Ray Train asks it whether its controller lives. Without an address it looks for any cluster on the machine: another one
than its own does not know the controller, and Ray Train then takes the workers for orphans and ends them.
"""

MAX_STARTS = 3
"""How often a local cluster is started: Ray gives its raylet 30 s, too few on a machine that has far too much to do."""

DAEMONS = ("gcs_server", "raylet")
"""Processes of a local cluster without which it is lost."""

LEAVE_TIMEOUT_SECONDS = 60.0
"""Longest wait for the threads that call Ray before it is left; the command's end waits for none of them."""

_daemons: dict[str, psutil.Process] = {}


class _RayThread(threading.Thread):
    """Calls Ray."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that this process is connected to."""

    hardware: Hardware
    """What it offers; where it has GPUs, the CPUs of the nodes that have them."""
    dashboard: str | None
    """Address of Ray's dashboard; None where there is none that answers."""


def start_ray(address: str | None, network_interface: str | None = None, *, dashboard: bool = False) -> Cluster:
    """Joins the cluster at an address or the one this job runs in, or starts a local one.

    A cluster that merely happens to run on this machine belongs to somebody else: it is joined only by `address: auto`.

    Args:
        address: Of a cluster; None for the one around this job, else a local one.
        network_interface: Interface for NCCL and gloo on all hosts; None for what their environment says.
        dashboard: Whether a local cluster has Ray's dashboard; one that is joined has its own.

    Raises:
        SpecError: There is no cluster at the address, or it refuses us.
    """
    address = cluster_address(address)
    settings = SETTINGS | (VISIBLE if address or dashboard else {}) | ({} if address else LOCAL_SETTINGS)
    if network_interface:
        settings |= {f"{library}_SOCKET_IFNAME": network_interface for library in ("NCCL", "GLOO")}
    # What the job's own environment names stays; Ray would refuse to have it twice.
    settings = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(settings)
    try:
        with _same_handler(signal.SIGTERM):
            url = _join(address, settings) if address else _start(dashboard)
    except Exception as error:  # of any type: Ray raises plain ones, too
        what = f"the Ray cluster at {address} cannot be joined" if address else "Ray cannot be started here"
        raise SpecError(f"{what}: {error}") from error
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # A node without CPUs takes no worker: it leaves the others their share of CPUs.
    counted = [each for each in alive if each.get("GPU") and each.get("CPU")] or alive
    gpus, cpus = (int(sum(each.get(name, 0) for each in counted)) for name in ("GPU", "CPU"))
    # Ray names an address also where nothing listens, as in a local cluster without a dashboard.
    shown = f"http://{url}" if url and _listens(url) else None
    if shown:
        found[DASHBOARD] = f"{shown}/#/jobs/{ray.get_runtime_context().get_job_id()}"
    return Cluster(Hardware(num_gpus=gpus, num_cpus=cpus, num_hosts=len(counted)), shown)


def start_thread(target: Callable[..., object], name: str, *arguments: Any) -> threading.Thread:
    """Starts a thread that calls Ray, as a daemon; `shutdown` waits for it.

    Ray ends the whole process, with exit code 1, where a thread calls it after it was left.
    """
    thread = _RayThread(target=target, name=name, args=arguments, daemon=True)
    thread.start()
    return thread


def shutdown() -> None:
    """Leaves the cluster; ends it where it was started for this run. Does nothing the second time.

    Where a thread still calls Ray after a minute, Ray is not left: it goes with this process.
    """
    _daemons.clear()
    found.pop(DASHBOARD, None)
    until = time.monotonic() + LEAVE_TIMEOUT_SECONDS
    for thread in threading.enumerate():
        if not isinstance(thread, _RayThread):
            continue
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            logger.warning("Ray is not left: the thread %r still calls it", thread.name)
            return
    ray.shutdown()


def lost_daemon() -> str | None:
    """Name of a daemon of a local cluster that has ended; None while they run, and where a cluster was joined.

    Ray itself ends this process then, but 13 s after its raylet and 61 s after its GCS.
    """
    daemons = list(_daemons.items())  # `shutdown` may be called by another thread meanwhile
    return next((name for name, daemon in daemons if not _runs(daemon)), None)


def is_local() -> bool:
    """Whether the cluster is a local one, which this process has started."""
    return bool(_daemons)


def token_required() -> bool:
    """Whether this process, and so the cluster that let it in, uses Ray's token authentication."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def _listens(address: str) -> bool:
    """Whether something takes connections at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def _join(address: str, settings: Mapping[str, str]) -> str | None:
    environment = {"env_vars": dict(settings)}
    context = ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.WARNING)
    return context.dashboard_url or None


def _start(dashboard: bool) -> str | None:
    # Its processes inherit this environment. Workers need no credentials.
    token_file = Path.home() / ".ray" / "auth_token"
    if "RAY_AUTH_TOKEN_PATH" not in os.environ and not os.access(existing_parent(token_file), os.W_OK):
        os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex)  # Ray would write one there, and fail
    with _environment({**dict.fromkeys(CREDENTIALS), "RAY_API_SERVER_ADDRESS": NO_API_SERVER}):
        # At WARNING, Ray would say that the cluster protects itself with a token, which nobody has to act on.
        context = _init_local(dashboard)
    _daemons.clear()
    _daemons.update((each.name(), each) for each in psutil.Process().children() if each.name() in DAEMONS)
    return context.dashboard_url or None


def _init_local(dashboard: bool) -> Any:
    init = partial(
        ray.init,
        address="local",
        num_cpus=num_usable_cpus(),  # Ray looks at a container's quota, and not at the share of a batch system
        num_gpus=len(list_gpus()),  # Ray would count what CUDA_VISIBLE_DEVICES names that is not there, such as -1
        include_dashboard=dashboard,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    for _ in range(MAX_STARTS - 1):
        others = set(psutil.Process().children(recursive=True))
        try:
            return init()
        except Exception as error:
            if type(error) is not Exception:  # Ray has no type of its own for it
                raise
            logger.warning("Ray did not start, and is started again: %s", error)
            for left in set(psutil.Process().children(recursive=True)) - others:
                with suppress(psutil.NoSuchProcess):
                    left.kill()
    return init()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def _same_handler(number: signal.Signals) -> Iterator[None]:
    """Keeps a signal's handler: that of `ray.init` ends the process with the signal's number as exit code."""
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Sets variables of the environment for a while; None takes one out."""
    before = {name: os.environ.pop(name, None) for name in values}
    os.environ.update({name: value for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
