"""The model of a prediction: parts of a step, their extrapolation, intervals, and what is simulated."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.acceptance.document import Acceptance, LinkRecord, write_document
from orchestrator.experiment.prediction_file import AskedSize, Prediction
from orchestrator.experiment.spec import SpecError
from orchestrator.figures.step_terms import ring_term
from orchestrator.figures.trial import trial_result
from orchestrator.prediction import model, simulation
from orchestrator.prediction.__main__ import slowest_links
from orchestrator.prediction.measured import MeasuredSize, measured_size
from orchestrator.prediction.predict import predict
from orchestrator.prediction.simulation import Links
from orchestrator.runlog.folder import TrialEvents
from tests.builders.trials import TrialBuilder, plan
from trainers.contract.acceptance import Measured
from trainers.contract.checkpoint_interval import advised_checkpoint_seconds

STEPS = 80


def size(world_size: int, own: np.ndarray, communication: float = 0.0, images: int = 2) -> MeasuredSize:
    waits = np.full(own.shape[1], communication)
    return MeasuredSize(world_size, images * world_size, own, np.full_like(own, 0.01), waits)


def drawn(world_size: int, seconds: float = 1.0, spread: float = 0.1, seed: int = 0, common: float = 0.0) -> np.ndarray:
    """Own times of ranks: independent normal deviations, and what all ranks of a step have in common."""
    chance = np.random.default_rng([seed, world_size])
    together = common * chance.standard_normal(STEPS)
    return seconds + spread * chance.standard_normal((world_size, STEPS)) + together


def trial(world_size: int, own: np.ndarray, communication: float = 0.0, status: str = "FINISHED") -> TrialEvents:
    """A trial with these own times (ranks, steps): each step takes as long as its slowest rank, and the exchange."""
    made = TrialBuilder(
        plan(
            name=f"made-{world_size}", world_size=world_size, global_batch_size=2 * world_size, scaling="weak",
            throughput_warmup_iters=0, max_iter=STEPS, price_per_accelerator_hour=2.0,
        )
    )  # fmt: skip
    made.started()
    made.workers(5.0)
    made.loop(10.0)
    whole = own.max(axis=0) + communication
    for rank, mine in enumerate(own):
        waits = tuple(whole - mine)
        parts = {"backward": tuple(0.5 * mine), **({"communication": waits} if world_size > 1 else {})}
        made.steps(
            20.0, 0, *whole, rank=rank, data_seconds=tuple(0.01 for _ in mine), step_part_seconds=parts,
            part_seconds={name: sum(values) for name, values in parts.items()},
        )  # fmt: skip
    made.checkpoint(20.5, STEPS, 0.5)
    made.finished(21.0, STEPS)
    made.ended(22.0, status)
    return TrialEvents(made.trial.name, trial_result(made.trial, made.events), made.events, made.trial, None)  # type: ignore[arg-type]


def asked(*sizes: int, epochs: float | None = None) -> Prediction:
    rows = [
        AskedSize(
            world_size=n,
            global_batch_size=2 * n,
            base_lr=0.01,
            iterations=1000,
            convergence="",
            epochs_to_target=epochs,
        )
        for n in sizes
    ]
    return Prediction(setup={}, recipe="reference", scaling="weak", asked=rows)


def test_the_expected_maximum_of_two_coins_is_three_quarters():
    assert model.expected_maximum(np.array([1.0, 0.0]), 2) == pytest.approx(0.75)


def test_the_expected_maximum_lies_between_the_mean_and_the_largest_value():
    values = np.array([3.0, 1.0, 2.0])
    assert model.expected_maximum(values, 1) == pytest.approx(2.0)
    assert model.expected_maximum(values, 10_000) == pytest.approx(3.0)


def test_the_expected_maximum_of_normal_draws_has_its_textbook_values():
    values = np.random.default_rng(1).standard_normal(100_000)
    # Harter 1961, "Expected values of normal order statistics".
    assert model.expected_maximum(values, 2) == pytest.approx(0.5642, abs=0.01)
    assert model.expected_maximum(values, 10) == pytest.approx(1.5388, abs=0.02)


def test_more_workers_than_deviations_are_bounded_by_the_slowest_and_that_is_said():
    assert model.weight_of_slowest(480, 256) < 0.5 < model.weight_of_slowest(480, 1024)
    trials = [trial(n, drawn(n)) for n in (1, 2)]
    notes = predict(asked(4, 5000), trials).assumptions
    assert any("of 5000 workers, the slowest is likely slower" in note for note in notes)
    assert not any("likely slower" in note for note in predict(asked(4), trials).assumptions)


@pytest.mark.parametrize("ranks", [2, 8])
def test_what_slows_all_ranks_of_a_step_alike_makes_nobody_wait(ranks: int):
    # The deviation of 0.1 between ranks is found next to 0.3 that they have in common.
    found = model.deviations(size(ranks, drawn(ranks, common=0.3)))
    assert found.std() == pytest.approx(0.1, rel=0.15)


def test_a_rank_that_is_ready_last_waits_for_the_exchange_alone():
    measured = measured_size(trial(2, drawn(2), communication=0.25))
    assert measured.communication == pytest.approx(0.25)
    assert measured.own == pytest.approx(drawn(2))


def test_sixty_four_workers_are_predicted_from_one_two_and_eight():
    # 1 s of work of spread 0.1, 0.05 s x log2(N) of exchange: the slowest of 64 normal draws is 2.3437 deviations late.
    trials = [trial(n, drawn(n), communication=0.05 * math.log2(n)) for n in (1, 2, 8)]
    (predicted,) = predict(asked(64), trials).sizes
    truth = 1.0 + 0.1 * 2.3437 + 0.05 * 6
    assert predicted.step_seconds == pytest.approx(truth, rel=0.03)
    assert predicted.images_per_second == pytest.approx(128 / truth, rel=0.03)
    assert predicted.images_per_second_low < 128 / truth < predicted.images_per_second_high
    assert sum(predicted.part_seconds.values()) == pytest.approx(predicted.step_seconds)
    assert predicted.part_seconds["communication"] == pytest.approx(0.3)
    assert predicted.efficiency == pytest.approx(1 / truth, rel=0.03)


def test_communication_of_a_ring_is_told_from_that_of_a_tree():
    sizes = [size(n, drawn(n), 0.1 * ring_term(n) if n > 1 else 0.0) for n in (1, 2, 8)]
    assert model.central(sizes, 64, 128).communication == pytest.approx(0.1 * ring_term(64), rel=0.01)


def test_one_size_leaves_both_shapes_of_communication_in_the_interval():
    trials = [trial(n, drawn(n, spread=0.0), communication=0.1 * (n > 1)) for n in (1, 2)]
    (predicted,) = predict(asked(8), trials).sizes
    # 0.3 as in a tree, 0.175 as in a ring.
    assert predicted.part_seconds["communication"] == pytest.approx((0.3 + 0.175) / 2)
    assert predicted.images_per_second_low == pytest.approx(16 / 1.3)
    assert predicted.images_per_second_high == pytest.approx(16 / 1.175)


def test_strong_scaling_divides_what_goes_with_the_images_alone():
    # 16 images over N workers: 0.2 s and 0.1 s an image.
    sizes = [
        MeasuredSize(n, 16, np.full((n, STEPS), 0.2 + 1.6 / n), np.zeros((n, STEPS)), np.zeros(STEPS)) for n in (1, 2)
    ]
    assert model.central(sizes, 8, 16).seconds == pytest.approx(0.4)


def test_the_same_events_give_the_same_prediction():
    trials = [trial(n, drawn(n)) for n in (1, 2)]
    assert predict(asked(4), trials) == predict(asked(4), trials)


def test_time_and_cost_to_the_target_follow_from_epochs_and_price():
    trials = [trial(n, drawn(n, spread=0.0)) for n in (1, 2)]
    (predicted,) = predict(asked(4, epochs=10.0), trials).sizes
    # An epoch has 8 images, a batch 8: 10 steps of 1 s; 4 workers at 2 an hour.
    assert predicted.time_to_target_seconds == pytest.approx(10.0)
    assert predicted.cost_to_target == pytest.approx(4 * 2 * 10 / 3600)
    assert predicted.schedule_seconds == pytest.approx(1000.0)
    (unknown,) = predict(asked(4), trials).sizes
    assert unknown.time_to_target_seconds is None and unknown.cost_to_target is None


def test_a_worker_that_slows_down_next_to_others_is_mentioned():
    trials = [trial(1, drawn(1)), trial(2, drawn(2, seconds=1.5))]
    prediction = predict(asked(4), trials)
    assert any("50% longer with 2 workers than with 1" in note for note in prediction.assumptions)
    assert prediction.sizes[0].part_seconds["compute"] == pytest.approx(1.49, rel=0.02)


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ([trial(1, drawn(1))], "two sizes that finished"),
        ([trial(1, drawn(1)), trial(2, drawn(2), status="FAILED")], "it has: 1"),
        ([trial(1, drawn(1)), trial(2, drawn(2)[:, :5])], "only 5 steps"),
    ],
)
def test_too_little_to_predict_from_is_refused(trials: list[TrialEvents], words: str):
    with pytest.raises(SpecError, match=words):
        predict(asked(4), trials)


def test_a_ring_takes_its_alpha_and_beta():
    # 2 x 3 rounds of 10 us, and 2 x 3 / 4 of 100 MB at 1 GB/s.
    links = Links(bytes_per_second=1e9, latency_seconds=1e-5, algorithm="ring", gradient_bytes=1e8)
    assert simulation.all_reduce_seconds(links, 4, 1e8) == pytest.approx(6e-5 + 0.15)
    assert simulation.all_reduce_seconds(links, 1, 1e8) == 0.0


def test_a_tree_has_few_rounds_and_sends_all_of_it_twice():
    links = Links(bytes_per_second=1e9, latency_seconds=1e-5, algorithm="tree", gradient_bytes=1e8)
    assert simulation.all_reduce_seconds(links, 1024, 1e8) == pytest.approx(20e-5 + 0.2)


def test_the_backward_pass_hides_all_but_the_last_bucket():
    links = Links(bytes_per_second=1e9, latency_seconds=0.0, algorithm="tree", gradient_bytes=1e8)
    assert simulation.exposed_seconds(links, 8, backward_seconds=1.0) == pytest.approx(2 * 25 * 2**20 / 1e9)
    assert simulation.exposed_seconds(links, 8, backward_seconds=0.05) == pytest.approx(0.15)


def test_stated_links_replace_measured_communication_and_are_marked_as_simulated():
    trials = [trial(n, drawn(n, spread=0.0), communication=0.1 * (n > 1)) for n in (1, 2)]
    links = Links(bytes_per_second=1e9, latency_seconds=0.0, algorithm="tree", gradient_bytes=1e9)
    prediction = predict(asked(1024), trials, links)
    # 2 s less the backward pass, half a second.
    assert prediction.sizes[0].part_seconds["communication"] == pytest.approx(1.5)
    assert sum("SIMULATED" in note for note in prediction.assumptions) == 3


@pytest.mark.parametrize(("interval", "mtbf"), [(50.0, 300.0), (200.0, 600.0), (600.0, 20_000.0)])
def test_simulated_failures_cost_what_dalys_formula_says(interval: float, mtbf: float):
    work = 200 * interval
    walls = [wall for wall, _ in simulation.simulated_walls(work, interval, 5.0, 20.0, mtbf)]
    assert np.mean(walls) == pytest.approx(simulation.expected_wall_seconds(work, interval, 5.0, 20.0, mtbf), rel=0.02)


def test_the_advised_interval_is_near_the_best_of_dalys_formula():
    best = advised_checkpoint_seconds(5.0, 20_000.0)
    walls = {
        factor: simulation.expected_wall_seconds(1e5, factor * best, 5.0, 20.0, 20_000.0) for factor in (0.5, 1, 2)
    }
    assert walls[1] < min(walls[0.5], walls[2])


def test_a_training_without_failures_takes_its_steps_and_checkpoints():
    assert simulation.simulated_walls(1000.0, 100.0, 1.0, 20.0, 1e12, 3) == [(1010.0, 0)] * 3


def test_a_thousand_gpus_get_an_interval_and_a_goodput():
    run = simulation.simulated_run(86_400.0, 1024, checkpoint=10.0, restart=120.0, mtbf_worker_hours=None)
    assert run is not None
    # 128 hosts: 154 days / 128 = 28.8 h; sqrt(2 x 10 s x 28.8 h) = 24 min.
    assert run.num_hosts == 128 and run.mtbf_seconds == pytest.approx(86_400 / (6.5e-3 * 128))
    assert run.advised_checkpoint_seconds == pytest.approx(math.sqrt(20 * run.mtbf_seconds))
    assert 0.95 < run.goodput < 1 and run.wall_seconds_low <= run.wall_seconds <= run.wall_seconds_high
    assert run == simulation.simulated_run(86_400.0, 1024, checkpoint=10.0, restart=120.0, mtbf_worker_hours=None)


def test_a_training_that_would_hardly_ever_end_is_not_simulated():
    assert simulation.simulated_run(86_400.0, 1024, checkpoint=60.0, restart=120.0, mtbf_worker_hours=1.0) is None
    assert simulation.simulated_run(86_400.0, 8, checkpoint=0.0, restart=120.0, mtbf_worker_hours=None) is None


def test_links_of_an_acceptance_are_those_of_its_slowest_pair(tmp_path: Path):
    def pair(*hosts: str, rates: tuple[float, float], latency: float) -> LinkRecord:
        values = [Measured(key="all_reduce", value=rate, part=part) for rate, part in zip(rates, "ab", strict=True)]
        return LinkRecord(hosts, None, (*values, Measured(key="latency", value=latency)))

    pairs = (pair("a", "b", rates=(1.0, 9.0), latency=20.0), pair("a", "c", rates=(1.0, 5.0), latency=60.0))
    together = LinkRecord(("a", "b", "c"), None, (Measured(key="all_reduce", value=2.0),))
    found = Acceptance("made", "", "cpu", short=False, nodes=(), links=(*pairs, together), verdicts=(), seconds=1.0)
    # An all-reduce of one number is two messages.
    assert slowest_links(write_document(found, tmp_path)) == (5.0, 30.0)
    write_document(replace(found, links=(together,)), tmp_path)
    with pytest.raises(SpecError, match="no pair of nodes"):
        slowest_links(tmp_path)
