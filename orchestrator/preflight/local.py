"""The checks of a run that need no Ray cluster: data, model, weights, tracking, this machine. All findings at once."""

from __future__ import annotations

import os
import threading
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.experiment.detectron_config import config_files
from orchestrator.experiment.environment import cluster_address
from orchestrator.files import is_file, is_folder, redact
from orchestrator.findings import Finding, FindingList, as_errors, has_errors, sort_findings
from orchestrator.preflight import model as model_checks
from orchestrator.preflight.node import NodeRequest, inspect_node, judge_nodes
from orchestrator.preflight.ray_setup import check_ray
from orchestrator.preflight.settings import check_settings
from orchestrator.preflight.tracking import check_tracking
from orchestrator.preflight.weights import check_weights
from trainers.contract.plan import PREFETCHED_BATCHES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from orchestrator.experiment.spec import Experiment
    from orchestrator.preflight.rehearsal import Rehearsal
    from trainers.contract.plan import TrialPlan

REMOTE_TIMEOUT_SECONDS = 20.0
"""Time for one small file; cloud clients search for credentials for some ten seconds before they give up."""

UNLABELLED = ("split_empty", "annotations")
"""Code and id of the finding that a file lists no annotation."""


def preflight(
    experiment: Experiment,
    trials: Sequence[TrialPlan],
    *,
    verify_images: bool = False,
    strict: bool = False,
    resumes: bool = False,
    rehearsal: Rehearsal | None = None,
    datasets: dict[str, dict[str, Any]] | None = None,
) -> list[Finding]:
    """Checks what can be checked on the driver without a cluster; returns all findings, errors first.

    Without `trials`, only what does not depend on them is checked. With `verify_images`, every image is decoded; with
    `strict`, warnings about the data are errors; hints are for a run that is gone on with where it `resumes`. The
    rehearsal is started as soon as settings and start weights are fit, and not waited for. `datasets` gets the
    fingerprints of `train` and `val`.
    """
    findings = check_settings(experiment)
    if trials and not has_errors(findings):
        findings += check_weights(experiment)
        if rehearsal and not has_errors(findings):
            rehearsal.start()
    findings += [
        *check_tracking(experiment),
        *check_ray(experiment),
        *check_nodes_asked(trials),
        *check_patience(trials),
    ]
    if trials:
        checks = {"verify_images": verify_images, "strict": strict}
        findings += check_data(experiment, trials[0], **checks, datasets=datasets)
        findings += check_remote_storage(trials[0])
        if not joins_cluster(experiment):
            findings += check_this_machine(experiment, trials, resumes=resumes)
    return sort_findings(findings)


def check_data(
    experiment: Experiment,
    trial: TrialPlan,
    *,
    verify_images: bool,
    strict: bool = False,
    datasets: dict[str, dict[str, Any]] | None = None,
) -> list[Finding]:
    """Checks the training and validation set, each alone, against each other, and against the model.

    With `verify_images`, every image is decoded; with `strict`, warnings are errors. `datasets` gets the fingerprints.
    """
    from orchestrator.data.checks import check_split, compare_splits
    from orchestrator.data.exports import layout_finding
    from orchestrator.data.fingerprint import fingerprint
    from orchestrator.data.layout import Dataset, Split

    dataset = Dataset(
        Split(Path(trial.train.annotations), Path(trial.train.images)),
        Split(Path(trial.val.annotations), Path(trial.val.images), for_scoring=True),
    )
    if experiment.data.coco is None and not all(split.is_present() for split in dataset):
        # One finding with the whole tree, instead of one for each of its four parts.
        return [layout_finding(dataset.train.annotations.parent.parent, dataset)]
    train, val = (check_split(split, verify_images=verify_images) for split in dataset)
    if datasets is not None:
        prints = {"train": fingerprint(train), "val": fingerprint(val)}
        datasets.update({part: found for part, found in prints.items() if found})
    findings = train.findings + [each if trial.solver.evaluates else _without_scoring(each) for each in val.findings]
    findings += compare_splits(train, val)
    if train.summary and val.summary:
        findings += model_checks.check_data_against_model(experiment, train.summary, val.summary)
    return as_errors(findings) if strict else findings


def _without_scoring(finding: Finding) -> Finding:
    """A finding in a validation set that is never scored: without annotations, it is as good as any."""
    is_unlabelled = finding.code in ("crowd_only", "no_objects") or (finding.code, finding.id) == UNLABELLED
    hint = "Nothing: the protocol has no evaluation"
    return replace(finding, level="warning", hint=hint) if is_unlabelled else finding


def check_nodes_asked(trials: Sequence[TrialPlan]) -> list[Finding]:
    """Checks that the workers of each trial spread evenly over the hosts asked for."""
    findings = FindingList()
    for trial in trials:
        if trial.num_nodes and trial.world_size % trial.num_nodes:
            what = f"{trial.world_size} workers do not spread evenly over {trial.num_nodes} hosts"
            hint = f"Take world sizes that are multiples of {trial.num_nodes}, or another resources.num_nodes"
            findings.error("uneven_nodes", "resources.num_nodes", f"trial {trial.name}", what, hint)
    return findings.to_list()


def check_patience(trials: Sequence[TrialPlan]) -> list[Finding]:
    """Checks that trials have evaluations enough to be stopped by `protocol.patience`."""
    findings = FindingList()
    for trial in trials:
        solver = trial.solver
        number = solver.max_iter // solver.eval_period if solver.eval_period else 0
        if trial.patience and number <= trial.patience:
            what = f"no effect: {number} evaluations in {solver.max_iter:,} iterations, and the first is an improvement"
            hint = "Take a smaller number, or evaluate more often"
            findings.warning("config_unused", "protocol.patience", f"trial {trial.name}", what, hint)
    return findings.to_list()


def check_this_machine(experiment: Experiment, trials: Sequence[TrialPlan], *, resumes: bool = False) -> list[Finding]:
    """Checks storage, shared memory and GPUs of this machine, for a run that stays on it."""
    request = node_request(trials)
    report = inspect_node(request)
    all_here = ((trial, trial.world_size) for trial in trials)
    findings = judge_nodes(
        [report],
        request,
        versions=report.versions,
        storage_bytes=storage_bytes(experiment, trials),
        shared_memory_bytes={report.host: shared_memory_bytes(experiment, all_here)},
        needs_gpus=any(trial.device == "cuda" for trial in trials),
        compiles=compiles_kernels(trials),
        survives_storage=trials[0].survive_storage,
    )
    hint = "Take smaller world sizes, join a cluster (resources.address), or set resources.device=cpu"
    if resumes:
        hint = "Resume it where there are enough GPUs (resources.address joins a cluster), or begin a new run"
    for trial in trials:
        if trial.device == "cuda" and trial.world_size > len(report.gpus):
            what = f"asks for {trial.world_size} GPUs, this machine has {len(report.gpus)}"
            findings.append(Finding("error", "too_few_gpus", "trials.world_sizes", f"trial {trial.name}", what, hint))
    return findings


def node_request(trials: Sequence[TrialPlan]) -> NodeRequest:
    """What every node is asked: to read the data, weights and model config, and to write to storage."""
    trial = trials[0]
    paths = {
        "the training annotations": trial.train.annotations,
        "the training images": trial.train.images,
        "the validation annotations": trial.val.annotations,
        "the validation images": trial.val.images,
    }
    if trial.weights and "://" not in trial.weights:
        paths["the start weights"] = trial.weights
    if os.path.isabs(trial.config_file):  # noqa: PTH117 - a model zoo name is not a path
        paths |= {f"the model config {file.name}": str(file) for file in config_files(trial.config_file)}
    # What the driver does not have either is reported once, by the checks of the data.
    present = {what: path for what, path in paths.items() if is_file(path) or is_folder(path)}
    checkpoints = "" if "://" in trial.checkpoint_dir else str(Path(trial.checkpoint_dir).parent.parent)
    folders = [str(Path(trial.trial_dir).parent), *([checkpoints] if checkpoints else [])]
    return NodeRequest(paths=present, folders=dict.fromkeys(folders, ""), checkpoints=checkpoints)


def check_remote_storage(trial: TrialPlan) -> list[Finding]:
    """Writes and removes a small file where checkpoints go to an address (`s3://…`); done once, from the driver."""
    if "://" not in trial.checkpoint_dir:
        return []

    def write_and_remove() -> None:
        import pyarrow.fs

        # The address is read whole: its options are at its end, and name the server.
        files, folder = pyarrow.fs.FileSystem.from_uri(trial.checkpoint_dir)
        name = f"{folder.rsplit('/', 2)[0]}/.preflight-{uuid.uuid4().hex}"
        with files.open_output_stream(name) as stream:
            stream.write(b"x")
        files.delete_file(name)

    if not (reason := _reason_within(write_and_remove, REMOTE_TIMEOUT_SECONDS)):
        return []
    hint = "Correct storage.checkpoints, or give this process access (the storage's environment variables)"
    what = f"checkpoints cannot be written there: {reason}"
    return [Finding("error", "storage_unwritable", redact(trial.checkpoint_dir), "storage.checkpoints", what, hint)]


def _reason_within(action: Callable[[], None], seconds: float) -> str:
    """Runs something that may hang, in a thread; returns the reason why it did not succeed in time, or ""."""
    reasons = [f"no answer within {seconds:g} s"]

    def run() -> None:
        try:
            action()
            reasons[0] = ""
        except Exception as error:  # noqa: BLE001 - a file system of another library raises anything
            reasons[0] = redact(str(error).strip().split("\n")[0][:200]) or type(error).__name__

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return reasons[0]


def storage_bytes(experiment: Experiment, trials: Sequence[TrialPlan]) -> float:
    """Estimates the space that the checkpoints of all trials still need.

    Those kept, the best, and one being written by each trial that is under way at a time; those that a run has which is
    gone on with take theirs already.
    """
    one = model_checks.estimate_checkpoint_bytes(experiment)
    # Without a period, the last one only.
    kept = (one * (trial.keep_checkpoints + 1 if trial.solver.checkpoint_period else 1) for trial in trials)
    present = (_bytes_in(trial.checkpoint_dir) for trial in trials)
    asked, may_be = experiment.trials.concurrent, joins_cluster(experiment) or experiment.trials.allow_shared_nodes
    num_writing = 1 if not may_be else len(trials) if asked == "auto" else min(asked, len(trials))
    return one * num_writing + sum(max(0.0, needed - size) for needed, size in zip(kept, present, strict=True))


def _bytes_in(folder: str) -> int:
    """Size of the files in a folder; 0 for an address."""
    size = 0
    for place, _, names in os.walk(folder) if "://" not in folder else ():
        for name in names:
            with suppress(OSError):
                size += Path(place, name).stat().st_size
    return size


def shared_memory_bytes(experiment: Experiment, workers: Iterable[tuple[TrialPlan, int]]) -> float:
    """Estimates the most that the loader processes of one node hold in /dev/shm: their prefetched batches, in bytes.

    Args:
        experiment: The experiment.
        workers: Each of its trials, and the number of its workers on that node.
    """
    batches = (
        number * max(trial.loader_workers, trial.most_loader_workers) * PREFETCHED_BATCHES * trial.batch_per_worker
        for trial, number in workers
    )
    return max(batches, default=0) * model_checks.estimate_image_bytes(experiment)


def compiles_kernels(trials: Sequence[TrialPlan]) -> bool:
    """Whether workers compile kernels for GPUs, which needs a C compiler on their nodes."""
    return any(
        trial.recipe.triton_pooling or trial.recipe.compile or trial.recipe.has_fixed_shapes(trial.device)
        for trial in trials
        if trial.device == "cuda"
    )


def joins_cluster(experiment: Experiment) -> bool:
    """Whether Ray joins a cluster (named, or as a job in one) instead of starting one on this machine."""
    return cluster_address(experiment.resources.address) is not None
