"""Goodput, ETTR, the mean time between failures and the advised interval, by figures worked out by hand."""

import math
from dataclasses import replace

import pytest

from orchestrator.figures.goodput import measured_mtbf_hours
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.figures.trial import trial_result
from orchestrator.report.details import checkpoint_advice
from orchestrator.report.table import table_rows
from tests.builders.trials import TrialBuilder, plan, trained
from trainers.contract.events import LogReplayed, TrialRestarted, WorkerStarted

NODE_MTBF = 1000 / 6.5 * 86_400


def _result(made: TrialBuilder) -> TrialResult:
    return trial_result(made.trial, made.events)


def _resumed(made: TrialBuilder, at: float, failure: str = "resumed") -> None:
    made.attempt += 1
    made.emit(TrialRestarted, at, rank=-1, failure=failure, message="", iteration=4)


def _in_two_parts(*, ended_at: float | None, failure: str = "resumed", status: str = "KILLED") -> TrialBuilder:
    """4 iterations of 1 s to 6, the next start at 107, 4 more from 110 to 114, all over at 115."""
    made = TrialBuilder(plan())
    made.started()
    made.workers(1.0)
    made.loop(2.0)
    for rank in (0, 1):
        made.steps(6.0, 0, 1.0, 1.0, 1.0, 1.0, rank=rank)
    made.checkpoint(6.0, 4, 0.0)
    if ended_at is not None:
        made.ended(ended_at, status)
    _resumed(made, 107.0, failure)
    made.workers(108.0)
    made.loop(110.0, iteration=4)
    for rank in (0, 1):
        made.steps(114.0, 4, 1.0, 1.0, 1.0, 1.0, rank=rank)
    made.finished(114.0, 8)
    made.ended(115.0)
    return made


def _failed_once() -> TrialBuilder:
    """A worker is lost after iteration 6; the run goes on from the checkpoint at 4, taken at 20 after 6 s."""
    made = TrialBuilder(plan())
    made.started()
    made.workers(10.0)
    made.loop(14.0)
    for rank in (0, 1):
        made.steps(18.0, 0, 1.0, 1.0, 1.0, 1.0, rank=rank)
    made.evaluated(20.0, 4, 40.0, 40.0)
    made.checkpoint(20.5, 4, 0.5)
    for rank in (0, 1):
        made.steps(22.5, 4, 0.75, 1.25, rank=rank)
    made.restarted(30.0, iteration=6)
    made.workers(35.0)
    made.loop(37.0, iteration=4)
    for rank in (0, 1):
        made.steps(41.0, 4, 1.0, 1.0, 1.0, 1.0, rank=rank)
    made.evaluated(43.0, 8, 55.0, 46.0)
    made.finished(43.0, 8)
    made.ended(45.0)
    return made


def test_a_run_without_a_failure_loses_what_is_no_step():
    result = _result(trained())
    # Rank 0's steps: 8 x 0.9 s of 30 s; evaluations of 2 x 2 s are what was asked for, too.
    assert result.goodput == pytest.approx(7.2 / 30)
    assert result.ettr == pytest.approx((7.2 + 4) / 30)
    assert result.paused_seconds == 0.0


def test_lost_work_downtime_and_stalls_are_the_parts_that_a_failure_costs():
    result = _result(_failed_once())
    assert (result.goodput, result.ettr) == (pytest.approx(8 / 45), pytest.approx((8 + 4) / 45))
    lost = (result.lost_work_seconds, result.downtime_seconds, result.checkpoint_seconds)
    assert lost == pytest.approx((2, 14.5, 0.5))
    assert result.sections is not None
    # Start-up 14 s, shutdown 2 s, nothing twice and nothing left over.
    assert 8 + 4 + sum(lost) + 14 + 2 + result.sections.other == pytest.approx(45)
    run = ExperimentResult(experiment="made", status="FINISHED", started="", trials=[result])
    (row,) = table_rows(run)
    assert "goodput 17.8 %, ETTR 26.7 %: 2.0 s of work lost, 14.5 s down, 0.5 s stalled by checkpoints" in row.note


def test_the_pause_after_a_stop_counts_in_the_goodput_and_not_in_the_ettr():
    result = _result(_in_two_parts(ended_at=7.0))
    assert result.paused_seconds == pytest.approx(100)
    assert result.goodput == pytest.approx(8 / 115) and result.ettr == pytest.approx(8 / 15)
    assert result.downtime_seconds == pytest.approx(110 - 6)


def test_a_lost_driver_is_down_until_it_goes_on():
    result = _result(_in_two_parts(ended_at=None))
    assert result.paused_seconds == 0.0
    assert result.goodput == result.ettr == pytest.approx(8 / 115)


@pytest.mark.parametrize(
    ("made", "hours"),
    [
        (_failed_once(), 45 / 3600),
        (_in_two_parts(ended_at=None), 115 / 3600),
        (_in_two_parts(ended_at=7.0, status="FAILED"), 15 / 3600),
        (_in_two_parts(ended_at=7.0), None),
        (_in_two_parts(ended_at=None, failure="preempted"), None),
        (trained(), None),
    ],
    ids=["worker lost", "driver lost", "given up", "stopped", "preempted", "nothing"],
)
def test_the_time_between_failures_is_the_time_that_was_wanted_over_the_failures(made, hours):
    assert measured_mtbf_hours(made.events) == (None if hours is None else pytest.approx(hours))


def test_a_trial_that_runs_knows_its_failures_so_far():
    events = _failed_once().events
    restart = next(number for number, event in enumerate(events) if isinstance(event, TrialRestarted))
    assert measured_mtbf_hours(events[:restart]) is None
    assert measured_mtbf_hours(events[: restart + 1]) == pytest.approx(30 / 3600)


@pytest.mark.parametrize(
    ("made", "mtbf", "source"),
    [
        (trained(), NODE_MTBF, "default"),
        (trained(mtbf_hours=2.0), 7200.0, "stated"),
        (_failed_once(), 45.0, "measured"),
    ],
)
def test_the_advice_is_young_and_dalys(made, mtbf, source):
    result = _result(made)
    assert (result.mtbf_seconds, result.mtbf_source) == (pytest.approx(mtbf), source)
    assert result.advised_checkpoint_seconds == pytest.approx(math.sqrt(2 * 0.5 * mtbf))
    # The loop starts at 14, and the checkpoint is taken at 20.
    assert result.checkpoint_interval_seconds == pytest.approx(6.0)


def test_the_default_is_for_every_host_of_the_trial():
    made = TrialBuilder(plan())
    made.started()
    made.workers(1.0, hosts=("a", "b"))
    made.loop(2.0)
    made.checkpoint(10.0, 4, 0.5)
    made.ended(11.0)
    assert _result(made).mtbf_seconds == pytest.approx(NODE_MTBF / 2)


def test_the_default_is_for_the_hosts_of_the_last_start():
    """A new local cluster gives its host another node id."""
    made = _in_two_parts(ended_at=7.0)
    events = [replace(e, node_id=f"n{e.attempt}") if isinstance(e, WorkerStarted) else e for e in made.events]
    result = trial_result(made.trial, events)
    assert (result.num_nodes, result.mtbf_source) == (1, "default")
    assert result.mtbf_seconds == pytest.approx(NODE_MTBF)


def test_the_report_says_what_is_advised_next_to_what_was_done():
    text = checkpoint_advice(_result(trained(mtbf_hours=2.0)))
    assert text == "taken every 6.0 s; every 84.9 s would lose the least, with 2.00 h between failures (stated)"


def test_a_log_without_its_start_and_a_trial_that_never_trained_have_neither():
    log = trained()
    log.emit(
        LogReplayed, 30.0, rank=-1, step_seconds=None, step_iterations=None, total_seconds=None, unknown=("start",),
        notes=(),
    )  # fmt: skip
    never = TrialBuilder(plan())
    never.started()
    never.ended(5.0, "FAILED", "no such data")
    for result in (_result(log), _result(never)):
        assert (result.goodput, result.ettr, result.paused_seconds) == (None, None, None)
        assert (result.mtbf_seconds, result.advised_checkpoint_seconds) == (None, None)
        assert checkpoint_advice(result) == ""
