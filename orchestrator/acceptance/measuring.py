"""Measures all nodes at once, links in rounds of disjoint pairs, and then again, in turn, what seems to fall behind.

What else happens on a machine makes a measurement slower, never faster. So a value that seems to fall behind is
measured again, in turn with that of peers, and the best of all counts: an alarm needs several bad ones in a row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from orchestrator.acceptance.document import LinkRecord, NodeRecord, Verdict
from orchestrator.acceptance.judge import judge
from orchestrator.acceptance.quantities import LINK_KEYS, QUANTITIES, node_keys
from orchestrator.execution.nodes import Node
from orchestrator.findings import root_cause
from trainers.contract.acceptance import Measured, ProbeStarted

CONFIRMATIONS = 2
"""How often what falls behind is measured again before it is named."""

CONTROLS = 3
"""Peers that are measured in turn with it."""


LINK_TIMEOUT_SECONDS = 120.0
"""Longest wait for the links of one round: half of it for two nodes to meet, which takes seconds."""


@dataclass(frozen=True, slots=True)
class Scope:
    """How much is measured."""

    short: bool
    node_seconds: float
    """How long each rate of a node is measured."""
    file_bytes: int
    """Size of the file that is written to storage."""
    link_seconds: float
    """How long each size of message is measured."""
    message_bytes: tuple[int, ...]
    """Sizes of messages between two nodes."""
    group_bytes: tuple[int, ...]
    """Sizes of messages between all nodes; empty for none."""
    max_rounds: int
    """Partners of each node; that all meet needs one fewer than there are nodes."""
    timeout_seconds: float
    """Longest wait for all nodes to measure themselves."""


FULL = Scope(
    short=False,
    node_seconds=1.5,
    file_bytes=64 * 2**20,
    link_seconds=0.5,
    message_bytes=(2**20, 16 * 2**20, 64 * 2**20),
    group_bytes=(64 * 2**10, 2**20, 16 * 2**20, 64 * 2**20),
    max_rounds=15,
    timeout_seconds=300.0,
)
"""What the command measures: some minutes."""

SHORT = Scope(
    short=True,
    node_seconds=0.5,
    file_bytes=16 * 2**20,
    link_seconds=0.5,
    message_bytes=(4 * 2**20,),
    group_bytes=(),
    max_rounds=3,
    timeout_seconds=120.0,
)
"""What preflight measures: some seconds."""


class Prober(Protocol):
    """What measures: `orchestrator.execution.probes.Probes`, whose docstrings say more."""

    started: dict[Node, ProbeStarted | Exception]

    def measure(self, keys: Mapping[Node, tuple[str, ...]], timeout: float) -> dict[Node, list[Measured] | Exception]:
        """Measures some quantities of each of some nodes, on all of them at once."""

    def meet(
        self, groups: Iterable[Sequence[Node]], message_bytes: tuple[int, ...], seconds: float, timeout: float, gpu: int
    ) -> dict[tuple[Node, ...], list[Measured] | Exception]:
        """Measures the links within groups that have no node in common, of all groups at once."""

    def clock_offsets(self, nodes: Iterable[Node]) -> dict[Node, tuple[float, float]]:
        """How far the clock of each node is ahead of this process's, and how uncertain that is (seconds)."""


def measure(
    probes: Prober, device: Literal["cuda", "cpu"], scope: Scope, witnesses: Collection[Node] = ()
) -> tuple[list[NodeRecord], list[LinkRecord], list[Verdict]]:
    """Measures the nodes of some processes and the links between them.

    Args:
        probes: The processes.
        device: What workers compute on.
        scope: How much is measured.
        witnesses: Nodes among them of which only the links count, to find out which end of another one is slow.

    Returns:
        The nodes, in the processes' order; the links; and what is not as it should be.
    """
    members = {node: started for node, started in probes.started.items() if node not in witnesses}
    nodes = _measure_nodes(probes, members, device, scope)
    fit = [node for node, record in nodes.items() if not record.reason]
    met = [*fit, *(node for node in witnesses if isinstance(probes.started[node], ProbeStarted))]
    links = _measure_links(probes, met, device, scope) if len(fit) > 1 else []
    if scope.group_bytes and len(fit) > 2:
        links += _measure_together(probes, fit, device, scope)
    records, outside = list(nodes.values()), {node.host for node in witnesses}
    return records, links, [each for each in judge(records, links) if not outside & set(each.hosts)]


def rounds(nodes: Sequence[Node], most: int) -> list[list[tuple[Node, Node]]]:
    """Pairs for rounds in which every node has one partner, or none, and never the same one twice.

    All meet after `len(nodes) - 1` rounds, one more where their number is odd (the circle method of tournaments).
    """
    circle: list[Node | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    half, found = len(circle) // 2, []
    for _ in range(min(most, len(circle) - 1)):
        opposite = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(a, b) for a, b in opposite if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def _measure_nodes(
    probes: Prober,
    members: Mapping[Node, ProbeStarted | Exception],
    device: Literal["cuda", "cpu"],
    scope: Scope,
) -> dict[Node, NodeRecord]:
    keys = node_keys(device, short=scope.short)
    records = {node: _described(node, started) for node, started in members.items()}
    ready = [node for node, record in records.items() if not record.reason]
    _take(records, probes.measure(dict.fromkeys(ready, keys), scope.timeout_seconds))
    for node, (offset, uncertainty) in probes.clock_offsets(ready).items():
        records[node] = replace(records[node], clock_offset_seconds=offset, clock_uncertainty_seconds=uncertainty)
    hosts = {record.host: node for node, record in records.items()}
    for _ in range(CONFIRMATIONS):
        suspects: dict[Node, dict[str, None]] = {}
        for verdict in judge([record for record in records.values() if not record.reason], []):
            if verdict.level == "behind" and verdict.key in QUANTITIES:
                suspects.setdefault(hosts[verdict.hosts[0]], {})[verdict.key] = None
        for node, again in suspects.items():
            peers = [each for each in ready if each not in suspects and not records[each].reason]
            for each in (node, *peers[:CONTROLS]):
                _take(records, probes.measure({each: tuple(again)}, scope.timeout_seconds))
    return records


def _described(node: Node, started: ProbeStarted | Exception) -> NodeRecord:
    record = NodeRecord(node.host, node.address, node.num_cpus)
    if isinstance(started, Exception):
        return replace(record, reason=_reason(started))
    return replace(record, processor=started.processor, gpus=started.gpus)


def _reason(error: Exception) -> str:
    """The last line of what went wrong: Ray puts the traceback of the node before it."""
    return root_cause(error).strip().splitlines()[-1][:300]


def _take(records: dict[Node, NodeRecord], outcomes: Mapping[Node, list[Measured] | Exception]) -> None:
    """Adds what was measured of some nodes to their records."""
    for node, outcome in outcomes.items():
        record = records[node]
        if isinstance(outcome, Exception):
            # A node that was measured once and does not answer any more is as lost as one that never did.
            records[node] = replace(record, reason=_reason(outcome))
        else:
            records[node] = replace(record, values=_best(record.values, outcome))


def _best(values: Iterable[Measured], others: Iterable[Measured]) -> tuple[Measured, ...]:
    """The better one of each quantity's measurements."""
    best: dict[tuple[str, ...], Measured] = {}
    for each in (*values, *others):
        name = (each.key, each.part, each.reason if each.key not in QUANTITIES else "")
        known = best.get(name)
        if known is None or known.value is None or (each.value is not None and _is_better(each, known.value)):
            best[name] = each
    return tuple(best.values())


def _is_better(each: Measured, than: float) -> bool:
    row = QUANTITIES.get(each.key)
    return each.value is not None and (each.value < than if row and row.less_is_better else each.value > than)


def _measure_links(
    probes: Prober, nodes: Sequence[Node], device: Literal["cuda", "cpu"], scope: Scope
) -> list[LinkRecord]:
    """Pairs in rounds; with GPUs, all rounds for each of a node's GPUs, as each may have a network adapter."""
    gpus: list[int | None] = [None]
    if device == "cuda":
        gpus = list(range(1 if scope.short else min(node.num_gpus for node in nodes)))
    found: list[LinkRecord] = []
    for gpu in gpus:
        links: dict[tuple[Node, ...], LinkRecord] = {}
        for pairs in rounds(nodes, scope.max_rounds):
            _take_links(links, _meet(probes, pairs, scope, gpu), gpu)
        for attempt in range(CONFIRMATIONS):
            for pair in _suspected_pairs(links, broken=attempt == 0):
                _take_links(links, _meet(probes, [pair], scope, gpu), gpu)
        found += links.values()
    return found


def _measure_together(
    probes: Prober, nodes: Sequence[Node], device: Literal["cuda", "cpu"], scope: Scope
) -> list[LinkRecord]:
    """All nodes at once, with the first of their GPUs."""
    gpu = 0 if device == "cuda" else None
    links: dict[tuple[Node, ...], LinkRecord] = {}
    _take_links(links, _meet(probes, [nodes], replace(scope, message_bytes=scope.group_bytes), gpu), gpu)
    return list(links.values())


def _meet(
    probes: Prober, groups: Sequence[Sequence[Node]], scope: Scope, gpu: int | None
) -> dict[tuple[Node, ...], list[Measured] | Exception]:
    return probes.meet(groups, scope.message_bytes, scope.link_seconds, LINK_TIMEOUT_SECONDS, gpu or 0)


def _take_links(
    links: dict[tuple[Node, ...], LinkRecord],
    outcomes: Mapping[tuple[Node, ...], list[Measured] | Exception],
    gpu: int | None,
) -> None:
    for group, outcome in outcomes.items():
        known = links.get(group, LinkRecord(tuple(node.host for node in group), gpu))
        if isinstance(outcome, Exception):
            links[group] = replace(known, reason="" if known.values else _reason(outcome))
        else:
            links[group] = replace(known, reason="", values=_best(known.values, outcome))


def _suspected_pairs(links: Mapping[tuple[Node, ...], LinkRecord], *, broken: bool) -> list[tuple[Node, ...]]:
    """Pairs that are measured again, one after the other: those under suspicion, and others in turn with them.

    With `broken`, also those that did not reach each other, which takes until the time is up.
    """
    keys = (*LINK_KEYS, "link") if broken else LINK_KEYS
    verdicts = [each for each in judge([], list(links.values())) if each.key in keys]
    suspects = {each.hosts for each in verdicts}
    if not suspects:
        return []
    accused = {host for hosts in suspects if len(hosts) == 1 for host in hosts}
    slow = [pair for pair, link in links.items() if link.hosts in suspects or accused & set(link.hosts)]
    slow = [pair for pair in slow if broken or not links[pair].reason]
    others = [pair for pair, link in links.items() if pair not in slow and not link.reason]
    return [*slow, *others[:CONTROLS]]
