"""Tags and notes of the runs in MLflow, made from plans and records."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence

from orchestrator.experiment.environment import DASHBOARD
from orchestrator.figures.catalog import FIGURES
from orchestrator.figures.causes import changes_text, root_cause
from orchestrator.figures.figure import number_text, percent_text, rate_text, seconds_text
from orchestrator.figures.logged_plan import Plan
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.figures.segments import segments_text
from orchestrator.report.mlflow_links import VIEW_KEY
from orchestrator.tracking import benchmark
from trainers.contract.events import Event, RunStarted, WorkerStarted

HEADLINE = (
    "images_per_second", "time_to_train_seconds", "evaluations.box_ap", "evaluations.mask_ap",
    "scaling.efficiency", "scaling.speed_up", "cost", "cost_to_target",
)  # fmt: skip
"""What distinguishes trials: the first five are columns of MLflow's table of runs, all are explained in its note."""


def experiment_tags(event: RunStarted) -> dict[str, str]:
    """The experiment's note, and the view of its table of runs: the columns that matter, trials and references."""
    description = event.experiment.get("description", "")
    figures = [FIGURES[key] for key in HEADLINE]
    meanings = "\n".join(f"- `{figure.mlflow}`: {figure.definition}" for figure in figures)
    columns = ["params.`workers`", *(f"metrics.`{figure.mlflow}`" for figure in figures[:5]), "tags.`device_name`"]
    # Sorted by anything but the date: else MLflow folds the trials away under their parents.
    order = {"orderByKey": "metrics.`throughput/images_per_second`", "orderByAsc": True}
    shown = "tags.kind != 'experiment' AND tags.kind != 'acceptance'"
    trials = {"selectedColumns": columns, "searchFilter": shown, **order}
    view = json.dumps(benchmark.VIEW if _kind(event) == benchmark.KIND else trials)
    return {
        "mlflow.note.content": f"{description}\n\n{meanings}",
        "mlflow.experimentKind": "custom_model_development",
        f"mlflow.sharedViewState.{VIEW_KEY}": "deflate;" + base64.b64encode(zlib.compress(view.encode())).decode(),
    }


def run_tags(event: RunStarted) -> dict[str, str]:
    """Tags of the parent run."""
    return {
        **event.tags,
        "mlflow.note.content": event.experiment.get("description", ""),
        "mlflow.source.name": event.tags.get("run.command", ""),
        "mlflow.source.type": "JOB" if "run.ray_job_id" in event.tags else "LOCAL",
        "mlflow.source.git.commit": event.tags.get("run.git_commit", ""),
        "kind": _kind(event),
    }


def resume_tags(event: RunStarted) -> dict[str, str]:
    """Tags of the parent run that another start changes: where it runs now, and what was changed (params cannot be)."""
    place = {key: value for key, value in event.tags.items() if key in (f"run.{DASHBOARD}", "run.ray_job_id")}
    return place | ({f"resume.{event.attempt}": changes_text(event.changes)} if event.changes else {})


def _kind(event: RunStarted) -> str:
    """What the parent run is: the summary of a benchmark, or the trials of an experiment together."""
    is_benchmark = event.experiment.get("protocol", {}).get("kind") == benchmark.KIND
    return benchmark.KIND if is_benchmark else "experiment"


def trial_tags(plan: Plan) -> dict[str, str]:
    """Tags that distinguish a trial from others; what a log does not say is left out."""
    tags = {
        "kind": "trial", "mlflow.note.content": about(plan), "world_size": str(plan.world_size),
        "recipe": plan.recipe_name, "scaling": plan.scaling, "protocol": plan.protocol, "device": plan.device,
    }  # fmt: skip
    return {key: value for key, value in tags.items() if value is not None}


def worker_tags(event: WorkerStarted) -> dict[str, str]:
    """Tags of the machine of a worker; what a log does not say is left out."""
    tags = {f"host.{event.rank}": event.host, "device_name": event.device_name}
    return {key: value for key, value in tags.items() if value} | {
        f"version.{package}": version for package, version in event.versions.items()
    }


def about(plan: Plan) -> str:
    """A trial in a line."""
    workers = f"{plan.world_size} worker{'s' if plan.world_size > 1 else ''}"
    where = f"{workers} on {plan.device}" if plan.device else workers
    return ", ".join(filter(None, [where, f"recipe {plan.recipe_name}", f"{plan.scaling} scaling", plan.protocol]))


def outcome(result: TrialResult) -> str:
    """What a trial measured, in a line."""
    return (
        f"{rate_text(result.images_per_second)} images/s, {seconds_text(result.time_to_train_seconds)} s to train, "
        f"{number_text(result.box_ap, 2)} box AP, {number_text(result.mask_ap, 2)} mask AP"
        + (f", {number_text(result.keypoint_ap, 2)} keypoint AP" if result.keypoint_ap is not None else "")
    )


def prediction_tags(result: ExperimentResult) -> dict[str, str]:
    """Tags of the parent run with what was predicted for each size; none without a prediction."""
    return {
        f"prediction.{size.world_size}": f"{rate_text(size.images_per_second)} images/s "
        f"({rate_text(size.images_per_second_low)}–{rate_text(size.images_per_second_high)}), "
        f"efficiency {percent_text(size.efficiency)}"
        for size in (result.prediction.sizes if result.prediction else [])
    }


def outcome_tags(result: TrialResult, events: Sequence[Event]) -> dict[str, str]:
    """Tags with the hosts of a trial, why it ended, where it failed, what each restart cost, and its segments."""
    tags = {"reason": result.reason} if result.reason else {}
    tags |= {"num_nodes": str(result.num_nodes)} if result.num_nodes else {}
    tags |= {"ran_with": ", ".join(result.ran_with)} if result.ran_with else {}
    tags |= {"shared_hosts": ", ".join(result.shared_hosts)} if result.shared_hosts else {}
    cause = root_cause([event for event in events if event.attempt == events[-1].attempt])
    if cause is not None and result.status == "FAILED":
        tags |= {"failure": cause.failure, "failure.rank": str(cause.rank), "failure.iteration": str(cause.iteration)}
    tags |= {"segments": segments_text(result.segments)} if result.segments else {}
    for restart in result.restarts:
        down = "not running again"
        if restart.downtime_seconds is not None:
            down = f"{restart.downtime_seconds:.1f} s down"
        if restart.recovery_seconds is not None:
            down += f", {restart.recovery_seconds:.1f} s from the failure to the next step"
        if restart.world_size not in (None, result.world_size):
            down += f", with {restart.world_size} workers"
        tags[f"restart.{restart.attempt}"] = (
            f"{restart.cause}: {restart.message}; {restart.lost_iterations} iterations lost, {down}"
        )
    return tags
