"""What Ray has no public API for. `tests/test_pins.py` checks each against the installed version."""

from __future__ import annotations

import ray
from ray.util.placement_group import PlacementGroup


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


def cause_of_death(failure: Exception) -> Exception | None:
    """Why a worker died, from what `WorkerGroupError.worker_failures` has for its rank; None where it just raised that.

    Ray Train wraps it in an exception that is not public, whose own text is a dump of the worker's handle.
    """
    cause: Exception | None = getattr(failure, "health_check_failure", None)
    return cause
