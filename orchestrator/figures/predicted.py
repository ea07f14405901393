"""What was predicted for a trial, next to what it measured."""

from __future__ import annotations

from orchestrator.figures.logged_plan import Plan
from orchestrator.figures.records import PredictedFigures
from trainers.contract.plan import Predicted, TrialPlan


def predicted_figures(plan: Plan, images_per_second: float | None, device_name: str | None) -> PredictedFigures:
    """The prediction of a trial's throughput, and its relative error; null where nothing was predicted.

    Args:
        plan: The trial.
        images_per_second: What it measured; None for nothing.
        device_name: What it ran on. The error on another device than the predicted one is not known.
    """
    predicted = _of(plan)
    if predicted is None:
        return PredictedFigures()
    rate = images_per_second if device_name == predicted.device_name else None
    return PredictedFigures(
        images_per_second=predicted.images_per_second,
        low=predicted.low,
        high=predicted.high,
        error=predicted.images_per_second / rate - 1 if rate else None,
    )


def prediction_notes(plan: Plan, device_name: str | None) -> list[str]:
    """Why a trial cannot be compared with its prediction; empty where it can, or nothing was predicted."""
    predicted = _of(plan)
    if predicted is None or device_name in (None, predicted.device_name):
        return []
    return [f"its prediction is for {predicted.device_name or 'an unknown device'}, it ran on {device_name}: no error"]


def _of(plan: Plan) -> Predicted | None:
    return plan.predicted if isinstance(plan, TrialPlan) else None
