"""Asks every node of a started Ray cluster whether a run can work there, before a worker takes an accelerator."""

from __future__ import annotations

import ipaddress
import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.acceptance.cluster import worker_nodes
from orchestrator.execution.cluster import token_required
from orchestrator.execution.nodes import Node, all_reduce_failure, call_on_nodes, list_nodes, with_free_gpu
from orchestrator.files import existing_parent, redact
from orchestrator.findings import Finding, FindingList, Level, sort_findings
from orchestrator.preflight.fit import check_concurrency, check_fit, most_workers, needs_several_hosts
from orchestrator.preflight.local import (
    compiles_kernels,
    joins_cluster,
    node_request,
    shared_memory_bytes,
    storage_bytes,
)
from orchestrator.preflight.node import NodeReport, NodeRequest, inspect_node, judge_nodes
from orchestrator.preflight.speed import check_speed
from orchestrator.preflight.torch_support import check_torch
from orchestrator.preflight.weights import prepare_weights
from trainers.contract.weights import StartWeights

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from orchestrator.experiment.spec import Experiment
    from trainers.contract.plan import TrialPlan

NODE_TIMEOUT_SECONDS = 60.0
"""A node answers within seconds; a fresh one first starts a process."""

WEIGHTS_TIMEOUT_SECONDS = 1800.0
"""For a node to fetch start weights; some hundred megabytes."""

CANARY_TIMEOUT_SECONDS = 90.0
"""A communicator over hosts that reach each other is up in seconds, NCCL's first one in some ten more."""


def preflight_cluster(
    experiment: Experiment, trials: Sequence[TrialPlan], excluded: set[str] | None = None
) -> list[Finding]:
    """Checks a cluster that this process is connected to against the trials.

    Resources come first: where a trial does not fit, or the cluster is open to anyone, nothing is started on it.

    Args:
        experiment: The experiment.
        trials: Its trials.
        excluded: Gets the addresses of nodes that are not to be used, as they fall behind the others.

    Returns:
        All findings, errors first.
    """
    excluded = set() if excluded is None else excluded
    nodes = list_nodes()
    findings = [*check_token(nodes), *check_fit(nodes, trials, nodes_may_come=joins_cluster(experiment))]
    findings += check_concurrency(experiment, trials, nodes)
    findings += check_standby(experiment, trials)
    findings += check_exclusion(experiment, trials, nodes)
    if not trials or any(finding.level == "error" for finding in findings):
        return sort_findings(findings)
    if not joins_cluster(experiment):
        # This machine, which has been checked (`preflight`), before torch was imported.
        on_gpus = any(trial.device == "cuda" for trial in trials)
        more = check_torch({node: inspect_node(NodeRequest({}, {})) for node in nodes}) if on_gpus else []
        return sort_findings([*findings, *more])
    findings += check_every_node(experiment, trials, nodes)
    if not any(finding.level == "error" for finding in findings):
        findings += fetch_weights(trials[0], nodes)
    if len(nodes) > 1 and not any(finding.level == "error" for finding in findings):
        findings += check_communication(trials, nodes)
    if not any(finding.level == "error" for finding in findings):
        findings += check_speed(trials, nodes, exclude=experiment.resources.exclude_slow_nodes, excluded=excluded)
    if excluded:
        rest = [node for node in nodes if node.address not in excluded]
        findings += check_fit(rest, trials, nodes_may_come=joins_cluster(experiment))
    return sort_findings(findings)


def check_standby(experiment: Experiment, trials: Sequence[TrialPlan]) -> list[Finding]:
    """Refuses workers that wait for a failure where they would take memory of GPUs that are trained on."""
    findings = FindingList()
    if experiment.faults.standby is True and any(trial.device == "cuda" for trial in trials):
        what = (
            "true starts a second group of workers, whose processes would take memory of the GPUs that are trained on"
        )
        findings.error("standby_on_gpus", "faults.standby", "", what, "Set it to auto or false; it is for CPUs so far")
    return findings.to_list()


def check_exclusion(experiment: Experiment, trials: Sequence[TrialPlan], nodes: Sequence[Node]) -> list[Finding]:
    """Mentions that slow nodes cannot be left out where there are no others to compare them with."""
    findings = FindingList()
    if experiment.resources.exclude_slow_nodes and trials and len(worker_nodes(trials, nodes)) < 2:
        what, hint = "it has no effect where one node takes workers", "Leave it out, or join a cluster of several nodes"
        findings.warning("config_unused", "resources.exclude_slow_nodes", "", what, hint)
    return findings.to_list()


def check_token(nodes: Sequence[Node]) -> list[Finding]:
    """Refuses a cluster that other machines can reach but that asks nobody for a token: its job server runs code."""
    addresses = [ipaddress.ip_address(node.address) for node in nodes]
    reachable = [str(address) for address in addresses if not address.is_loopback]
    if not reachable or len(nodes) == 1 or token_required():
        return []
    what = f"nodes at {', '.join(reachable)} take work from anyone who reaches them: token authentication is off"
    hint = "Set RAY_AUTH_MODE=token and the token of `ray get-auth-token --generate` on every node, and start it again"
    # Whoever turns it off explicitly has decided so, for a private network.
    level: Level = "warning" if os.environ.get("RAY_AUTH_MODE") == "disabled" else "error"
    return [Finding(level, "cluster_open", "RAY_AUTH_MODE", "", what, hint)]


def check_every_node(experiment: Experiment, trials: Sequence[TrialPlan], nodes: Sequence[Node]) -> list[Finding]:
    """Runs `inspect_node` on every node, with a file of the driver's to look for in storage."""
    request = node_request(trials)
    text = f".preflight-{uuid.uuid4().hex}"
    probes: dict[str, str] = {}
    try:
        if len(nodes) > 1:
            probes = _write_probes(request.folders, text)
            request = replace(request, folders=request.folders | probes, probe_text=text)
        outcomes = call_on_nodes(inspect_node, dict.fromkeys(nodes, (request,)), NODE_TIMEOUT_SECONDS)
    finally:
        for probe in probes.values():
            Path(probe).unlink(missing_ok=True)
    findings, needs_gpus = FindingList(), any(trial.device == "cuda" for trial in trials)
    reports: dict[Node, NodeReport] = {}
    for node, outcome in outcomes.items():
        place = f"host {node.host}"
        if isinstance(outcome, TimeoutError):
            hint = "Look at the node's raylet log, or take it out of the cluster"
            findings.error("node_silent", "", place, str(outcome), hint)
        elif isinstance(outcome, Exception):
            what = f"a check failed there: {type(outcome).__name__}: {_last_line(outcome)}"
            findings.error("node_broken", "", place, what, "Use one image, or one `make install`, on all nodes")
        else:
            reports[node] = replace(outcome, host=node.host)
            if needs_gpus and len(outcome.gpus) < node.num_gpus:
                shown = f"shows {len(outcome.gpus)}" if outcome.cuda_driver else "does not answer"
                what = f"Ray counts {node.num_gpus} GPUs there, NVIDIA's driver {shown}"
                hint = "See `nvidia-smi` there. Restart Ray where the driver was changed under it, else the host"
                # Without the driver's library for questions, GPUs may still compute.
                report = findings.error if outcome.cuda_driver else findings.warning
                report("gpus_missing", "GPUs", place, what, hint)
            if outcome.credentials:
                what = f"workers there would have {', '.join(outcome.credentials)}"
                hint = "Take it out of the job's env_vars and of `ray start`; the driver reads ~/.mlflow/credentials"
                findings.error("credentials_on_workers", "environment", place, what, hint)
    judged = judge_nodes(
        list(reports.values()),
        request,
        versions=inspect_node(replace(request, paths={}, folders={})).versions,
        storage_bytes=storage_bytes(experiment, trials),
        shared_memory_bytes={
            node.host: shared_memory_bytes(experiment, ((trial, most_workers(trial, node, nodes)) for trial in trials))
            for node in nodes
        },
        needs_gpus=needs_gpus,
        compiles=compiles_kernels(trials),
        survives_storage=trials[0].survive_storage,
    )
    return [*findings.to_list(), *judged, *(check_torch(reports) if needs_gpus else ())]


def fetch_weights(trial: TrialPlan, nodes: Sequence[Node]) -> list[Finding]:
    """Has every node fetch start weights that are at an address; its workers then find them there."""
    if not StartWeights.of(trial.weights or "").address:
        return []
    arguments = dict.fromkeys(nodes, (trial.weights, trial.weights_sha256))
    outcomes = call_on_nodes(prepare_weights, arguments, WEIGHTS_TIMEOUT_SECONDS)
    findings = []
    for node, outcome in outcomes.items():
        if isinstance(outcome, Exception):
            what = f"the start weights cannot be fetched there: {_last_line(outcome)}"
            hint = "Put the file on storage that all nodes share, and set model.weights to its path"
            findings.append(
                Finding("error", "weights_download", redact(str(trial.weights)), f"host {node.host}", what, hint)
            )
        elif outcome:
            findings.append(replace(outcome, id=f"host {node.host}"))
    return findings


def _write_probes(folders: Iterable[str], text: str) -> dict[str, str]:
    """Writes a file into each folder, or the nearest existing one above it; folders that refuse are left out."""
    probes: dict[str, str] = {}
    for folder in folders:
        probe = existing_parent(Path(folder)) / text
        try:
            probe.write_text(text, encoding="utf-8")
            probes[folder] = str(probe)
        except OSError:
            continue  # each node reports that it cannot write there
    return probes


def _last_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[-1][:200] if text else type(error).__name__


def check_communication(trials: Sequence[TrialPlan], nodes: Sequence[Node]) -> list[Finding]:
    """Times an all-reduce between the hosts of the widest trial that needs several: what hangs is found here.

    Hosts whose GPUs are all in use are left out: the trial waits for them, the all-reduce would not.
    """
    wide = [trial for trial in trials if needs_several_hosts(trial, nodes)]
    if not wide:
        return []
    trial = max(wide, key=lambda trial: trial.num_nodes or trial.world_size)
    hosts = [node for node in nodes if node.capacity(trial)]
    free = with_free_gpu(hosts) if trial.device == "cuda" else hosts
    if len(free) < min(2, len(hosts)):
        what = "an all-reduce between hosts was not tried: their GPUs are in use"
        hint = "Nothing: a trial waits for room, up to faults.timeouts.setup; try it again once they are free"
        return [Finding("warning", "canary_left_out", "network", f"trial {trial.name}", what, hint)]
    hosts = free[: trial.num_nodes or None]
    failure = all_reduce_failure(hosts, trial.device, CANARY_TIMEOUT_SECONDS)
    if failure is None:
        return []
    names = ", ".join(f"{node.host} ({node.address})" for node in hosts)
    what = f"an all-reduce between {names} fails: {_last_line(failure)}"
    hint = "Open the ports between the hosts, and name their interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    return [Finding("error", "canary_failed", "network", f"trial {trial.name}", what, hint)]
