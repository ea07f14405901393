"""Why a trial ended before its schedule did, and what was evaluated: what record, report and terminal say of it."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.figures.accuracy import first_evaluations
from orchestrator.figures.logged_plan import Plan
from trainers.contract.events import Event, LoopFinished
from trainers.contract.patience import Patience
from trainers.contract.plan import TrialPlan
from trainers.contract.targets import metric_rating, metric_value


def early_stop_reason(plan: TrialPlan, events: Sequence[Event]) -> str:
    """Why a trial was stopped by `protocol.patience`, from all its events; "" where it was not."""
    finished = next((event for event in reversed(events) if isinstance(event, LoopFinished)), None)
    if finished is None or finished.reason != "patience":
        return ""
    patience = Patience(plan.patience, plan.min_improvement)
    values = {}
    for event in first_evaluations(events):
        if not patience.exhausted:
            patience.add(event.iteration, metric_rating(event, plan.metric))
            values[event.iteration] = metric_value(event, plan.metric)
    by = f" by {plan.min_improvement:g}" if plan.min_improvement else ""
    in_vain = f"{patience.num_since} evaluations" if patience.num_since != 1 else "an evaluation"
    last = "it had no value"
    if patience.best_iteration is not None:
        last = f"its last improvement was to {values[patience.best_iteration]:.4g}, after {patience.best_iteration:,}"
        last += " iterations"
    return f"stopped by protocol.patience: {plan.metric} did not improve{by} in {in_vain}; {last}"


def average_notes(plan: Plan) -> list[str]:
    """What must be known to read the AP of a trial that averages its weights; empty for any other."""
    if not isinstance(plan, TrialPlan) or plan.ema_decay is None:
        return []
    average = f"a running average of the weights (protocol.ema, decay {plan.ema_decay:g})"
    if plan.ema_both:
        return [f"evaluations are of the weights; those of {average} are the figures ema_…"]
    return [f"evaluations are of {average}"]
