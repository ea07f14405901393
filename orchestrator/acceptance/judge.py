"""Names the nodes, GPUs and links that fall behind, each with its value, its peers' and the unit."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from orchestrator.acceptance.data_sheets import LOW_SHARE, sheet_rate
from orchestrator.acceptance.document import LinkRecord, NodeRecord, Verdict
from orchestrator.acceptance.outliers import Outlier, outliers
from orchestrator.acceptance.quantities import QUANTITIES

CLOCK_TOLERANCE_SECONDS = 1.0
"""How far the clocks of nodes may be apart: lines of their logs then still sort."""

SLOW_LINK_GBS = 0.1
"""Below this, the only pair of a cluster is slow by any measure: gigabit Ethernet has 0.125 GB/s."""


def judge(nodes: Sequence[NodeRecord], links: Sequence[LinkRecord]) -> list[Verdict]:
    """Everything that is not as it should be, what falls behind first."""
    pairs = [link for link in links if len(link.hosts) == 2]
    slow = _worst_of_each(_link_verdicts(pairs))
    found = [*_node_verdicts(nodes), *_fault_verdicts(nodes), *_broken_links(pairs), *slow]
    return [*found, *_sheet_hints(nodes), *_quota_hints(nodes), *_clock_hints(nodes)]


def number(value: float) -> str:
    """A value with three digits: 0.0123, 12.3, 1,230."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _node_verdicts(nodes: Sequence[NodeRecord]) -> Iterator[Verdict]:
    """What is worse than that of peers: GPUs of one model, or hosts of one processor and number of CPUs."""
    groups: dict[tuple[str, str], dict[tuple[str, str], float]] = defaultdict(dict)
    for node in nodes:
        for each in node.values:
            if each.value is not None and each.key in QUANTITIES:
                kind = _gpu(node, each.part) or f"{node.processor}, {node.num_cpus}"
                groups[each.key, kind][node.host, each.part] = each.value
    for (key, _), values in groups.items():
        for outlier in outliers(values, QUANTITIES[key]):
            host, part = outlier.name
            yield _behind((host,), key, part, outlier, f"{part}: " if part else "")


def _behind(hosts: tuple[str, ...], key: str, part: str, outlier: Outlier[tuple[str, str]], place: str) -> Verdict:
    row = QUANTITIES[key]
    others = f"its {outlier.num_peers} peers have" if outlier.num_peers > 1 else "its only peer has"
    typical = f"{others} {number(outlier.typical)}{' (median)' * (outlier.num_peers > 1)}"
    what = f"{place}{row.heading} {number(outlier.value)} {row.unit}; {typical}"
    return Verdict("behind", hosts, key, part, what, outlier.value, outlier.typical)


def _fault_verdicts(nodes: Sequence[NodeRecord]) -> Iterator[Verdict]:
    for node in nodes:
        for each in node.values:
            if each.key == "gpu_fault":
                place = f"{each.part}: " if each.part else ""
                yield Verdict("behind", (node.host,), each.key, each.part, f"{place}{each.reason}")


def _broken_links(pairs: Sequence[LinkRecord]) -> Iterator[Verdict]:
    """Pairs that do not reach each other; a node that reaches none of several is named alone."""
    broken = [link for link in pairs if link.reason]
    silent = set()
    for host in dict.fromkeys(host for link in broken for host in link.hosts):
        own = [link for link in pairs if host in link.hosts]
        if len(own) > 1 and all(link.reason for link in own) and len(own) < len(pairs):
            silent.add(host)
            what = f"it reaches none of the {len(own)} nodes it was tried with: {own[0].reason}"
            yield Verdict("behind", (host,), "link", "", what)
    for link in broken:
        if not silent & set(link.hosts):
            yield Verdict("behind", link.hosts, "link", "", f"these do not reach each other: {link.reason}")


def _link_verdicts(pairs: Sequence[LinkRecord]) -> Iterator[Verdict]:
    """Nodes that are slow with everyone, then pairs of others that are slow.

    A node is judged by the best of its pairs: a slow node makes those with it slow, but not those of its partners with
    others. Of two nodes there is one pair, and nothing to compare it with.
    """
    groups: dict[tuple[str, str, int | None], dict[tuple[str, ...], float]] = defaultdict(dict)
    for link in pairs:
        for each in link.values:
            if each.value is not None:
                groups[each.key, each.part, link.gpu][link.hosts] = each.value
    for (key, part, gpu), values in groups.items():
        row, best = QUANTITIES[key], min if QUANTITIES[key].less_is_better else max
        place = " ".join(
            filter(None, (f"GPU {gpu}," if gpu is not None else "", f"messages of {part}:" if part else ""))
        )
        place = f"{place} " if place else ""
        if len(values) == 1:
            ((hosts, value),) = values.items()
            if key == "all_reduce" and value < SLOW_LINK_GBS:
                what = f"{place}{row.heading} {number(value)} {row.unit}, less than gigabit Ethernet allows"
                yield Verdict("behind", hosts, key, part, what, value)
            continue
        names = dict.fromkeys(chain.from_iterable(values))
        nodes = {(name, ""): best(value for hosts, value in values.items() if name in hosts) for name in names}
        slow = outliers(nodes, row)
        yield from (_behind((each.name[0],), key, part, each, f"{place}with its best partner, ") for each in slow)
        behind = {each.name[0] for each in slow}
        rest = {(hosts[0], hosts[1]): value for hosts, value in values.items() if not behind & set(hosts)}
        yield from (_behind(each.name, key, part, each, place) for each in outliers(rest, row))


def _worst_of_each(verdicts: Iterator[Verdict]) -> Iterator[Verdict]:
    """The worst of each node's or pair's verdicts on a quantity: sizes of messages and GPUs are often all affected."""
    groups: dict[tuple[tuple[str, ...], str], list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        groups[verdict.hosts, verdict.key].append(verdict)
    for group in groups.values():
        worst = max(group, key=lambda each: abs(math.log((each.value or 1) / (each.typical or 1))))
        more = f"; and {len(group) - 1} more like this" if len(group) > 1 else ""
        yield replace(worst, what=f"{worst.what}{more}")


def _sheet_hints(nodes: Sequence[NodeRecord]) -> Iterator[Verdict]:
    for node in nodes:
        for each in node.values:
            rate = sheet_rate(_gpu(node, each.part), each.key)
            if rate and each.value is not None and each.value < LOW_SHARE * rate:
                row, share = QUANTITIES[each.key], 100 * each.value / rate
                what = f"{each.part}: {row.heading} {number(each.value)} {row.unit}, {share:.0f} % of the data sheet's"
                text = f"{what} {number(rate)}"
                yield Verdict("hint", (node.host,), each.key, each.part, text, each.value, rate)


def _quota_hints(nodes: Sequence[NodeRecord]) -> Iterator[Verdict]:
    for node in nodes:
        for each in node.values:
            if each.key == "usable_cpus" and each.value is not None and each.value < 0.95 * node.num_cpus:
                what = f"Ray offers {node.num_cpus} CPUs there, of which its control group leaves {number(each.value)}"
                yield Verdict("hint", (node.host,), each.key, "", what, each.value, float(node.num_cpus))


def _clock_hints(nodes: Sequence[NodeRecord]) -> Iterator[Verdict]:
    known = {node.host: node for node in nodes if node.clock_offset_seconds is not None}
    offsets = {host: node.clock_offset_seconds or 0.0 for host, node in known.items()}
    center = statistics.median(offsets.values()) if offsets else 0.0
    for host, offset in offsets.items():
        uncertain = known[host].clock_uncertainty_seconds or 0.0
        if abs(offset - center) > CLOCK_TOLERANCE_SECONDS + uncertain:
            which = "ahead of" if offset > center else "behind"
            what = f"its clock is {number(abs(offset - center))} s {which} the others' (median)"
            yield Verdict("hint", (host,), "clock_offset", "", what, offset, center)


def _gpu(node: NodeRecord, part: str) -> str:
    """Model of the GPU that is a part of a node; "" for the node itself."""
    index = part.removeprefix("GPU ")
    return node.gpus[int(index)] if part.startswith("GPU ") and int(index) < len(node.gpus) else ""
