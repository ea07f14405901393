"""An acceptance as a table: each quantity's median and worst value, next to those of another cluster."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.acceptance.document import Acceptance
from orchestrator.acceptance.judge import number
from orchestrator.acceptance.quantities import QUANTITIES

UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity; of links, of one size of message."""

    quantity: str
    unit: str
    median: str
    worst: str
    worst_at: str
    """Host or hosts, and the GPU."""
    other: str
    """Median of the other cluster."""
    ratio: str
    """This cluster's median over the other's."""


def rows(acceptance: Acceptance, against: Acceptance | None = None) -> list[Row]:
    """A row for each quantity that was measured, in the order of the quantities."""
    medians, others = acceptance.medians(), against.medians() if against else {}
    order = list(QUANTITIES)
    found = []
    for key, part in sorted({**medians, **others}, key=lambda name: order.index(name[0])):
        row, median, other = QUANTITIES[key], medians.get((key, part)), others.get((key, part))
        places = _places(acceptance, key, part)
        choose = max if row.less_is_better else min
        value, place = choose(places, key=lambda item: item[0]) if len(places) > 1 else (None, "")
        ratio = f"{median / other:.2f}" if median is not None and other else UNKNOWN
        label = f"{row.heading} ({part})" if part else row.heading
        found.append(Row(label, row.unit, _shown(median), _shown(value), place, _shown(other), ratio))
    return found


def _shown(value: float | None) -> str:
    return UNKNOWN if value is None else number(value)


def _places(acceptance: Acceptance, key: str, part: str) -> list[tuple[float, str]]:
    """All values of a quantity, and where each was measured."""
    found = [
        (each.value, f"{node.host} {each.part}".rstrip())
        for node in acceptance.nodes
        for each in node.values
        if each.key == key and each.value is not None and not part
    ]
    for link in acceptance.links:
        for each in link.values:
            if len(link.hosts) == 2 and (each.key, each.part) == (key, part) and each.value is not None:
                place = " - ".join(link.hosts)
                found.append((each.value, place if link.gpu is None else f"{place} GPU {link.gpu}"))
    return found


def missing(acceptance: Acceptance) -> list[tuple[str, str]]:
    """What could not be measured: host or quantity, and the reason."""
    found = [(f"host {node.host}", node.reason) for node in acceptance.nodes if node.reason]
    values = [(node, each) for node in acceptance.nodes for each in node.values if each.value is None]
    return [*found, *((f"host {node.host}: {QUANTITIES[each.key].heading}", each.reason) for node, each in values)]
