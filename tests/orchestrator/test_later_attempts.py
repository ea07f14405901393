"""The record of a trial that was started more than once describes its last start, by figures worked out by hand."""

from __future__ import annotations

import pytest

from orchestrator.figures.records import TrialResult
from orchestrator.figures.trial import trial_result
from orchestrator.report.airank import airank_log
from tests.builders.trials import TrialBuilder, plan
from trainers.contract.events import Evaluated, TrialRestarted, WorkerFailed


def _result(made: TrialBuilder) -> TrialResult:
    return trial_result(made.trial, made.events)


def _begun() -> TrialBuilder:
    """Trains 4 iterations of 1 s, to 6."""
    made = TrialBuilder(plan(max_iter=100, target_box_ap=None, target_mask_ap=None))
    made.started()
    made.workers(1.0)
    made.loop(2.0)
    _steps(made, 6.0, 0, 4)
    return made


def _steps(made: TrialBuilder, at: float, first: int, number: int) -> None:
    for rank in (0, 1):
        made.steps(at, first, *[1.0] * number, rank=rank)


def _stopped_and_resumed() -> TrialBuilder:
    """Stopped after 4 iterations, with a checkpoint; resumed 1,000 s later."""
    made = _begun()
    made.checkpoint(6.0, 4, 0.0)
    made.finished(6.0, 4, "interrupted")
    made.ended(7.0, "KILLED", "stopped by the user")
    made.attempt = 1
    made.emit(TrialRestarted, 1007.0, rank=-1, failure="resumed", message="", iteration=4)
    made.workers(1008.0)
    return made


def test_a_failure_after_a_stop_has_neither_its_state_nor_its_end():
    made = _stopped_and_resumed()
    made.loop(1010.0, iteration=4)
    _steps(made, 1014.0, 4, 4)
    made.emit(WorkerFailed, 1015.0, 1, failure="not_finite", iteration=8, section="step", message="NaN")
    made.ended(1016.0, "FAILED", "not_finite")
    result = _result(made)
    assert (result.iterations, result.state_sha256, result.schedule_seconds) == (8, None, None)
    assert result.wall_images_per_second == pytest.approx(8 * 4 / (1014 - 2))
    log = airank_log(made.trial, made.events, result)
    assert not any(key in log for key in ("test_finish", "total_use_time", "avg_ips"))


def test_a_start_that_never_trained_leaves_what_was_trained_before_it():
    made = _stopped_and_resumed()
    made.ended(1009.0, "FAILED", "no such data")
    result = _result(made)
    assert (result.iterations, result.state_sha256, result.schedule_seconds) == (4, None, None)
    assert result.wall_images_per_second == pytest.approx(4 * 4 / (6 - 2))


def test_the_iterations_are_those_of_the_final_state():
    """8 iterations, a restart from the checkpoint after 4, a stop after 6."""
    made = _begun()
    made.checkpoint(6.0, 4, 0.0)
    _steps(made, 10.0, 4, 4)
    made.restarted(11.0, 8)
    made.workers(12.0)
    made.loop(13.0, iteration=4)
    _steps(made, 15.0, 4, 2)
    made.finished(15.0, 6, "interrupted")
    made.ended(16.0, "KILLED", "stopped by the user")
    result = _result(made)
    assert result.iterations == 6 and result.state_sha256 == "0" * 64
    assert result.wall_images_per_second == pytest.approx(6 * 4 / (15 - 2))


@pytest.mark.parametrize(
    ("before", "first", "after", "seconds"),
    [
        pytest.param([(4, 1.0, ())], 6, [(4, 1.5, ())], 1.5, id="carried over, and waited for"),
        pytest.param([], 6, [(4, 1.0, ())], 1.0, id="carried over, its scores never came"),
        pytest.param([(4, 1.0, ())], 4, [(4, 1.0, ())], 2.0, id="begun again by the loop"),
        pytest.param([(4, 3.0, ())], 6, [(8, 4.0, (4,))], 4.0, id="carried over, then left out"),
        pytest.param([(8, 3.0, (6,))], 7, [(6, 1.0, ()), (8, 2.0, ())], 5.0, id="left out before, carried over"),
    ],
)
def test_a_stall_that_a_checkpoint_carries_over_counts_once(before, first, after, seconds):
    """Concurrent evaluations, each with its stall and what was left out for it, around a start from `first`."""
    made = _begun()
    _steps(made, 10.0, 4, 4)
    _evaluated(made, 11.0, before)
    made.restarted(12.0, 8)
    made.workers(13.0)
    made.loop(14.0, iteration=first)
    _evaluated(made, 20.0, after)
    _steps(made, 30.0, first, 10 - first)
    made.finished(30.0, 10, "max_iter")
    made.ended(31.0)
    result = _result(made)
    assert result.evaluation_seconds == pytest.approx(seconds)
    assert result.sections is not None and result.sections.evaluation == pytest.approx(seconds)


def _evaluated(made: TrialBuilder, at: float, evaluations: list[tuple[int, float, tuple[int, ...]]]) -> None:
    for iteration, stall, left_out in evaluations:
        made.emit(
            Evaluated, at, iteration=iteration, epoch=1.0, figures={"box_ap": 1.0}, box_scored=made.epoch + at,
            mask_scored=None, seconds=2.0, part_seconds={"inference": 2.0, "stall": stall}, left_out=left_out,
        )  # fmt: skip
