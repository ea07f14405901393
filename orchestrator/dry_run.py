"""What `--dry-run` prints: the plan of every trial. Nothing is started, joined or written."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

from orchestrator.drive import DONE, UNFIT, Request, plan_trials
from orchestrator.experiment.environment import cluster_address
from orchestrator.experiment.plan import Hardware
from orchestrator.experiment.spec import SpecError
from orchestrator.files import without_credentials
from orchestrator.findings import has_errors, print_findings, to_json
from orchestrator.preflight.settings import check_settings
from orchestrator.report.plan_table import plan_table, side_by_side_note

if TYPE_CHECKING:
    from orchestrator.experiment.prediction_file import Prediction
    from trainers.contract.plan import TrialPlan


def show_plan(request: Request, asked: Prediction | None) -> int:
    """Prints the plan of every trial and what they are to predict, for people or as JSON; returns the exit code.

    Raises:
        SpecError: A trial cannot be planned.
    """
    findings = check_settings(request.experiment)
    print_findings(findings)
    if has_errors(findings):
        request.print_json(to_json(findings))
        return UNFIT
    plans = _likely_plans(request)
    if request.json_output:
        shown: Any = [dataclasses.asdict(plan) for plan in plans]
        shown = {"calibration": shown, "prediction": asked.model_dump(mode="json")} if asked else shown
        request.print_json(json.dumps(shown, indent=2))
        return DONE
    joined, local = cluster_address(request.experiment.resources.address), Hardware.local()
    hosts = None if joined else {"": (local.num_gpus, local.num_cpus)}
    request.console.print(plan_table(plans, side_by_side_note(plans, request.experiment.trials.concurrent, hosts)))
    if asked:
        from orchestrator.prediction.asking import asked_lines

        for line in asked_lines(asked):
            request.console.print(line, soft_wrap=True, markup=False, highlight=False)
    store = request.experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    place = f"Results in {request.run_dir}, tracked in {without_credentials(store)} as {request.experiment.name!r}."
    request.console.print(place, soft_wrap=True, markup=False, highlight=False)
    return DONE


def _likely_plans(request: Request) -> list[TrialPlan]:
    """The plans of all trials; where a cluster is to decide the device, for this machine's, or for GPUs."""
    resources, local = request.experiment.resources, Hardware.local()
    is_begun = request.earlier is not None and request.earlier.plans
    if resources.device != "auto" or is_begun or not cluster_address(resources.address):
        return plan_trials(request, local)
    try:
        plans = plan_trials(request, local)
    except SpecError:
        plans = plan_trials(request, dataclasses.replace(local, num_gpus=1))
    text = f"resources.device: auto is taken as {plans[0].device}; the cluster decides it once it is joined."
    request.console.print(text, soft_wrap=True, markup=False, highlight=False)
    return plans
