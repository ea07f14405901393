"""The nodes of the cluster: which there are, which a trial's workers go to, and calls of a function on each."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.execution.cluster import is_local
from orchestrator.execution.ray_internals import nodes_of_other_jobs
from orchestrator.experiment.placement import capacity, equal_shares, free_room
from trainers.canary import find_port, time_all_reduce, torch_build
from trainers.contract.plan import TrialPlan
from trainers.contract.torch_build import TorchBuild

if TYPE_CHECKING:
    from orchestrator.experiment.placement import Held

CONNECT_TIMEOUT_SECONDS = 1.0
"""Longest wait for a node's Ray daemon to accept a connection."""

RESERVE_TIMEOUT_SECONDS = 2.5
"""Longest wait for room on nodes that are large enough: Ray looks again every second."""

POLL_INTERVAL_SECONDS = 0.1
"""Time between two looks at reservations."""

NODE_ID = "ray.io/node-id"
"""Label that Ray gives every node."""

T = TypeVar("T")

_held: dict[str, Held] = {}
"""The nodes of the trials of this process that are under way, by trial."""
_waiting: set[str] = set()
"""Those of them that found no room when they asked last, as after the loss of a node."""
_choosing = threading.Lock()


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


def torch_builds(nodes: Sequence[Node], timeout: float) -> dict[Node, TorchBuild | Exception]:
    """What the torch of some nodes is built for, or why that is not known; waits at most so many seconds."""
    if is_local():  # its workers have this process's packages
        return dict.fromkeys(nodes, torch_build())
    return call_on_nodes(torch_build, dict.fromkeys(nodes, ()), timeout)


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


def with_free_gpu(nodes: Sequence[Node]) -> list[Node]:
    """Those of some nodes on which a GPU is free now, found by reserving one on each for a moment."""
    groups = {node: placement_group([{"GPU": 1.0}], bundle_label_selector=[{NODE_ID: node.id}]) for node in nodes}
    deadline = time.monotonic() + RESERVE_TIMEOUT_SECONDS
    try:
        while True:
            # Not `wait`, which takes whole seconds: one node that is in use would take those of all.
            free = [node for node, group in groups.items() if placement_group_table(group)["state"] == "CREATED"]
            if len(free) == len(nodes) or time.monotonic() > deadline:
                return free
            time.sleep(POLL_INTERVAL_SECONDS)
    finally:
        for group in groups.values():
            remove_placement_group(group)


def worker_resources(plan: TrialPlan) -> dict[str, float]:
    """What one worker of a trial reserves."""
    gpus: dict[str, float] = {"GPU": 1} if plan.device == "cuda" else {}
    return {"CPU": plan.cpus_per_worker} | gpus


def choose_nodes(plan: TrialPlan) -> list[dict[str, str]] | None:
    """Chooses a node for each worker, equally many workers on each, on as few nodes as have room or as the plan says.

    Ray's scheduler knows what is free and which nodes are about to be taken away: it is asked by reserving whole
    shares, each on another node. The reservation is given back before the workers start. To the other trials of this
    run, the nodes stay taken until `release_nodes`, or until this trial is given others.

    Returns:
        The label selector of each worker; None where there is no room now.
    """
    with _choosing:
        for num_nodes, share, excluded in _spreads(plan):
            if nodes := _reserve([_bundle(plan, share)] * num_nodes, [_not_in(excluded)] * num_nodes):
                _held[plan.name] = (plan, dict.fromkeys(nodes, share))
                _waiting.discard(plan.name)
                return [{NODE_ID: node} for node in nodes for _ in range(share)]
        _waiting.add(plan.name)
    return None


def has_room_besides(plan: TrialPlan, own: Mapping[str, int]) -> bool:
    """Whether a trial would have room if those of its workers that run gave theirs back; nothing is kept for it.

    Args:
        plan: The trial.
        own: Nodes with workers that run now, and their number on each.
    """
    with _choosing:
        for num_nodes, share, excluded in _spreads(plan):
            stay = sorted(own.keys() - excluded, key=lambda node: -own[node])[:num_nodes]
            more = {node: share - own[node] for node in stay if own[node] < share}
            num_others = num_nodes - len(stay)
            bundles = [_bundle(plan, number) for number in more.values()] + [_bundle(plan, share)] * num_others
            if _reserve(bundles, [{NODE_ID: node} for node in more] + [_not_in(excluded | own.keys())] * num_others):
                return True
    return False


def _spreads(plan: TrialPlan) -> Iterator[tuple[int, int, set[str]]]:
    """How a trial may lie on nodes, as far as their sizes and the other trials allow: the fewest nodes first.

    Yields:
        Number of nodes, workers on each, and the nodes that are out of the question.
    """
    others = [held for trial, held in _held.items() if trial != plan.name]
    alive = list_nodes()
    silent = lost_nodes() & {node.id for node in alive}
    silent |= {node.id for node in alive if node.address in plan.excluded_hosts}
    sizes = {node.id: (node.num_gpus, node.num_cpus) for node in alive if node.id not in silent}
    room = free_room(sizes, others, own_nodes=plan.own_nodes)
    if plan.own_nodes:
        room |= dict.fromkeys(nodes_of_other_jobs() & room.keys(), (0, 0))
    capacities = {node: capacity(plan, *free) for node, free in room.items()}
    for num_nodes in [plan.num_nodes] if plan.num_nodes else range(1, len(capacities) + 1):
        if not equal_shares(capacities, plan.world_size, num_nodes):
            continue  # not even if nothing else ran there
        share = plan.world_size // num_nodes
        # Ray does not know yet of workers that are about to start.
        yield num_nodes, share, silent | {node for node in sizes if capacities[node] < share}


def _bundle(plan: TrialPlan, share: int) -> dict[str, float]:
    return {name: amount * share for name, amount in worker_resources(plan).items()}


def _not_in(nodes: Set[str]) -> dict[str, str]:
    """The label selector of all nodes but some."""
    return {NODE_ID: f"!in({','.join(sorted(nodes))})"} if nodes else {}


def fits_next_to(plan: TrialPlan, live: Iterable[str]) -> bool:
    """Whether a trial has room now next to those under way, which have theirs or come first; it is kept for it then.

    Args:
        plan: The trial.
        live: Names of the trials that are under way.
    """
    if any(name in _waiting or name not in _held for name in live) or choose_nodes(plan) is None:
        _waiting.discard(plan.name)
        return False
    return True


def release_nodes(trial: str) -> None:
    """Gives a trial's nodes to others, when it has ended."""
    with _choosing:
        _held.pop(trial, None)
        _waiting.discard(trial)


def _reserve(bundles: list[dict[str, float]], selectors: list[dict[str, str]]) -> list[str] | None:
    """The node of each bundle, where all have room on different ones now."""
    group = placement_group(bundles, strategy="STRICT_SPREAD", bundle_label_selector=selectors)
    try:
        if not group.wait(RESERVE_TIMEOUT_SECONDS):
            return None
        return list(placement_group_table(group)["bundles_to_node_id"].values())
    finally:
        remove_placement_group(group)
