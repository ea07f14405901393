"""Every check of a run that can fail before a worker starts; all findings at once.

`preflight` needs no cluster: data, model, weights, tracking, this machine. `preflight_cluster` asks every node of a
started Ray cluster.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import model_checks
from orchestrator.bars import show_bar
from orchestrator.findings import Finding, FindingList, sort_findings
from orchestrator.node_checks import NodeRequest, inspect_node, judge_nodes
from orchestrator.tracking_checks import check_tracking

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.coco_checks import Split
    from orchestrator.spec import Experiment
    from trainers.contract import TrialPlan

PREFETCHED_BATCHES = 2
"""Batches that each loader process holds ready (torch's default)."""


def preflight(experiment: Experiment, trials: Sequence[TrialPlan], *, verify_images: bool = False) -> list[Finding]:
    """Checks what can be checked on the driver without a cluster.

    Args:
        experiment: What was asked for.
        trials: Its trials as they would be run; none checks what does not depend on them.
        verify_images: Decode every image instead of reading heads and ends only.

    Returns:
        All findings, errors first.
    """
    findings = [
        *model_checks.check_overrides(experiment),
        *model_checks.check_weights(experiment),
        *check_tracking(experiment),
        *check_nodes_asked(trials),
    ]
    if trials:
        findings += check_data(experiment, trials[0], verify_images=verify_images)
        if not _joins_cluster(experiment):
            findings += check_this_machine(experiment, trials)
    return sort_findings(findings)


def check_data(experiment: Experiment, trial: TrialPlan, *, verify_images: bool) -> list[Finding]:
    """Checks the training and validation set, each by itself, against each other, and against the model."""
    from orchestrator.coco_checks import Split, check_split, compare_splits
    from orchestrator.coco_layout import layout_finding

    train, val = (
        Split(Path(plan.annotations), Path(plan.images), for_scoring=plan is trial.val)
        for plan in (trial.train, trial.val)
    )
    if experiment.data.coco is None and not all(map(_is_there, (train, val))):
        # One finding with the whole tree, instead of one for each of its four parts.
        return [layout_finding(train.annotations.parent.parent, [train, val])]
    findings: list[Finding] = []
    summaries = []
    for split in (train, val):
        with show_bar(f"checking {split.images.name}") as advance:
            report = check_split(split, verify_images=verify_images, on_progress=advance)
        findings += report.findings
        if report.summary is not None:
            summaries.append(report.summary)
    if len(summaries) == 2:
        findings += compare_splits(*summaries)
        findings += model_checks.check_data_against_model(experiment, *summaries)
    return findings


def _is_there(split: Split) -> bool:
    return split.annotations.is_file() and split.images.is_dir()


def check_nodes_asked(trials: Sequence[TrialPlan]) -> list[Finding]:
    """Checks that the workers of each trial spread evenly over the hosts asked for."""
    findings = FindingList()
    for trial in trials:
        if trial.num_nodes and trial.world_size % trial.num_nodes:
            what = f"{trial.world_size} workers do not spread evenly over {trial.num_nodes} hosts"
            mend = f"Take world sizes that are multiples of {trial.num_nodes}, or another resources.num_nodes"
            findings.error("uneven_nodes", "resources.num_nodes", f"trial {trial.name}", what, mend)
    return findings.to_list()


def check_this_machine(experiment: Experiment, trials: Sequence[TrialPlan]) -> list[Finding]:
    """Checks storage, shared memory and GPUs where the driver runs, for a run that stays on this machine."""
    request = node_request(experiment, trials)
    report = inspect_node(request)
    findings = judge_nodes(
        [report],
        request,
        versions=report.versions,
        storage_bytes=storage_bytes(experiment, trials),
        shared_memory_bytes=shared_memory_bytes(experiment, trials, num_nodes=1),
        needs_gpus=any(trial.device == "cuda" for trial in trials),
    )
    for trial in trials:
        if trial.device == "cuda" and trial.world_size > len(report.gpus):
            what = f"asks for {trial.world_size} GPUs, this machine has {len(report.gpus)}"
            mend = "Take smaller world sizes, join a cluster (resources.address), or set resources.device=cpu"
            findings.append(Finding("error", "too_few_gpus", "trials.world_sizes", f"trial {trial.name}", what, mend))
    return findings


def node_request(experiment: Experiment, trials: Sequence[TrialPlan]) -> NodeRequest:
    """Says what every node is asked: to read the data, weights and model config, and to write where storage is."""
    trial = trials[0]
    paths = {
        "the training annotations": trial.train.annotations,
        "the training images": trial.train.images,
        "the validation annotations": trial.val.annotations,
        "the validation images": trial.val.images,
    }
    if trial.weights and "://" not in trial.weights:
        paths["the start weights"] = trial.weights
    if os.path.isabs(trial.config_file):  # noqa: PTH117 - a name of the model zoo is no path
        paths["the model config"] = trial.config_file
    # What is not on the driver either is told once, by the checks of the data themselves.
    there = {what: path for what, path in paths.items() if Path(path).exists()}
    storage = str(Path(trial.trial_dir).parent) if "://" not in trial.trial_dir else ""
    return NodeRequest(paths=there, storage=storage)


def storage_bytes(experiment: Experiment, trials: Sequence[TrialPlan]) -> float:
    """Estimates the room for the checkpoints of all trials: those kept, the best, and one being written."""
    one = model_checks.estimate_checkpoint_bytes(experiment)
    kept = [trial.keep_checkpoints for trial in trials if _writes_checkpoints(trial)]
    return one * (sum(kept) + len(kept) + bool(kept))


def _writes_checkpoints(trial: TrialPlan) -> bool:
    return trial.solver.checkpoint_period > 0


def shared_memory_bytes(experiment: Experiment, trials: Sequence[TrialPlan], *, num_nodes: int) -> float:
    """Estimates what the loader processes of one node hold in /dev/shm at most: their prefetched batches."""
    batches = (
        math.ceil(trial.world_size / (trial.num_nodes or num_nodes))
        * trial.loader_workers
        * PREFETCHED_BATCHES
        * trial.batch_per_worker
        for trial in trials
    )
    return max(batches, default=0) * model_checks.estimate_image_bytes(experiment)


def _joins_cluster(experiment: Experiment) -> bool:
    """Tells whether Ray would join a cluster instead of starting one here: asked to, told to, or one is running."""
    if experiment.resources.address or os.environ.get("RAY_ADDRESS"):
        return True
    return (Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster").exists()  # noqa: S108 - Ray's own
