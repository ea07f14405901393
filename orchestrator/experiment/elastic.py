"""Trials that may run with fewer workers than planned: their settings, and what they cannot go together with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.experiment.config_keys import usable_value
from orchestrator.experiment.detectron_config import default_values
from orchestrator.experiment.placement import smaller
from orchestrator.experiment.spec import Experiment, Resources, SpecError

if TYPE_CHECKING:
    from trainers.contract.plan import TrialPlan

RESIZE_AFTER_SECONDS = 60.0
"""Wait before a trial takes another number of workers, where none is given: a node that starts again needs less."""


def resize_fields(resources: Resources) -> dict[str, Any]:
    """The fields of a trial's plan that say when it may run with how many workers."""
    after = resources.resize_after_seconds or RESIZE_AFTER_SECONDS
    return {"min_workers": resources.min_workers, "resize_after_seconds": after}


def check_resizing(experiment: Experiment, plans: Sequence[TrialPlan]) -> None:
    """Refuses trials that could not run with fewer workers, or would be another model then.

    Raises:
        SpecError: `resources.min_workers` would have no effect, or a layer takes statistics over all workers at a time.
    """
    fewest, most = experiment.resources.min_workers, max((plan.world_size for plan in plans), default=0)
    if plans and fewest and fewest > most:
        raise SpecError(
            f"resources.min_workers: {fewest} are more than any trial has; set it to less than {most}, or to null"
            if most > 1
            else "resources.min_workers: a trial of one worker cannot run with fewer; set it to null"
        )
    for plan in plans:
        if plan.min_workers is None or plan.min_workers >= plan.world_size:
            continue
        if not smaller(plan):
            sizes = [size for size in range(plan.world_size - 1, 0, -1) if plan.world_size % size == 0]
            raise SpecError(
                f"resources.min_workers: fewer than {plan.world_size} workers take over equally many each where they "
                f"are {' or '.join(map(str, sizes))}, none of which is {plan.min_workers} or more; set it to {sizes[0]}"
                " or less, or to null"
            )
        if plan.resize_after_seconds >= plan.timeouts["setup"]:
            raise SpecError(
                f"resources.resize_after_seconds: a trial without room is given up after {plan.timeouts['setup']:g} s "
                f"(faults.timeouts.setup), before it takes fewer workers after {plan.resize_after_seconds:g} s; set "
                "the one lower or the other higher"
            )
        for key in default_values():
            norm = usable_value(experiment, key) if key.endswith(".NORM") else ""
            if "SyncBN" in norm:
                raise SpecError(
                    f"resources.min_workers: {key} {norm} takes statistics over a batch of every worker, so with fewer "
                    "workers it is another model; set min_workers to null, or take BN or FrozenBN"
                )
