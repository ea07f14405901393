"""Whether trials have room on the nodes of a cluster, as far as what these have in all decides it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.experiment.placement import equal_shares, num_side_by_side, smaller
from orchestrator.findings import Finding, FindingList

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.execution.nodes import Node
    from orchestrator.experiment.spec import Experiment
    from trainers.contract.plan import TrialPlan


def check_fit(nodes: Sequence[Node], trials: Sequence[TrialPlan], *, nodes_may_come: bool = False) -> list[Finding]:
    """Compares what each trial reserves with what the nodes have, and with how its workers pack onto them.

    Where nodes may come later, one that may run with fewer workers needs room for these only.
    """
    findings = FindingList()
    for planned in trials:
        trial = _that_fits(planned, nodes) if nodes_may_come else planned
        if trial.world_size != planned.world_size:
            what = f"begins with {trial.world_size} of {planned.world_size} workers, as there is no room for more yet"
            hint = "Nothing: it takes all as soon as they have room; or start the other nodes first"
            findings.warning("fewer_workers", "resources.min_workers", f"trial {planned.name}", what, hint)
        capacities = [node.capacity(trial) for node in nodes]
        have = "; ".join(_describe(node, trial) for node in nodes) or "no node"
        thing = "GPU" if trial.device == "cuda" else "CPU"
        code = f"too_few_{thing.lower()}s"
        each = f"1 GPU and {trial.cpus_per_worker} CPUs" if thing == "GPU" else f"{trial.cpus_per_worker} CPUs"
        hint = "Start the nodes first (they are not waited for), take smaller world sizes"
        hint += ", or set resources.cpus_per_worker lower" if trial.cpus_per_worker > 1 else ""
        place = f"trial {trial.name}"
        if sum(capacities) < trial.world_size:
            what = f"asks for {trial.world_size} workers of {each}; the cluster takes {sum(capacities)}: {have}"
            findings.error(code, "trials.world_sizes", place, what, hint)
        elif not equal_shares({node.id: node.capacity(trial) for node in nodes}, trial.world_size, trial.num_nodes):
            if trial.num_nodes:
                per_node = -(-trial.world_size // trial.num_nodes)
                fit = sum(capacity >= per_node for capacity in capacities)
                what = f"asks for {trial.num_nodes} hosts with {per_node} workers of {each}; {fit} have room: {have}"
                findings.error(code, "resources.num_nodes", place, what, hint)
            else:
                what = f"{trial.world_size} workers of {each} do not spread equally over the hosts: {have}"
                hint = "Take world sizes that several hosts take equally; uneven hosts would wait for the fullest"
                findings.error("uneven_nodes", "trials.world_sizes", place, what, hint)
        elif not fits_evaluation(trial, nodes):
            kind, number = ("GPUs", trial.evaluation_gpus) if trial.evaluation_gpus else ("CPUs", trial.evaluation_cpus)
            what = f"its workers leave too little for evaluations on {number} {kind}: {have}"
            hint = "Reserve less, or null, which evaluates with the workers; or take smaller world sizes"
            findings.error(f"too_few_{kind.lower()}", "resources.evaluation", place, what, hint)
    return findings.to_list()


def _that_fits(trial: TrialPlan, nodes: Sequence[Node]) -> TrialPlan:
    """A trial with as many of its workers as have room on free nodes; with all where none of its sizes has."""
    sizes = (trial, *smaller(trial))
    fit = (
        each for each in sizes if equal_shares({n.id: n.capacity(each) for n in nodes}, each.world_size, each.num_nodes)
    )
    return next(fit, trial)


def check_concurrency(experiment: Experiment, trials: Sequence[TrialPlan], nodes: Sequence[Node]) -> list[Finding]:
    """Warns where fewer trials run at a time than were asked for."""
    asked = experiment.trials.concurrent
    if asked == "auto" or not trials:
        return []
    number = num_side_by_side(trials, {node.id: (node.num_gpus, node.num_cpus) for node in nodes}, asked)
    if number == min(asked, len(trials)):
        return []
    hosts = "the only host takes" if len(nodes) == 1 else f"the {len(nodes)} hosts take"
    what = f"{asked} trials at a time; {hosts} {number}, the others wait for their turn"
    hint = "Set it to auto, bring more hosts, or let trials share hosts (trials.allow_shared_nodes)"
    if experiment.trials.allow_shared_nodes:
        hint = "Set it to auto, or bring more hosts"
    return [Finding("warning", "fewer_at_a_time", "trials.concurrent", "", what, hint)]


def fits_evaluation(trial: TrialPlan, nodes: Sequence[Node]) -> bool:
    """Whether what a trial reserves for evaluations has room next to its workers, as they are placed on free nodes."""
    shares = equal_shares({node.id: node.capacity(trial) for node in nodes}, trial.world_size, trial.num_nodes) or {}
    free = []
    for node in nodes:
        num_workers = shares.get(node.id, 0)
        num_gpus = node.num_gpus - (num_workers if trial.device == "cuda" else 0)
        free.append((num_gpus, node.num_cpus - num_workers * trial.cpus_per_worker))
    on_gpus = sum(min(num_gpus, num_cpus // trial.cpus_per_worker) for num_gpus, num_cpus in free)
    return on_gpus >= trial.evaluation_gpus and max(num_cpus for _, num_cpus in free) >= trial.evaluation_cpus


def most_workers(trial: TrialPlan, node: Node, nodes: Sequence[Node]) -> int:
    """The most workers of a trial that run on a node: they are placed on as few as possible where nothing else runs."""
    shares = equal_shares({each.id: each.capacity(trial) for each in nodes}, trial.world_size, trial.num_nodes)
    return min(node.capacity(trial), *(shares or {"": trial.world_size}).values())


def needs_several_hosts(trial: TrialPlan, nodes: Sequence[Node]) -> bool:
    """Whether a trial's workers cannot all be on one host."""
    return (trial.num_nodes or 1) > 1 or trial.world_size > max((node.capacity(trial) for node in nodes), default=0)


def _describe(node: Node, trial: TrialPlan) -> str:
    """What a node has, and how many workers of a trial that makes."""
    gpus = f"{node.num_gpus} GPUs, " if trial.device == "cuda" else ""
    return f"{node.host} ({gpus}{node.num_cpus} CPUs) takes {node.capacity(trial)}"
