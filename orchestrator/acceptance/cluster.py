"""Accepts a cluster that this process is connected to: starts what measures, measures, judges."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.acceptance.document import Acceptance
from orchestrator.acceptance.measuring import Scope, measure
from orchestrator.execution.nodes import Node
from orchestrator.execution.probes import Probes
from orchestrator.files import existing_parent, is_folder
from trainers.contract.acceptance import ProbeRequest
from trainers.contract.plan import TrialPlan

START_TIMEOUT_SECONDS = 120.0
"""For a node to start a process that imports torch; it takes seconds, unless its GPUs are taken."""


def accept(trials: Sequence[TrialPlan], nodes: Sequence[Node], scope: Scope, environment: dict[str, str]) -> Acceptance:
    """Measures the nodes that take workers of some trials, and the links between them, as these would use them.

    The one link of two nodes does not say which of them is slow: a node without workers, as a head is, then meets both.

    Args:
        trials: At least one; its device, data and storage are measured.
        nodes: All nodes of the cluster; at least one takes workers.
        scope: How much is measured.
        environment: What the result was made in.
    """
    trial, began = trials[0], time.monotonic()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    members = worker_nodes(trials, nodes)
    others = [node for node in nodes if node not in members]
    witnesses = others[:1] if len(members) == 2 and trial.device == "cpu" else []
    requests = {node: _request(trial, node, scope) for node in (*members, *witnesses)}
    with Probes(requests, START_TIMEOUT_SECONDS) as probes:
        records, links, verdicts = measure(probes, trial.device, scope, witnesses)
    return Acceptance(
        experiment=trial.experiment,
        started=started,
        device=trial.device,
        short=scope.short,
        nodes=tuple(records),
        links=tuple(links),
        verdicts=tuple(verdicts),
        seconds=time.monotonic() - began,
        environment=environment,
    )


def worker_nodes(trials: Sequence[TrialPlan], nodes: Sequence[Node]) -> list[Node]:
    """The nodes that take a worker of some trial; a head without CPUs does not."""
    return [node for node in nodes if any(node.capacity(trial) for trial in trials)]


def _request(trial: TrialPlan, node: Node, scope: Scope) -> ProbeRequest:
    checkpoints = None if "://" in trial.checkpoint_dir else str(existing_parent(Path(trial.checkpoint_dir)))
    images = Path(trial.train.images)
    return ProbeRequest(
        device=trial.device,
        num_cpus=node.num_cpus,
        seconds=scope.node_seconds,
        num_bytes=scope.file_bytes,
        data_folder=str(images) if is_folder(images) else None,
        checkpoint_folder=checkpoints,
    )
