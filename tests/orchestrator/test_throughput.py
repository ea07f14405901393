"""Throughput, the drift curve and quantiles of steps."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.figures.records import CurvePoint
from orchestrator.figures.steps import drift_ratio, join_points, matched, quantiles, rate, rate_curve, skew, throughput
from trainers.contract.events import StepsDone


def _window(first: int, images: int, *step_seconds: float, rank: int = 0, attempt: int = 0) -> StepsDone:
    return StepsDone(
        trial="t", attempt=attempt, rank=rank, time=0.0, first_iteration=first, iteration=first + len(step_seconds),
        num_images=images, seconds=sum(step_seconds), step_seconds=step_seconds, data_seconds=(), part_seconds={},
        losses={}, learning_rate=None, peak_memory_gib=None,
    )  # fmt: skip


def _point(first: int, iteration: int, images: float, seconds: float) -> CurvePoint:
    return CurvePoint(first_iteration=first, iteration=iteration, num_images=images, seconds=seconds)


def test_quantiles_lie_between_the_order_statistics():
    assert quantiles([4.0, 1.0, 3.0, 2.0]).p50 == 2.5
    assert quantiles([1.0, 2.0]).p95 == pytest.approx(1.95)
    assert quantiles([3.0]).p99 == 3.0
    assert quantiles([]).p50 is None


def test_unequal_workers_are_rated_by_the_slowest():
    windows = [_window(0, 8, *(1.0,) * 4), _window(0, 8, *(2.0,) * 4, rank=1)]
    # 16 images in 8 s; the mean of the ranks' rates would be 2 x (2 + 1) / 2 = 3.
    assert throughput(windows, 0) == 2.0


def test_workers_of_unequal_batches_count_their_own_images():
    assert throughput([_window(0, 4, 1.0), _window(0, 6, 1.0, rank=1)], 0) == 10.0


def test_a_window_is_cut_at_the_end_of_the_warm_up():
    assert throughput([_window(0, 8, 9.0, 9.0, 1.0, 1.0)], 2) == 2.0


def test_a_warm_up_longer_than_the_run_leaves_nothing():
    assert throughput([_window(0, 8, *(1.0,) * 4)], 4) is None
    assert throughput([], 0) is None
    assert rate_curve([_window(0, 8, *(1.0,) * 4)], 4) == []


def test_the_throughput_is_no_mean_of_rates():
    windows = [_window(0, 10, 1.0), _window(1, 10, 9.0)]
    assert throughput(windows, 0) == 2.0  # 20 images in 10 s; the mean of 10 and 1.11 is 5.56


def test_the_drift_curve_takes_the_slowest_worker_of_every_window():
    windows = [_window(0, 2, 1.0, 1.0), _window(2, 2, 3.0, 3.0)]
    windows += [_window(0, 2, 2.0, 2.0, rank=1), _window(2, 2, 1.0, 1.0, rank=1)]
    assert rate_curve(windows, 0) == [_point(0, 2, 4, 4.0), _point(2, 4, 4, 6.0)]
    assert rate_curve(windows, 0, max_points=1) == [_point(0, 4, 8, 10.0)]


def test_the_drift_curve_does_not_join_over_a_restart():
    windows = [_window(0, 2, 1.0, 1.0), _window(2, 2, 1.0, 1.0), _window(2, 2, 1.0, 1.0, attempt=1)]
    curve = rate_curve(windows, 0, max_points=1)
    assert [(point.first_iteration, point.iteration) for point in curve] == [(0, 4), (2, 4)]


def test_a_dead_ranks_missing_windows_are_left_out_for_all():
    assert len(rate_curve([_window(0, 2, 1.0), _window(1, 2, 1.0), _window(0, 2, 1.0, rank=1)], 0)) == 1


def test_a_killed_ranks_missing_window_does_not_shift_those_of_the_next_start():
    """Rank 1 dies before it reports 2 to 4; the trial goes on from the beginning, slowly at first."""
    windows = [_window(0, 4, 1.0, 1.0, rank=rank) for rank in (0, 1)] + [_window(2, 4, 1.0, 1.0)]
    for first, seconds in ((0, 9.0), (2, 1.0), (4, 2.0)):
        windows += [_window(first, 4, seconds, seconds, rank=rank, attempt=1) for rank in (0, 1)]
    again = [_point(0, 2, 8, 18.0), _point(2, 4, 8, 2.0), _point(4, 6, 8, 4.0)]
    assert rate_curve(windows, 0) == [_point(0, 2, 8, 2.0), *again]
    assert rate_curve(windows, 1) == [_point(1, 2, 4, 1.0), _point(1, 2, 4, 9.0), *again[1:]], "a warm-up cuts all"


def test_matched_points_lie_wholly_between_two_iterations():
    points = [_point(i, i + 2, 1, 1.0) for i in (0, 2, 4)]
    assert matched(points, 1, 6) == points[1:]


def test_drift_compares_the_last_quarter_with_the_first():
    points = [_point(i, i + 1, 1, seconds) for i, seconds in enumerate((1.0, 1.0, 1.0, 2.0))]
    assert drift_ratio(points) == 0.5
    assert drift_ratio(points[:3]) is None


def test_skew_needs_company():
    assert skew([3.0]) is None
    assert skew([1.0, 1.0, 3.0]) == 3.0


_step_lists = st.lists(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), min_size=1, max_size=8)


@given(_step_lists, st.integers(0, 50), st.integers(1, 6))
def test_joining_points_loses_no_image_and_no_second(step_lists, warmup, size):
    first, windows = 0, []
    for steps in step_lists:
        windows.append(_window(first, 4 * len(steps), *steps))
        first += len(steps)
    points = rate_curve(windows, warmup)
    joined = join_points(points, size)
    assert math.isclose(sum(p.seconds for p in joined), sum(p.seconds for p in points))
    whole, joined_rate = throughput(windows, warmup), rate(joined)
    assert (whole is None) == (joined_rate is None)
    assert whole is None or joined_rate == pytest.approx(whole)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.integers(1, 8))
def test_identical_workers_rate_as_often_as_they_are(steps, workers):
    alone = throughput([_window(0, 2 * len(steps), *steps)], 0)
    together = throughput([_window(0, 2 * len(steps), *steps, rank=rank) for rank in range(workers)], 0)
    assert alone is not None and together == pytest.approx(workers * alone)
