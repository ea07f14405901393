"""Whether the nodes of a cluster are as fast as each other: the short form of an acceptance, as findings."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.acceptance.cluster import accept, worker_nodes
from orchestrator.acceptance.document import Acceptance, Verdict
from orchestrator.acceptance.measuring import SHORT
from orchestrator.execution.nodes import Node
from orchestrator.findings import Finding, root_cause
from trainers.contract.plan import TrialPlan


def check_speed(
    trials: Sequence[TrialPlan], nodes: Sequence[Node], *, exclude: bool, excluded: set[str]
) -> list[Finding]:
    """Measures the nodes that take workers, where there are several, for some seconds.

    Args:
        trials: At least one.
        nodes: All nodes of the cluster.
        exclude: Whether nodes that fall behind are left out (`resources.exclude_slow_nodes`).
        excluded: Gets the addresses of these.

    Returns:
        Warnings: a slow node makes a run slow, not wrong.
    """
    if len(worker_nodes(trials, nodes)) < 2:
        return []
    try:
        acceptance = accept(trials, nodes, SHORT, {})
    except Exception as error:  # noqa: BLE001 - a run is not given up because its nodes' speed is unknown
        what = f"the nodes could not be measured: {root_cause(error)}"
        return [Finding("warning", "not_measured", "", "", what, "See what `python -m orchestrator.accept` says")]
    return speed_findings(acceptance, exclude=exclude, excluded=excluded)


def speed_findings(acceptance: Acceptance, *, exclude: bool, excluded: set[str]) -> list[Finding]:
    """What an acceptance has found, as warnings; with `exclude`, `excluded` gets the addresses of slow nodes."""
    slow = acceptance.slow_hosts() if exclude else ()
    excluded |= {node.address for node in acceptance.nodes if node.host in slow}
    hint = "See what `python -m orchestrator.accept` says"
    found = [
        Finding("warning", "not_measured", "", f"host {node.host}", f"not measured: {node.reason}", hint)
        for node in acceptance.nodes
        if node.reason
    ]
    return [*found, *(_finding(verdict, slow) for verdict in acceptance.verdicts)]


def _finding(verdict: Verdict, slow: Sequence[str]) -> Finding:
    if verdict.level == "hint":
        hint = "Look at it before a long run; nodes are compared with each other, not with this"
        return Finding("warning", "node_hint", verdict.key, verdict.place, verdict.what, hint)
    if len(verdict.hosts) == 1 and verdict.hosts[0] in slow:
        hint = "It is left out of this run (resources.exclude_slow_nodes); repair it, or take it out of the cluster"
    elif len(verdict.hosts) == 1:
        hint = "Every step waits for the slowest: repair it, or leave it out (resources.exclude_slow_nodes: true)"
    else:
        hint = "Look at the cable, the ports and the switch between them (`python -m orchestrator.accept` says more)"
    code = "slow_node" if len(verdict.hosts) == 1 else "slow_link"
    return Finding("warning", code, verdict.key, verdict.place, f"falls behind: {verdict.what}", hint)
