"""Energy of trials that never ran, from readings that can be added up by hand."""

import json
import math
from types import SimpleNamespace

import pytest

from orchestrator.figures.energy_records import Energy
from orchestrator.figures.records import TrialResult
from orchestrator.figures.scaling import repeat_rows
from orchestrator.figures.trial import trial_result
from orchestrator.report.details import detail_tables
from tests.builders.trials import TrialBuilder, trained
from trainers.contract.events import EnergySampled, StepsDone, WorkerStarted, event_from_json


def _energy(made: TrialBuilder) -> Energy:
    return trial_result(made.trial, made.events).energy


def _steady(watts: float = 100.0, **fields) -> TrialBuilder:
    """`trained()` with a node of steady power from the start of its workers, at 10 s, to the end of training."""
    made = trained(**fields)
    made.energy(10.0, *(watts * second for second in range(19)))
    return made


def test_the_sections_add_up_to_the_whole():
    energy = _energy(_steady())
    assert energy.joules == 1800  # 18 s
    assert energy.training_joules == pytest.approx(720)  # the steps of rank 0: two windows of 3.6 s
    assert energy.evaluation_joules == pytest.approx(400)  # two evaluations of 2 s
    assert energy.training_joules + energy.evaluation_joules + energy.idle_joules == pytest.approx(1800)
    assert energy.source == "counter" and energy.reason == ""


def test_an_image_takes_the_energy_of_the_steps_after_the_warm_up():
    assert _energy(_steady()).joules_per_image == pytest.approx(540 / 24)  # 1.8 + 3.6 s, 6 steps of batch 4


def test_the_energy_to_the_target_ends_with_the_scores():
    energy = _energy(_steady(price_per_kwh=0.3, carbon_grams_per_kwh=400))
    assert energy.watt_hours_to_target == pytest.approx(1700 / 3600)
    assert energy.cost == pytest.approx(0.3 * 1800 / 3.6e6) and energy.carbon_grams == pytest.approx(400 * 1800 / 3.6e6)
    assert energy.cost_to_target == pytest.approx(0.3 * 1700 / 3.6e6)
    assert energy.carbon_grams_to_target == pytest.approx(400 * 1700 / 3.6e6)


def test_a_trial_that_missed_its_target_has_no_energy_to_it_and_no_price_means_no_cost():
    energy = _energy(_steady(target_box_ap=90.0))
    assert energy.watt_hours_to_target is None and energy.joules == 1800
    assert energy.cost is None and energy.carbon_grams is None and energy.cost_to_target is None


def test_a_device_that_works_harder_in_steps_is_seen_between_the_readings():
    made, joules = trained(), [0.0]
    for second in range(10, 28):  # 300 W in the seconds that are whole within steps, else 100
        joules.append(joules[-1] + (300.0 if second in (15, 16, 17, 22, 23, 24) else 100.0))
    made.energy(10.0, *joules)
    energy = _energy(made)
    assert energy.joules == 1800 + 6 * 200
    assert energy.training_joules == pytest.approx(720 + 6 * 200)
    assert energy.evaluation_joules == pytest.approx(400)


def test_readings_come_in_several_events_and_survive_their_file():
    made = trained()
    for first in range(10, 28, 6):
        made.energy(float(first), *(100.0 * (second - 10) for second in range(first, first + 6)))
    made.energy(28.0, 1800.0)
    made.events[:] = [event_from_json(event.to_json()) for event in made.events]
    assert _energy(made) == _energy(_steady())


def _two_nodes(**second) -> TrialBuilder:
    made = trained()
    made.events[:] = [e for e in made.events if not isinstance(e, WorkerStarted)]
    for rank, host in enumerate(("a", "b")):
        made.emit(
            WorkerStarted, 10.0, rank, host=host, node_id=host, pid=rank, local_rank=0, device_name="GPU",
            device_memory_gib=None, versions={},
        )  # fmt: skip
    made.energy(10.0, *(100.0 * second for second in range(19)), host_joules=tuple(range(19)))
    made.energy(10.0, *(50.0 * second for second in range(19)), rank=1, host="b", **second)
    return made


def test_nodes_are_summed_and_listed():
    energy = _energy(_two_nodes(host_joules=tuple(2.0 * second for second in range(19))))
    assert energy.joules == 2700 and energy.training_joules == pytest.approx(7.2 * 150)
    assert energy.host_joules == 18 + 36
    assert [(node.host, node.joules, node.host_joules) for node in energy.nodes] == [("a", 1800, 18), ("b", 900, 36)]


def test_one_node_that_is_not_measured_makes_the_sum_unknown_and_says_why():
    energy = _energy(_two_nodes(joules=None, reason="NVML: no driver"))
    assert energy.joules is None and energy.joules_per_image is None and energy.cost is None
    assert energy.reason == "b: NVML: no driver"
    assert energy.host_joules is None
    assert [(node.host, node.joules) for node in energy.nodes] == [("a", 1800), ("b", None)]


def test_a_node_that_sent_no_reading_makes_the_sum_unknown():
    made = _two_nodes()
    made.events[:] = [e for e in made.events if not (isinstance(e, EnergySampled) and e.rank)]
    assert _energy(made).reason == "b: no reading arrived from it in attempt 0" and _energy(made).joules is None


def test_events_of_older_versions_have_no_energy_and_say_so():
    energy = _energy(trained())
    assert energy == Energy(reason="its events hold no energy")
    old = trial_result(trained().trial, trained().events).model_dump(mode="json")
    del old["energy"]
    assert TrialResult.model_validate(old).energy == Energy()


@pytest.mark.parametrize(("lost", "known"), [(0.5, True), (0.8, True), (2.0, False), (18.0, False)])
def test_seconds_that_were_not_measured_are_said_and_too_many_leave_no_figure(lost: float, known: bool):
    made = trained()
    made.energy(10.0, *(100.0 * second for second in range(19)), lost_seconds=lost)
    energy = _energy(made)
    assert (energy.joules is not None) is known
    assert ("not measured" in energy.reason) is not known


def test_what_a_killed_process_took_along_is_missing_time():
    made = trained()
    made.energy(10.0, *(100.0 * second for second in range(10)))  # nothing arrived after 19 s; training ended at 28 s
    energy = _energy(made)
    assert energy.joules is None and energy.reason == "9.0 of 18.0 s of the nodes were not measured"


def test_each_attempt_has_its_own_readings_and_downtime_takes_none():
    made = TrialBuilder(trained().trial)
    made.started()
    for start, first in ((10.0, 0), (40.0, 4)):
        made.workers(start)
        made.energy(start, *(100.0 * second for second in range(9)))
        made.loop(start + 4.0, first)
        for rank in range(2):
            made.steps(start + 8.0, first, *(1.0,) * 4, rank=rank)
        if not first:
            made.restarted(30.0, 4)
    made.finished(48.0, 8)
    made.ended(50.0)
    energy = _energy(made)
    assert energy.joules == 1600 and energy.training_joules == pytest.approx(800)
    assert energy.joules_per_image == pytest.approx(600 / 24)  # 2 + 4 steps of 1 s


def test_a_concurrent_evaluation_takes_none_of_the_steps_energy():
    made = _steady()
    for event in made.events:
        if event.kind == "evaluated":
            object.__setattr__(event, "part_seconds", {"stall": 0.1})
    energy = _energy(made)
    assert energy.evaluation_joules == 0 and energy.training_joules == pytest.approx(720)
    assert energy.idle_joules == pytest.approx(1080)


def test_no_moment_counts_twice():
    made = _steady()
    for event in made.events:  # windows that claim more seconds than there were
        if isinstance(event, StepsDone):
            object.__setattr__(event, "seconds", 100.0)
    energy = _energy(made)
    assert energy.idle_joules >= 0
    assert math.fsum((energy.training_joules, energy.evaluation_joules, energy.idle_joules)) == pytest.approx(1800)


def test_gpus_that_only_evaluate_are_named_as_left_out():
    energy = _energy(_steady(evaluation_gpus=2))
    assert energy.joules == 1800 and energy.reason == "the 2 GPUs that are reserved for evaluations are not in it"


def test_power_that_was_integrated_is_named_as_that():
    made = trained()
    made.energy(10.0, *(100.0 * second for second in range(19)), source="power")
    assert _energy(made).source == "power"


def test_repeats_have_the_spread_of_their_energy():
    trials = [trial_result(made.trial, made.events) for made in (_steady(100.0), _steady(200.0, seed=8))]
    (row,) = repeat_rows(trials)
    assert row.figures["energy.joules_per_image"].median == pytest.approx(1.5 * 22.5)
    assert json.loads(row.model_dump_json())["figures"]["energy.watt_hours_to_target"]["num_values"] == 2


def test_the_report_shows_energy_where_hosts_looked_for_it_and_why_it_is_missing():
    trials = [
        SimpleNamespace(label=label, trial=trial_result(made.trial, made.events))
        for label, made in (("old", trained()), ("known", _steady()), ("half", _two_nodes(joules=None, reason="none")))
    ]
    headings, rows = detail_tables(trials)["Energy"]
    assert (headings[1], headings[-1]) == ("Energy (J)", "Not measured")
    assert [(row[0], row[1], row[-1]) for row in rows] == [("known", "1,800", ""), ("half", "–", "b: none")]
