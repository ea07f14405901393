"""Trials side by side, without a cluster: which fit next to each other, when each starts, what is recorded."""

import json
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from orchestrator.execution.event_log import EventLog
from orchestrator.execution.side_by_side import Calls, run_side_by_side
from orchestrator.execution.stop import StopRequest
from orchestrator.experiment.placement import free_room, num_side_by_side
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.spec import SpecError
from orchestrator.figures.neighbours import with_neighbours
from orchestrator.figures.records import TrialResult
from orchestrator.figures.trial import trial_result
from orchestrator.preflight.local import storage_bytes
from orchestrator.preflight.model import estimate_checkpoint_bytes
from orchestrator.report.plan_table import side_by_side_note
from orchestrator.runlog.outbox import Outbox, RunFolderError
from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment
from tests.builders.trials import TrialBuilder, plan
from trainers.contract.events import Event, RunStarted, TrialEnded
from trainers.contract.plan import TrialPlan

HOST = (8, 96)


def plans(tmp: Path, world_sizes: list[int], num_seeds: int = 1, **trials: Any) -> list[TrialPlan]:
    sizes = {"world_sizes": world_sizes, "scaling": "weak", "reference_world_size": 1, "seeds": list(range(num_seeds))}
    values = tiny_experiment(
        trials={"concurrent": "auto", **sizes, **trials},
        resources={"device": "cuda"},
        model={"weights": "", "overrides": {**TINY_OVERRIDES, "SOLVER.MAX_ITER": 256, "SOLVER.STEPS": [192]}},
    )
    return expand(parse_experiment(values, "test"), Hardware(num_gpus=32, num_cpus=384), str(tmp), tmp)


def hosts(number: int) -> dict[str, tuple[int, int]]:
    return {f"host{each}": HOST for each in range(number)}


def test_five_seeds_of_8_gpus_on_32_run_four_at_a_time(tmp_path: Path) -> None:
    seeds = plans(tmp_path, [8], 5)
    assert all(each.own_nodes for each in seeds)
    assert num_side_by_side(seeds, hosts(4), "auto") == 4
    assert num_side_by_side(seeds, hosts(4), 3) == 3
    assert num_side_by_side(seeds, hosts(8), "auto") == 5
    assert num_side_by_side(seeds, hosts(1), "auto") == 1


def test_trials_have_hosts_to_themselves_unless_they_may_share_them(tmp_path: Path) -> None:
    assert num_side_by_side(plans(tmp_path, [2], 5), hosts(2), "auto") == 2
    shared = plans(tmp_path, [2], 9, allow_shared_nodes=True)
    assert not any(each.own_nodes for each in shared)
    assert num_side_by_side(shared, hosts(2), "auto") == 8
    held = [(shared[0], {"host0": 2}), (shared[1], {"host0": 2, "gone": 2})]
    assert free_room(hosts(2), held, own_nodes=False) == {"host0": (4, 56), "host1": HOST}
    assert free_room(hosts(2), held, own_nodes=True) == {"host0": (0, 0), "host1": HOST}


def test_the_order_is_kept_so_that_no_large_trial_waits_for_ever(tmp_path: Path) -> None:
    # 16, then 32 alone, then 8 and 8.
    mixed = [*plans(tmp_path, [16, 32]), *plans(tmp_path, [8], 2)]
    assert num_side_by_side(mixed[:2], hosts(4), "auto") == 1
    assert num_side_by_side(mixed, hosts(4), "auto") == 2


def test_the_plan_says_how_many_run_at_a_time(tmp_path: Path) -> None:
    seeds = plans(tmp_path, [8], 5)
    assert side_by_side_note(seeds, 1, hosts(4)) == side_by_side_note(seeds[:1], "auto", hosts(4)) == ""
    assert side_by_side_note(seeds, "auto", hosts(4)) == "up to 4 trials at a time"
    assert side_by_side_note(seeds, "auto", hosts(1)) == "one trial after the other: no room for two"
    assert side_by_side_note(seeds, "auto", None) == "as many trials at a time as the cluster has room for"
    shared = plans(tmp_path, [2], 5, allow_shared_nodes=True)
    assert (
        side_by_side_note(shared, 9, None)
        == "as many trials at a time as the cluster has room for, at most 5, on shared hosts"
    )


@pytest.mark.parametrize(("concurrent", "num_writing"), [("auto", 5), (2, 2), (9, 5)])
def test_each_trial_that_runs_needs_room_for_the_checkpoint_that_it_writes(
    tmp_path: Path, concurrent: object, num_writing: int
) -> None:
    def needed(**trials: Any) -> float:
        experiment = parse_experiment(tiny_experiment(trials={"seeds": [0, 1, 2, 3, 4], **trials}), "test")
        return storage_bytes(experiment, expand(experiment, Hardware(), str(tmp_path), tmp_path))

    alone, one = needed(), estimate_checkpoint_bytes(parse_experiment(tiny_experiment(), "test"))
    assert needed(concurrent=concurrent) == alone, "on one host they follow each other"
    side_by_side = needed(concurrent=concurrent, allow_shared_nodes=True)
    assert side_by_side == pytest.approx(alone + (num_writing - 1) * one)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, 2.5, "2", "Auto", "all", None, [2]])
def test_what_is_no_number_of_trials_is_refused_with_one_sentence(value: Any) -> None:
    with pytest.raises(SpecError, match=r"trials\.concurrent: a whole number from 1 on, or auto, is wanted") as error:
        parse_experiment(tiny_experiment(trials={"concurrent": value}), "test")
    assert "\n" not in str(error.value)


def test_settings_that_make_no_sense_together_are_refused() -> None:
    with pytest.raises(SpecError, match="allow_shared_nodes has no effect on one trial at a time"):
        parse_experiment(tiny_experiment(trials={"allow_shared_nodes": True}), "test")
    reserved = {"device": "cpu", "evaluation": {"cpus": 1}}
    with pytest.raises(SpecError, match=r"resources\.evaluation reserves on any host"):
        parse_experiment(tiny_experiment(trials={"concurrent": 2}, resources=reserved), "test")


class Runs:
    """Stands for trials that run: each ends when the test says so."""

    def __init__(self, room: int = 99) -> None:
        self.room = room
        self.log: list[str] = []
        self.most_live = 0
        self.live: set[str] = set()
        self.may_end = {f"t{number}": threading.Event() for number in range(5)}
        self.outcomes: dict[str, BaseException] = {}
        self.failure: RunFolderError | None = None
        self.unwritable = False
        self.gave_up = threading.Event()

    def run(self, trial: TrialPlan) -> TrialEnded:
        self.live.add(trial.name)
        self.log.append(f"start {trial.name}")
        self.most_live = max(self.most_live, len(self.live))
        assert self.may_end[trial.name].wait(600)
        self.live.discard(trial.name)
        if error := self.outcomes.get(trial.name):
            raise error
        return TrialEnded(trial=trial.name, attempt=0, rank=-1, time=0.0, status="FINISHED", reason="")

    def fits(self, trial: TrialPlan, live: Collection[str]) -> bool:
        return len(live) < self.room

    def ended(self, trial: TrialPlan, event: TrialEnded) -> None:
        self.log.append(f"end {trial.name}")
        if self.unwritable:
            raise RunFolderError("the folder cannot be written")

    def give_up(self, error: RunFolderError) -> None:
        self.failure = error
        for may_end in self.may_end.values():
            may_end.set()

    def calls(self) -> Calls:
        return Calls(self.run, self.fits, self.ended, self.give_up)


def made_plans(number: int) -> list[TrialPlan]:
    return [plan(name=f"t{each}") for each in range(number)]


@pytest.mark.parametrize(("most", "room", "expected"), [(1, 99, 1), (2, 99, 2), (99, 3, 3), (99, 0, 1)])
def test_as_many_trials_are_under_way_as_may_and_as_fit(most: int, room: int, expected: int) -> None:
    runs = Runs(room)

    def end_one() -> None:
        for number in range(5):
            while f"start t{number}" not in runs.log or (
                len(runs.live) < min(expected, 5 - number) and sum(line.startswith("start") for line in runs.log) < 5
            ):
                threading.Event().wait(0.001)
            runs.may_end[f"t{number}"].set()

    helper = threading.Thread(target=end_one)
    helper.start()
    run_side_by_side(made_plans(5), most, runs.calls(), StopRequest(60))
    helper.join()
    assert [line for line in runs.log if line.startswith("start")] == [f"start t{number}" for number in range(5)]
    assert sum(line.startswith("end") for line in runs.log) == 5
    assert runs.most_live == expected


def test_after_a_signal_no_other_trial_is_started() -> None:
    runs, stop = Runs(), StopRequest(60)
    stop._on_signal(2, None)
    run_side_by_side(made_plans(2), 2, runs.calls(), stop)
    assert runs.log == []


@pytest.mark.parametrize("in_results", [False, True])
def test_a_folder_that_cannot_be_written_ends_all_trials_and_starts_no_other(in_results: bool) -> None:
    runs, error = Runs(), RunFolderError("the folder cannot be written")
    runs.unwritable = in_results
    runs.outcomes = {} if in_results else {"t0": error}
    runs.may_end["t0"].set()
    with pytest.raises(RunFolderError):
        run_side_by_side(made_plans(3), 2, runs.calls(), StopRequest(60))
    assert runs.failure is not None and not runs.live
    assert "start t2" not in runs.log, "the others had ended before the error was raised"


def test_what_else_goes_wrong_in_the_driver_is_raised_at_once() -> None:
    runs = Runs()
    runs.outcomes = {"t0": KeyError("a cluster that is lost, or an error of this program")}
    runs.may_end["t0"].set()
    with pytest.raises(KeyError):
        run_side_by_side(made_plans(2), 2, runs.calls(), StopRequest(60))
    runs.give_up(RunFolderError(""))


def test_events_of_many_threads_are_whole_lines_and_reach_one_listener_at_a_time(tmp_path: Path) -> None:
    inside, most, seen = [0], [0], list[Event]()

    def listener(event: Event) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        seen.append(event)
        inside[0] -= 1

    log = EventLog(Outbox(tmp_path / "events.jsonl"), [listener])
    ended = [
        TrialEnded(trial=f"t{n}", attempt=0, rank=-1, time=1.0, status="FINISHED", reason="x" * 500) for n in "abc"
    ]
    threads = [threading.Thread(target=lambda e=e: [log.emit(e, e) for _ in range(20)]) for e in ended]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(lines) == 120 and all(json.loads(line)["kind"] == "trial_ended" for line in lines)
    assert most == [1] and [event.to_json() for event in seen] == lines == [event.to_json() for event in log.events]
    log.give_up(RunFolderError("results.json cannot be written"))
    with pytest.raises(RunFolderError):
        log.emit(ended[0])


def started(at: float) -> RunStarted:
    return RunStarted(trial="", attempt=0, rank=-1, time=1_700_000_000.0 + at, experiment={}, run_id="r", tags={})


def one(name: str, begin: float, end: float, *hosts: str, epoch: float = 1_700_000_000.0) -> TrialBuilder:
    made = TrialBuilder(plan(name=name), epoch)
    made.started(begin)
    made.workers(begin + 1, hosts=hosts or ("a", "a"))
    made.ended(end)
    return made


def test_the_record_names_the_trials_that_ran_at_the_same_time_and_the_hosts_they_shared() -> None:
    first, second, third = one("t0", 0, 100, "a", "b"), one("t1", 50, 150, "b", "c"), one("t2", 100, 200, "a", "a")
    events = [started(-1), *first.events, *second.events, *third.events]

    def result(made: TrialBuilder, known: list[Event] = events) -> TrialResult:
        return with_neighbours(trial_result(made.trial, made.events), known)

    assert (result(first).ran_with, result(first).shared_hosts) == (["t1"], ["b"])
    assert (result(second).ran_with, result(second).shared_hosts) == (["t0", "t2"], ["b"])
    assert (result(third).ran_with, result(third).shared_hosts) == (["t1"], [])
    assert "ran at the same time as t1, and shared b with others" in result(first).notes[-1]
    assert result(third).notes[-1] == "ran at the same time as t1"
    alone = result(first, [started(-1), *first.events, *third.events])
    assert (alone.ran_with, alone.shared_hosts) == ([], []) and "same time" not in str(alone.notes)
    assert trial_result(first.trial, first.events).ran_with is None, "not known without the run's events"
    # While t1 is under way, and its end not known yet.
    assert result(first, [*first.events, *second.events[:2]]).ran_with == ["t1"]


def test_trials_of_another_start_of_the_run_did_not_run_at_the_same_time() -> None:
    lost = one("t0", 0, 100)
    lost.events.pop()  # its driver was lost
    lost.attempt = 0
    lost.restarted(300, 4)
    lost.ended(400)
    other = one("t1", 210, 290)
    events = [started(-1), *lost.events[:3], started(200), *other.events, *lost.events[3:]]
    assert with_neighbours(trial_result(other.trial, other.events), events).ran_with == []
    assert with_neighbours(trial_result(lost.trial, lost.events), events).ran_with == []


def test_a_line_that_is_lost_while_several_trials_run_may_be_any_one_s(tmp_path: Path) -> None:
    first, second = one("t0", 0, 30), one("t1", 1, 50)
    lines = [event.to_json() for event in (*first.events[:2], *second.events[:2])]
    lines += ["{torn", first.events[-1].to_json(), "{torn", second.events[-1].to_json()]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    assert Outbox(tmp_path / "events.jsonl").damage() == {"t0": (lines.index("{torn") + 1,), "t1": (5, 7)}
