import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.clock import Stretch, Window, drift_ratio, join_stretches, matched, quantile, rate, skew, stretches
from trainers.clock import throughput as images_per_second


def test_quantiles_lie_between_the_order_statistics():
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert quantile([1.0, 2.0], 0.95) == pytest.approx(1.95)
    assert quantile([], 0.5) is None


def test_unequal_workers_are_rated_by_the_slowest():
    windows = {0: [Window(0, 8, (1.0,) * 4)], 1: [Window(0, 8, (2.0,) * 4)]}
    # 16 images in 8 s; the mean of the ranks' rates would be 2 x (2 + 1) / 2 = 3.
    assert images_per_second(windows, 0) == 2.0


def test_workers_of_unequal_batches_count_their_own_images():
    assert images_per_second({0: [Window(0, 4, (1.0,))], 1: [Window(0, 6, (1.0,))]}, 0) == 10.0


def test_a_window_is_cut_at_the_end_of_the_warm_up():
    assert images_per_second({0: [Window(0, 8, (9.0, 9.0, 1.0, 1.0))]}, 2) == 2.0


def test_a_warm_up_longer_than_the_run_leaves_nothing():
    assert images_per_second({0: [Window(0, 8, (1.0,) * 4)]}, 4) is None
    assert images_per_second({}, 0) is None
    assert stretches({0: [Window(0, 8, (1.0,) * 4)]}, 4) == []


def test_the_throughput_is_no_mean_of_rates():
    windows = {0: [Window(0, 10, (1.0,)), Window(1, 10, (9.0,))]}
    assert images_per_second(windows, 0) == 2.0  # 20 images in 10 s; the mean of 10 and 1.11 is 5.56


def test_the_drift_curve_takes_the_slowest_worker_of_every_stretch():
    windows = {
        0: [Window(0, 2, (1.0, 1.0)), Window(2, 2, (3.0, 3.0))],
        1: [Window(0, 2, (2.0, 2.0)), Window(2, 2, (1.0, 1.0))],
    }
    assert stretches(windows, 0) == [Stretch(0, 2, 4, 4.0), Stretch(2, 4, 4, 6.0)]
    assert stretches(windows, 0, max_points=1) == [Stretch(0, 4, 8, 10.0)]


def test_the_drift_curve_does_not_join_over_a_restart():
    windows = {0: [Window(0, 2, (1.0, 1.0)), Window(2, 2, (1.0, 1.0)), Window(2, 2, (1.0, 1.0))]}
    assert [(s.first_iteration, s.iteration) for s in stretches(windows, 0, max_points=1)] == [(0, 4), (2, 4)]


def test_a_dead_ranks_missing_windows_are_left_out_for_all():
    windows = {0: [Window(0, 2, (1.0,)), Window(1, 2, (1.0,))], 1: [Window(0, 2, (1.0,))]}
    assert len(stretches(windows, 0)) == 1


def test_matched_stretches_lie_wholly_between_two_iterations():
    points = [Stretch(i, i + 2, 1, 1.0) for i in (0, 2, 4)]
    assert matched(points, 1, 6) == points[1:]


def test_drift_compares_the_last_quarter_with_the_first():
    points = [Stretch(i, i + 1, 1, seconds) for i, seconds in enumerate((1.0, 1.0, 1.0, 2.0))]
    assert drift_ratio(points) == 0.5
    assert drift_ratio(points[:3]) is None


def test_skew_needs_company():
    assert skew([3.0]) is None
    assert skew([1.0, 1.0, 3.0]) == 3.0


_windows = st.lists(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), min_size=1, max_size=8)


@settings(deadline=None)  # the machine may be busy
@given(_windows, st.integers(0, 50), st.integers(1, 6))
def test_joining_stretches_loses_no_image_and_no_second(step_lists, warmup, size):
    first, windows = 0, []
    for steps in step_lists:
        windows.append(Window(first, 4.0 * len(steps), tuple(steps)))
        first += len(steps)
    points = stretches({0: windows}, warmup)
    joined = join_stretches(points, size)
    assert math.isclose(sum(p.seconds for p in joined), sum(p.seconds for p in points))
    whole = images_per_second({0: windows}, warmup)
    joined_rate = rate(joined)
    assert (whole is None) == (joined_rate is None)
    assert whole is None or joined_rate == pytest.approx(whole)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.integers(1, 8))
def test_identical_workers_rate_as_often_as_they_are(steps, workers):
    window = Window(0, 2.0 * len(steps), tuple(steps))
    alone = images_per_second({0: [window]}, 0)
    together = images_per_second({rank: [window] for rank in range(workers)}, 0)
    assert alone is not None and together == pytest.approx(workers * alone)
