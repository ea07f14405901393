"""What Ray has no public API for. `tests/test_pins.py` checks each against the installed version."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.util.placement_group import PlacementGroup

from trainers.contract import clock

PROBE_TIMEOUT_SECONDS = 2.0
"""Longest wait for workers to show that they live: one that waits for a lost one cannot."""


def placement_groups_of_this_job() -> list[PlacementGroup]:
    """The placement groups that this job has and that are not removed.

    Ray's public table of them names no owner, and its state API, which does, needs a dashboard. The id of a placement
    group ends with the id of the job that made it.
    """
    job = ray.get_runtime_context().get_job_id()
    return [
        PlacementGroup(ray.PlacementGroupID.from_hex(group))
        for group, values in ray.util.placement_group_table().items()
        if group.endswith(job) and values["state"] != "REMOVED"
    ]


def nodes_of_other_jobs() -> set[str]:
    """Ids of the nodes on which another job of the cluster has a placement group."""
    job = ray.get_runtime_context().get_job_id()
    return {
        node
        for group, values in ray.util.placement_group_table().items()
        if not group.endswith(job) and values["state"] != "REMOVED"
        for node in values["bundles_to_node_id"].values()
        if node
    }


def cause_of_death(failure: Exception) -> Exception | None:
    """Why a worker died, from what `WorkerGroupError.worker_failures` has for its rank; None where it just raised that.

    Ray Train wraps it in an exception that is not public, whose own text is a dump of the worker's handle.
    """
    cause: Exception | None = getattr(failure, "health_check_failure", None)
    return cause


class StartWatch(WorkerGroupCallback):
    """Finds the workers that die while Ray Train starts them, in its controller.

    The error that Ray Train has for it names neither rank nor reason, and its public callbacks are called later.

    Args:
        on_lost: Called with rank and reason of each worker that died; rank None where no ranks were given yet.
        on_started: Called with the Unix seconds at which the start began, the processes lived, and the process group
            was ready.
    """

    def __init__(
        self,
        on_lost: Callable[[int | None, RayActorError], None],
        on_started: Callable[[float, float, float], None],
    ) -> None:
        self._on_lost, self._on_started = on_lost, on_started
        self._workers: list[Any] = []
        self._living = 0.0

    def before_init_train_context(self, workers: Sequence[Any]) -> dict[str, list[Any]]:
        """Keeps the workers, which have their ranks now."""
        self._workers, self._living = list(workers), clock.now()
        return {}

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        """Surrounds the start, up to the process group."""
        began = clock.now()
        try:
            yield
            self._on_started(began, self._living, clock.now())
        except Exception as error:
            dead = self._dead()
            for rank, reason in dead.items():
                self._on_lost(rank, reason)
            if not dead and isinstance(error.__cause__, RayActorError):
                self._on_lost(None, error.__cause__)
            raise

    def _dead(self) -> dict[int, RayActorError]:
        probes = {worker.execute_async(os.getpid): worker.distributed_context.world_rank for worker in self._workers}
        done = ray.wait(list(probes), num_returns=len(probes), timeout=PROBE_TIMEOUT_SECONDS)[0] if probes else []
        dead = {}
        for probe in done:
            try:
                ray.get(probe)
            except RayActorError as error:
                dead[probes[probe]] = error
        return dead
