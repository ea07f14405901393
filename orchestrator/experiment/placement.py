"""Which hosts a trial's workers are placed on: equally many on each, as detectron2's local process groups require.

Trials that run at a time get hosts that no other one uses, or with `trials.allow_shared_nodes` what others leave.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from trainers.contract.plan import TrialPlan

    Held = tuple[TrialPlan, Mapping[str, int]]
    """A trial that is under way, and the number of its workers by host."""


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


def free_room(
    hosts: Mapping[str, tuple[int, int]], held: Iterable[Held], *, own_nodes: bool
) -> dict[str, tuple[int, int]]:
    """GPUs and CPUs that hosts have for one more trial.

    Args:
        hosts: Host to its GPUs and CPUs.
        held: The trials that are under way.
        own_nodes: Whether the trial takes no host that another one uses.
    """
    room = dict(hosts)
    for plan, shares in held:
        for host, number in shares.items():
            if host in room:
                gpus, cpus = room[host]
                left = (gpus - number * (plan.device == "cuda"), cpus - number * plan.cpus_per_worker)
                room[host] = (0, 0) if own_nodes else left
    return room


def num_side_by_side(
    plans: Sequence[TrialPlan], hosts: Mapping[str, tuple[int, int]], concurrent: int | Literal["auto"]
) -> int:
    """The most trials that are under way at a time on hosts that nothing else uses, started in their order.

    Args:
        plans: The trials.
        hosts: Host to its GPUs and CPUs.
        concurrent: `trials.concurrent`.
    """
    most = len(plans) if concurrent == "auto" else min(concurrent, len(plans))
    return min(most, max((_num_fitting(plans[first:], hosts) for first in range(len(plans))), default=0))


def _num_fitting(plans: Sequence[TrialPlan], hosts: Mapping[str, tuple[int, int]]) -> int:
    """How many of the first trials fit next to each other; one at least, which need not be of these hosts."""
    held: list[Held] = []
    for plan in plans:
        room = free_room(hosts, held, own_nodes=plan.own_nodes)
        capacities = {host: capacity(plan, *free) for host, free in room.items()}
        shares = equal_shares(capacities, plan.world_size, plan.num_nodes)
        if shares is None:
            break
        held.append((plan, shares))
    return max(1, len(held))
