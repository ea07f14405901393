"""Which hosts a trial's workers are placed on: equally many on each, as detectron2's local process groups require."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainers.contract.plan import TrialPlan


def capacity(plan: TrialPlan, num_gpus: int, num_cpus: int) -> int:
    """Number of a trial's workers that fit into some GPUs and CPUs of one host."""
    by_cpu = num_cpus // plan.cpus_per_worker
    return min(num_gpus, by_cpu) if plan.device == "cuda" else by_cpu


def equal_shares(capacities: Mapping[str, int], world_size: int, num_nodes: int | None) -> dict[str, int] | None:
    """Chooses hosts that take equally many workers each.

    Args:
        capacities: Host to the number of workers that fit on it.
        world_size: Number of workers.
        num_nodes: Number of hosts; None for as few as possible.

    Returns:
        Host to its number of workers, the largest capacity first; None where they do not fit equally.
    """
    largest = sorted(capacities, key=lambda host: (-capacities[host], host))
    for number in [num_nodes] if num_nodes else range(1, min(world_size, len(largest)) + 1):
        each, rest = divmod(world_size, number)
        if not rest and number <= len(largest) and capacities[largest[number - 1]] >= each:
            return dict.fromkeys(largest[:number], each)
    return None


def smaller(plan: TrialPlan) -> list[TrialPlan]:
    """The trial with fewer workers, over any hosts, down to the fewest it allows; the most first.

    Each of them stands for equally many of the planned ones, whose batches it trains: steps, batch, learning rate and
    schedule stay the same.
    """
    planned = plan.world_size
    sizes = range(planned - 1, (plan.min_workers or planned) - 1, -1)
    return [
        dataclasses.replace(plan, world_size=size, stands_for=planned // size, num_nodes=None)
        for size in sizes
        if planned % size == 0
    ]
