"""The protocol of an experiment file: what is measured, for how long, by which metric and against which target."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from orchestrator.experiment.part import Part
from trainers.contract.plan import ProtocolKind
from trainers.contract.targets import PARTS, VALIDATION_LOSS, known_metrics


class Ema(Part):
    """A running (exponential) average of the weights.

    It takes the memory of the weights again, on each device and in checkpoints, and a pass over them after each step.
    """

    decay: float = Field(0.9998, gt=0, lt=1)
    """What is kept of the average in each step; less in the first steps (n / (n + 9) after n of them)."""
    evaluate: Literal["instead", "both"] = "instead"
    """Evaluate the average instead of the weights, or both, which takes a second evaluation: its figures are then
    `ema_box_ap`, …, and targets, metric and patience go by those of the weights."""


class Protocol(Part):
    """What is measured."""

    kind: ProtocolKind = "time_to_train"
    """`throughput` measures the rate over a number of iterations; `time_to_train` trains to the target; `benchmark`
    does so with several seeds of one setup (five where none are given) and scores them as MLPerf does."""
    iterations: int | None = Field(None, ge=1)
    """Iterations of every trial, never scaled. null: the model config's schedule, scaled to the world size."""
    warmup_iterations: int = Field(20, ge=0)
    """Iterations at the start that are not counted in the throughput."""
    eval_period_iterations: int | None = Field(None, ge=1)
    """Iterations between evaluations, at the reference world size; with `iterations`, at every world size."""
    eval_period_epochs: float | None = Field(None, gt=0)
    """Epochs between evaluations, of every image with an object once; not together with eval_period_iterations."""
    evaluate_at_end: bool | None = None
    """Evaluate after the last iteration; null: yes, for throughput no."""
    target_box_ap: float | None = Field(None, ge=0, le=100)
    """Box AP (0–100) that counts as trained."""
    target_mask_ap: float | None = Field(None, ge=0, le=100)
    """Mask AP (0–100) that counts as trained."""
    metric: str = "box_ap"
    """What the best checkpoint is chosen by, and `target` is for: a figure of COCO's (`box_ap`, `mask_ap`, `box_ap50`,
    `keypoint_ap`, …), the AP of a class (`box_ap/person`), or `validation_loss`."""
    target: float | None = Field(None, ge=0)
    """Value of the metric that counts as trained: an AP (0–100) to reach, or a loss to get down to."""
    validation_loss: bool = False
    """Compute the training losses on the validation images as well, without augmentation, at every evaluation, which
    then takes about twice as long (docs/measurement.md, "Accuracy")."""
    on_target: Literal["stop", "continue"] = "stop"
    """End the trial when the targets are met, or continue to the end of the schedule."""
    patience: int | None = Field(None, ge=1)
    """End the trial after so many evaluations in which the metric did not improve; null: never. Each evaluation is then
    followed by a checkpoint, so that the best weights are kept."""
    min_improvement: float = Field(0.0, ge=0)
    """By how much the metric must be better than at the last improvement to have improved."""
    ema: Ema | None = None
    """Evaluate an average of the weights; null: the weights."""

    @property
    def evaluates(self) -> bool:
        """Whether there is an evaluation, however late."""
        at_end = self.kind != "throughput" if self.evaluate_at_end is None else self.evaluate_at_end
        return bool(at_end or self.eval_period_iterations or self.eval_period_epochs)

    @model_validator(mode="after")
    def _consistent(self) -> Protocol:
        if self.eval_period_iterations and self.eval_period_epochs:
            raise ValueError("give eval_period_iterations or eval_period_epochs, not both")
        if self.patience and not (self.eval_period_iterations or self.eval_period_epochs):
            raise ValueError("patience counts evaluations: give eval_period_iterations or eval_period_epochs")
        if self.min_improvement and not self.patience:
            raise ValueError("min_improvement has no effect without patience")
        self._check_metric()
        asked = {
            "validation_loss": self.validation_loss,
            "target": self.target is not None,
            "metric": self.metric != Protocol.model_fields["metric"].default,
            "ema": self.ema is not None,
        }
        if not self.evaluates and (vain := next((name for name, given in asked.items() if given), None)):
            raise ValueError(f"{vain} has no effect without an evaluation: give evaluate_at_end: true or a period")
        return self

    def _check_metric(self) -> None:
        """Checks the metric's name and target; whether the model and the data have it is for preflight."""
        figure, slash, name = self.metric.partition("/")
        known = known_metrics(PARTS)
        if figure.startswith("ema_") and figure[4:] in known:
            raise ValueError(
                f"metric {self.metric!r}: targets and patience go by one figure, that of what is evaluated first; with "
                f"ema: {{evaluate: instead}}, {self.metric[4:]} is the average's"
            )
        is_known = figure in known and (not slash or (name and figure.endswith("_ap")))
        if self.metric != VALIDATION_LOSS and not is_known:
            raise ValueError(
                f"unknown metric {self.metric!r}; known: {VALIDATION_LOSS}, {', '.join(known)}, and box_ap/CLASS, "
                "mask_ap/CLASS, keypoint_ap/CLASS for the AP of one class"
            )
        if self.metric == VALIDATION_LOSS and not self.validation_loss:
            raise ValueError("metric: validation_loss needs validation_loss: true")
        if self.target is not None and self.metric != VALIDATION_LOSS and self.target > 100:
            raise ValueError(f"target {self.target:g} is never reached: {self.metric} is at most 100")
        if self.target is not None and getattr(self, f"target_{self.metric}", None) is not None:
            raise ValueError(f"give target or target_{self.metric}, not both")
