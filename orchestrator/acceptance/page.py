"""The page of an acceptance: findings, every node and link, and another cluster's medians next to this one's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.acceptance.document import Acceptance, LinkRecord, NodeRecord
from orchestrator.acceptance.judge import number
from orchestrator.acceptance.quantities import LINK_KEYS, QUANTITIES
from orchestrator.acceptance.table import UNKNOWN, missing, rows
from orchestrator.files import write_atomically
from orchestrator.report.page import template

FILE_NAME = "acceptance.html"

OUTCOMES = ("fit", "falls behind", "not measured")
"""By exit code."""


def write_page(acceptance: Acceptance, folder: Path, against: Acceptance | None = None) -> Path:
    """Writes `acceptance.html` into a folder and returns its path. Raises OSError."""
    path = folder / FILE_NAME
    write_atomically(path, page(acceptance, against))
    return path


def page(acceptance: Acceptance, against: Acceptance | None = None) -> str:
    """The page, in one file without external resources."""
    measured = {each.key for node in acceptance.nodes for each in node.values}
    quantities = [row for row in QUANTITIES.values() if row.key in measured]
    columns = list(dict.fromkeys((each.key, each.part) for link in acceptance.links for each in link.values))
    return template("acceptance.html.j2").render(
        title=f"Acceptance for {acceptance.experiment}",
        outcome=OUTCOMES[acceptance.exit_code],
        acceptance=acceptance,
        against=against,
        other_title=f"{against.experiment}, {against.started}" if against else "",
        missing=missing(acceptance),
        rows=rows(acceptance, against),
        quantities=[*quantities, *(QUANTITIES[key] for key in LINK_KEYS if acceptance.links)],
        node_quantities=quantities,
        nodes=[(node, [_cell(node, row.key) for row in quantities], _offset(node)) for node in acceptance.nodes],
        link_headings=[f"{QUANTITIES[key].heading} {part} ({QUANTITIES[key].unit})" for key, part in columns],
        links=[(_place(link), _link_cells(link, columns)) for link in acceptance.links],
    )


def _cell(node: NodeRecord, key: str) -> str:
    """The worst of a node's values of a quantity."""
    values = [each.value for each in node.values if each.key == key and each.value is not None]
    worst = max if QUANTITIES[key].less_is_better else min
    return number(worst(values)) if values else UNKNOWN


def _offset(node: NodeRecord) -> str:
    if node.clock_offset_seconds is None:
        return UNKNOWN
    return f"{node.clock_offset_seconds:+.3f} ± {node.clock_uncertainty_seconds:.3f}"


def _place(link: LinkRecord) -> str:
    hosts = " - ".join(link.hosts) if len(link.hosts) == 2 else f"all {len(link.hosts)} nodes"
    return hosts if link.gpu is None else f"{hosts}, GPU {link.gpu}"


def _link_cells(link: LinkRecord, columns: Sequence[tuple[str, str]]) -> list[str]:
    values = {(each.key, each.part): each.value for each in link.values}
    return [UNKNOWN if (value := values.get(name)) is None else number(value) for name in columns]
