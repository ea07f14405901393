"""The nodes of the cluster: which there are, which a trial's workers go to, and calls of a function on each."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.experiment.placement import capacity, equal_shares
from trainers.canary import find_port, time_all_reduce
from trainers.contract.plan import TrialPlan

CONNECT_TIMEOUT_SECONDS = 1.0
"""Longest wait for a node's Ray daemon to accept a connection."""

RESERVE_TIMEOUT_SECONDS = 2.5
"""Longest wait for room on nodes that are large enough: Ray looks again every second."""

NODE_ID = "ray.io/node-id"
"""Label that Ray gives every node."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Node:
    """A living node of the cluster."""

    id: str
    """Ray's id of it."""
    host: str
    """Host name, with the address where several nodes have one name."""
    address: str
    """IP address."""
    num_gpus: int
    """GPUs in all, in use or not."""
    num_cpus: int
    """CPUs in all, in use or not."""

    def capacity(self, plan: TrialPlan) -> int:
        """Number of a trial's workers that fit on it while nothing else runs there."""
        return capacity(plan, self.num_gpus, self.num_cpus)


def list_nodes() -> list[Node]:
    """The living nodes of the cluster."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    names = Counter(node["NodeManagerHostname"] for node in alive)
    found = []
    for node in alive:
        host, address = str(node["NodeManagerHostname"]), str(node["NodeManagerAddress"])
        found.append(
            Node(
                id=node["NodeID"],
                host=host if names[host] == 1 else f"{host} at {address}",
                address=address,
                num_gpus=int(node["Resources"].get("GPU", 0)),
                num_cpus=int(node["Resources"].get("CPU", 0)),
            )
        )
    return found


def lost_nodes() -> set[str]:
    """Ids of the nodes that are gone, also before Ray notices: it waits for heartbeats for 10 s and more."""
    return {node["NodeID"] for node in ray.nodes() if not (node["Alive"] and _accepts_connections(node))}


def _accepts_connections(node: dict[str, Any]) -> bool:
    with contextlib.suppress(OSError):
        address = (node["NodeManagerAddress"], node["NodeManagerPort"])
        socket.create_connection(address, timeout=CONNECT_TIMEOUT_SECONDS).close()
        return True
    return False


def call_on_nodes(
    function: Callable[..., T], arguments: Mapping[Node, tuple[Any, ...]], timeout: float, num_gpus: int = 0
) -> dict[Node, T | Exception]:
    """Calls a function once on each of some nodes.

    Args:
        function: What is called.
        arguments: Node to the function's arguments there.
        timeout: Longest wait for all of them (seconds).
        num_gpus: GPUs that each call needs.

    Returns:
        Node to what the function returned, or to what it raised; to a TimeoutError where it did not return in time.
    """
    task = ray.remote(num_cpus=0, num_gpus=num_gpus, max_retries=0)(function)
    calls = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(*values): node
        for node, values in arguments.items()
    }
    done, late = ray.wait(list(calls), num_returns=len(calls), timeout=timeout) if calls else ([], [])
    outcomes: dict[Node, T | Exception] = {}
    for call in done:
        try:
            outcomes[calls[call]] = ray.get(call)
        except Exception as error:  # noqa: BLE001 - whatever the function or a broken installation there raises
            outcomes[calls[call]] = error
    # Only calls that are still waiting: in Ray 2.60, cancelling one that is just returning can abort this process.
    for call in late:
        outcomes[calls[call]] = TimeoutError(f"no answer within {timeout:g} s")
        ray.cancel(call, force=True)
    return outcomes


def all_reduce_failure(nodes: Sequence[Node], device: str, timeout: float) -> Exception | None:
    """Times an all-reduce between nodes, one process on each.

    Args:
        nodes: The nodes; the first one listens.
        device: `cuda` (NCCL, one GPU each) or `cpu` (gloo).
        timeout: Longest wait (seconds).

    Returns:
        What went wrong; None where nothing did.
    """
    first = nodes[0]
    port = call_on_nodes(find_port, {first: ()}, timeout)[first]
    if isinstance(port, Exception):
        return port
    size = len(nodes)
    arguments = {node: (rank, size, first.address, port, device, timeout / 2) for rank, node in enumerate(nodes)}
    outcomes = call_on_nodes(time_all_reduce, arguments, timeout, num_gpus=int(device == "cuda"))
    return next((outcome for outcome in outcomes.values() if isinstance(outcome, Exception)), None)


def worker_resources(plan: TrialPlan) -> dict[str, float]:
    """What one worker of a trial reserves."""
    gpus: dict[str, float] = {"GPU": 1} if plan.device == "cuda" else {}
    return {"CPU": plan.cpus_per_worker} | gpus


def choose_nodes(plan: TrialPlan) -> list[dict[str, str]] | None:
    """Chooses a node for each worker, equally many workers on each, on as few nodes as have room or as the plan says.

    Ray's scheduler knows what is free and which nodes are about to be taken away: it is asked by reserving whole
    shares, each on another node. The reservation is given back before the workers start.

    Returns:
        The label selector of each worker; None where there is no room now.
    """
    silent = lost_nodes() & {node.id for node in list_nodes()}
    capacities = {node.id: node.capacity(plan) for node in list_nodes() if node.id not in silent}
    for num_nodes in [plan.num_nodes] if plan.num_nodes else range(1, len(capacities) + 1):
        if not equal_shares(capacities, plan.world_size, num_nodes):
            continue  # not even if nothing else ran there
        share = plan.world_size // num_nodes
        bundle = {name: amount * share for name, amount in worker_resources(plan).items()}
        if nodes := _reserve([bundle] * num_nodes, silent):
            return [{NODE_ID: node} for node in nodes for _ in range(share)]
    return None


def _reserve(bundles: list[dict[str, float]], excluded: set[str]) -> list[str] | None:
    selector = {NODE_ID: f"!in({','.join(sorted(excluded))})"} if excluded else {}
    group = placement_group(bundles, strategy="STRICT_SPREAD", bundle_label_selector=[selector] * len(bundles))
    try:
        if not group.wait(RESERVE_TIMEOUT_SECONDS):
            return None
        return list(placement_group_table(group)["bundles_to_node_id"].values())
    finally:
        remove_placement_group(group)
