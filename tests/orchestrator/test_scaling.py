"""Repeats, speed-up with its interval, and the projection."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.figures.records import CurvePoint, TrialResult
from orchestrator.figures.scaling import (
    compare,
    ratio_between_repeats,
    repeat_rows,
    scaling_fits,
    scaling_rows,
    spread,
    t_975,
)


def _trial(world_size: int, seconds: list[float], batch: int = 8, start: int = 0, **fields: object) -> TrialResult:
    """A trial whose curve has one stretch of one iteration for every given step time."""
    points = [
        CurvePoint(first_iteration=i, iteration=i + 1, num_images=batch, seconds=s)
        for i, s in enumerate(seconds, start)
    ]
    values: dict[str, object] = {
        "name": f"t{world_size}", "world_size": world_size, "recipe": "reference", "scaling": "strong",
        "status": "FINISHED", "global_batch_size": batch, "rate_curve": points, "rate_curve_source": "steps",
        "images_per_second": batch * len(seconds) / sum(seconds),
    }  # fmt: skip
    return TrialResult.model_validate({**values, **fields})


def test_sizes_are_compared_over_the_iterations_that_both_have():
    # The longer run gets slower after iteration 8; the first 8 take 1 s each on one worker, 0.6 s on two.
    one, two = _trial(1, [1.0] * 8 + [5.0] * 8), _trial(2, [0.6] * 8)
    row = scaling_rows([one, two])[1]
    assert row.speed_up == pytest.approx(1 / 0.6)
    assert row.efficiency == pytest.approx(1 / 1.2)
    assert (row.matched_first_iteration, row.matched_iteration) == (0, 8)


def test_warm_up_of_either_run_is_out_of_the_comparison():
    one, two = _trial(1, [9.0, 1.0, 1.0, 1.0]), _trial(2, [0.5, 0.5, 0.5], start=1)
    assert scaling_rows([one, two])[1].speed_up == pytest.approx(2.0)


def test_curves_from_a_logs_time_stamps_are_not_matched_and_whole_runs_are_compared():
    one = _trial(1, [1.0] * 8, rate_curve_source="timestamps", images_per_second=9.66)
    eight = _trial(8, [1.0] * 8, rate_curve_source="timestamps", images_per_second=55.27)
    row = scaling_rows([one, eight])[1]
    assert row.efficiency == pytest.approx(55.27 / 8 / 9.66)
    assert row.matched_iteration is None and row.interval_source is None


def test_a_trial_without_a_rate_has_no_row():
    rows = scaling_rows([_trial(1, [1.0] * 8), _trial(2, [1.0] * 8, images_per_second=None)])
    assert [row.world_size for row in rows] == [1]


def test_weak_and_strong_are_not_compared_with_each_other():
    rows = scaling_rows([_trial(1, [1.0] * 4), _trial(2, [1.0] * 4, scaling="weak")])
    assert [(row.kind, row.speed_up) for row in rows] == [("strong", 1.0), ("weak", 1.0)]


def test_two_identical_trials_give_a_ratio_whose_interval_covers_1():
    covered = 0
    for seed in range(200):
        chance = random.Random(seed)  # noqa: S311 - repeatable noise, no secret
        runs = []
        for _ in range(2):
            # Steps that resemble their neighbours: an autoregressive series, as on a machine with other guests.
            level, seconds = 0.0, []
            for _ in range(400):
                level = 0.8 * level + chance.gauss(0, 0.05)
                seconds.append(1.0 + level + chance.expovariate(20))
            runs.append(_trial(1, seconds))
        ratio = compare(*runs)
        assert ratio is not None
        covered += ratio.low <= 1 <= ratio.high
    assert covered >= 180  # 95 % of 200, less three standard deviations


def test_trials_that_differ_are_distinguished():
    chance = random.Random(0)  # noqa: S311 - repeatable noise, no secret
    slow, fast = ([base + chance.gauss(0, 0.02) for _ in range(100)] for base in (1.1, 1.0))
    ratio = compare(_trial(1, fast), _trial(1, slow))
    assert ratio is not None and ratio.low > 1 and ratio.value == pytest.approx(1.1, rel=0.01)


def test_a_run_too_short_to_have_a_spread_has_no_interval():
    assert compare(_trial(1, [1.0, 1.1]), _trial(1, [1.0, 1.1])) is None


def test_repeats_are_summed_up_by_hand_computed_figures():
    summed = spread([1.0, 2.0, 3.0, 4.0, 10.0])
    assert summed is not None
    assert (summed.median, summed.mean, summed.trimmed_mean) == (3.0, 4.0, 3.0)
    # stdev = sqrt(50 / 4) = 3.5355; t(4) = 2.7764; 2.7764 x 3.5355 / sqrt(5) = 4.390
    assert summed.low == pytest.approx(4 - 4.390, abs=1e-3) and summed.high == pytest.approx(4 + 4.390, abs=1e-3)


def test_four_repeats_have_no_trimmed_mean_and_one_has_no_interval():
    four, one = spread([1.0, 2.0, 3.0, 4.0]), spread([5.0])
    assert four is not None and four.trimmed_mean is None and four.low is not None
    assert one is not None and one.low is None and one.median == 5.0
    assert spread([]) is None


@given(st.lists(st.floats(0.1, 1e6), min_size=2, max_size=40))
def test_a_spread_is_in_order(values):
    summed = spread(values)
    assert summed is not None and summed.low is not None and summed.high is not None
    assert summed.minimum <= summed.median <= summed.maximum
    assert summed.low <= summed.mean <= summed.high


@given(st.floats(1, 500), st.floats(1, 500))
def test_the_t_distribution_narrows_with_more_values(a, b):
    assert t_975(min(a, b)) >= t_975(max(a, b)) > 1.9599


def test_the_t_distribution_has_its_textbook_points():
    assert t_975(4) == pytest.approx(2.7764, abs=1e-4) and t_975(40) == pytest.approx(2.0211, abs=1e-4)
    assert t_975(120) == pytest.approx(1.9799, abs=1e-4)


def test_repeats_on_both_sides_give_the_interval():
    trials = [_trial(n, [s] * 8, seed=seed) for n in (1, 2) for seed, s in enumerate((1.0 / n, 1.1 / n, 1.05 / n))]
    row = scaling_rows(trials)[1]
    assert row.interval_source == "repeats" and row.efficiency == pytest.approx(1.0)
    assert row.efficiency_low is not None and row.efficiency_high is not None
    assert row.efficiency_low < 1 < row.efficiency_high
    (one, two) = repeat_rows(trials)
    assert one.num_trials == 3 and two.figures["images_per_second"].num_values == 3


def test_one_repeat_a_side_has_no_spread_between_repeats():
    assert ratio_between_repeats([1.0], [1.0, 2.0]) is None


def test_a_fit_finds_the_parts_that_made_the_figures():
    # Strong: 0.1 serial + 1.6 / N + 0.05 log2 N.
    trials = [_trial(n, [0.1 + 1.6 / n + 0.05 * k] * 4) for k, n in enumerate((1, 2, 4, 8))]
    (fit,) = scaling_fits(trials)
    assert fit.serial_seconds == pytest.approx(0.1)
    assert fit.computation_seconds == pytest.approx(1.6)
    assert fit.communication_seconds == pytest.approx(0.05)
    assert fit.worst_relative_error == pytest.approx(0, abs=1e-9)
    assert fit.projected_world_size == 16
    assert fit.projected_images_per_second == pytest.approx(8 / (0.1 + 0.1 + 0.2))


def test_weak_scaling_projects_a_batch_that_grows_with_the_workers():
    # 8 images a worker: 1 s on one, 1.1 on two.
    trials = [_trial(1, [1.0] * 4, 8, scaling="weak"), _trial(2, [1.1] * 4, 16, scaling="weak")]
    (fit,) = scaling_fits(trials)
    assert fit.serial_seconds is None and fit.communication_seconds == pytest.approx(0.1)
    assert fit.projected_images_per_second == pytest.approx(32 / 1.2)
    assert fit.projected_efficiency == pytest.approx(1 / 1.2)


def test_no_part_of_a_fit_is_negative_where_scaling_is_better_than_ideal():
    (fit,) = scaling_fits([_trial(1, [1.0] * 4), _trial(2, [0.4] * 4)])
    assert fit.computation_seconds > 0 and not fit.serial_seconds and not fit.communication_seconds


def test_two_workers_slower_than_one_are_put_down_to_communication():
    (fit,) = scaling_fits([_trial(1, [1.0] * 4), _trial(2, [1.5] * 4)])
    assert fit.communication_seconds == pytest.approx(1.0) and fit.serial_seconds is None
    assert fit.worst_relative_error == pytest.approx(0, abs=1e-9)


def test_two_sizes_with_a_gain_emit_the_serial_part():
    # 0.4 + 0.6 / N.
    (fit,) = scaling_fits([_trial(1, [1.0] * 4), _trial(2, [0.7] * 4)])
    assert fit.serial_seconds == pytest.approx(0.4) and fit.communication_seconds is None


def test_one_size_gives_no_projection():
    assert scaling_fits([_trial(1, [1.0] * 4)]) == []
