"""How many of a trial's workers each host takes: equally many on each, or none.

detectron2's local process groups assert it, and the fullest host would decide the step of all. Ray Train fills hosts as
they come, which is equal only by luck; so the hosts are chosen here and named to it.
"""

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
        num_nodes: Number of hosts; None for the fewest that do.

    Returns:
        Host to its number of workers, the roomiest first; None where they do not fit equally.
    """
    roomiest = sorted(capacities, key=lambda host: (-capacities[host], host))
    for number in [num_nodes] if num_nodes else range(1, min(world_size, len(roomiest)) + 1):
        each, rest = divmod(world_size, number)
        if not rest and number <= len(roomiest) and capacities[roomiest[number - 1]] >= each:
            return dict.fromkeys(roomiest[:number], each)
    return None


def smaller(plan: TrialPlan) -> list[TrialPlan]:
    """The trial with fewer workers, the most first: as few as it allows, over any hosts, with the same batch."""
    sizes = range(plan.world_size - 1, (plan.min_workers or plan.world_size) - 1, -1)
    fit = [size for size in sizes if plan.solver.global_batch_size % size == 0]
    return [dataclasses.replace(plan, world_size=size, num_nodes=None) for size in fit]
