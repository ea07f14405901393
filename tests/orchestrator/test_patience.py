"""Training that does not improve any more ends, and says why."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.spec import SpecError
from orchestrator.figures.early_stop import early_stop_reason
from orchestrator.figures.trial import trial_result
from orchestrator.preflight.local import check_patience
from orchestrator.preflight.settings import check_settings
from tests.builders.experiments import tiny_experiment
from tests.builders.trials import TrialBuilder, plan
from trainers.contract.events import Evaluated
from trainers.contract.patience import Patience


@pytest.mark.parametrize(
    ("ratings", "limit", "min_improvement", "ends_after", "best"),
    [
        ([1.0, 2.0, 3.0], 2, 0.0, None, 3.0),
        ([1.0, 1.0, 1.0], 2, 0.0, 3, 1.0),
        ([3.0, 2.0, 4.0, 1.0, 1.0], 2, 0.0, 5, 4.0),
        ([37.2, 37.3], 1, 0.1, None, 37.3),
        ([1.0, 1.4, 1.8, 2.2], 3, 1.0, None, 2.2),
        ([1.0, 1.4, 1.8, 2.2], 2, 1.0, 3, 1.0),
        ([None, None], 2, 0.0, 2, None),
        ([None, 1.0, math.nan, None], 2, 0.0, 4, 1.0),
        ([-2.0, -1.0, -1.5], 1, 0.5, 3, -1.0),
        ([1.0, 0.0, 0.0], None, 0.0, None, 1.0),
    ],
)
def test_an_improvement_is_one_over_the_last_improvement(
    ratings: list[float | None], limit: int | None, min_improvement: float, ends_after: int | None, best: float | None
) -> None:
    patience = Patience(limit, min_improvement)
    for number, rating in enumerate(ratings, start=1):
        patience.add(number, rating)
        again = Patience(limit, min_improvement)
        again.restore(patience.state())  # as after a restart in between
        patience = again
        if patience.exhausted:
            break
    assert (number if patience.exhausted else None, patience.best) == (ends_after, best)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ({"patience": 2}, "patience counts evaluations: give eval_period_iterations"),
        ({"min_improvement": 0.5, "eval_period_iterations": 4}, "min_improvement has no effect without patience"),
        ({"patience": 0, "eval_period_iterations": 4}, "greater than or equal to 1"),
        ({"patience": 1, "min_improvement": -1, "eval_period_iterations": 4}, "greater than or equal to 0"),
        ({"ema": {"decay": 1.0}}, "less than 1"),
        ({"ema": {"decay": 0.9, "evaluate": "never"}}, "'instead' or 'both'"),
        ({"ema": {"decai": 0.9}}, "decai"),
        ({"ema": True}, "ema"),
    ],
)
def test_what_cannot_be_meant_is_refused(protocol: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_experiment(tiny_experiment(protocol=protocol), "test")


def stopped(**fields: Any) -> TrialBuilder:
    """A trial that evaluates every 2 iterations, and is best after 4."""
    made = TrialBuilder(plan(patience=2, **fields))
    made.started()
    made.workers(1.0)
    made.loop(2.0)
    for number, box in enumerate((30.0, 40.0, 40.2, 39.0)):
        made.steps(10.0 * number + 5, 2 * number, 1.0, 1.0)
        made.evaluated(10.0 * number + 9, 2 * number + 2, box, 35.0)
    made.finished(50.0, 8, "patience")
    made.ended(51.0, reason=early_stop_reason(made.trial, made.events))
    return made


def test_the_record_says_why_training_ended_and_which_target_it_missed() -> None:
    made = stopped(min_improvement=0.5)
    reason = (
        "stopped by protocol.patience: box_ap did not improve by 0.5 in 2 evaluations; its last improvement "
        "was to 40, after 4 iterations"
    )
    result = trial_result(made.trial, made.events)
    assert result.status == "FINISHED"
    assert result.reason == f"target not reached in 8 iterations; {reason}"
    without = stopped(min_improvement=0.5, target_box_ap=None, target_mask_ap=None)
    assert trial_result(without.trial, without.events).reason == reason


def test_a_loss_that_does_not_fall_is_named_as_a_loss() -> None:
    made = stopped(metric="validation_loss", validation_loss=True)
    losses = iter([2.0, 1.5, 1.5, 1.75])
    made.events = [
        dataclasses.replace(e, validation_losses={"total_loss": next(losses)}) if isinstance(e, Evaluated) else e
        for e in made.events
    ]
    assert (
        "validation_loss did not improve in 2 evaluations; its last improvement was to 1.5, after 4 iterations"
        in early_stop_reason(made.trial, made.events)
    )


def test_a_trial_that_ended_otherwise_has_no_such_reason() -> None:
    made = TrialBuilder(plan(patience=2))
    made.finished(1.0, 8, "max_iter")
    assert early_stop_reason(made.trial, made.events) == ""


def test_the_record_says_of_which_weights_its_figures_are() -> None:
    for both, words in ((False, "evaluations are of a running average"), (True, "evaluations are of the weights; ")):
        made = stopped(ema_decay=0.99, ema_both=both)
        assert trial_result(made.trial, made.events).notes[0].startswith(words)


def test_keys_of_a_relative_of_detectron2_name_the_field_that_averages_weights() -> None:
    values = tiny_experiment(model={"overrides": {"MODEL_EMA.ENABLED": True, "MODEL_EMA.DECAY": 0.99}})
    (finding,) = check_settings(parse_experiment(values, "test"))
    assert finding.what == "detectron2 has no MODEL_EMA and no keys in it"
    assert finding.hint == "Leave it out and set protocol.ema, whose decay is MODEL_EMA.DECAY"


def test_patience_that_no_trial_has_the_evaluations_for_is_a_warning() -> None:
    trial = plan(patience=2)  # two evaluations in 8 iterations
    (finding,) = check_patience(
        [trial, dataclasses.replace(trial, patience=None), dataclasses.replace(trial, patience=1)]
    )
    assert (finding.level, finding.file) == ("warning", "protocol.patience")
    assert finding.what == "no effect: 2 evaluations in 8 iterations, and the first is an improvement"
