"""A trial with fewer workers than planned takes more where there has been room for long enough and it is worth it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from orchestrator.execution import nodes
from orchestrator.execution.growth import POLL_INTERVAL_SECONDS, Growth
from orchestrator.execution.nodes import Node
from orchestrator.experiment.placement import smaller
from tests.builders.trials import TrialBuilder, plan
from trainers.contract.events import Event, GroupStarted, TrialRestarted
from trainers.contract.plan import TrialPlan

EPOCH = 1_700_000_000.0
PLANNED = plan(world_size=8, global_batch_size=16, max_iter=1000, min_workers=1, resize_after_seconds=20.0)
START_SECONDS = 50.0


def running(size: int) -> TrialPlan:
    return next(each for each in smaller(PLANNED) if each.world_size == size)


def trained(iterations: int, attempt: int = 0) -> list[Event]:
    """A start of 50 s of workers on two hosts, then so many steps of 1 s."""
    made = TrialBuilder(PLANNED, EPOCH)
    made.attempt = attempt
    made.workers(START_SECONDS - 1, hosts=("a", "a", "b", "b"))
    made.loop(START_SECONDS)
    if iterations:
        made.steps(START_SECONDS + iterations, 0, *[1.0] * iterations)
    return made.events


class Room:
    """So many workers have room; counts how often that was asked."""

    def __init__(self, workers: int) -> None:
        self.workers, self.asked = workers, 0
        self.own: Mapping[str, int] = {}

    def __call__(self, trial: TrialPlan, own: Mapping[str, int]) -> bool:
        self.asked, self.own = self.asked + 1, own
        return trial.world_size <= self.workers


def growth(size: int, room: Room, events: list[Event], attempt: int = 0) -> Growth:
    return Growth(PLANNED, running(size), EPOCH, attempt, lambda: events, room)


def looks(watched: Growth, *times: float) -> list[int | None]:
    return [watched.look(EPOCH + time) for time in times]


def test_it_grows_to_the_largest_size_that_has_had_room_for_long_enough() -> None:
    assert looks(growth(2, Room(4), trained(100)), 200, 202, 210, 219.9, 225) == [None, None, None, None, 4]
    assert looks(growth(2, Room(8), trained(100)), 200, 220) == [None, 8]
    assert looks(growth(4, Room(4), trained(100)), 200, 220) == [None, None]


def test_with_all_workers_nothing_is_looked_for() -> None:
    room = Room(16)
    assert Growth(PLANNED, PLANNED, EPOCH, 0, lambda: trained(100), room).look(EPOCH + 200) is None
    assert room.asked == 0


def test_the_cluster_is_not_asked_all_the_time_and_told_where_the_workers_are() -> None:
    room = Room(0)
    looks(growth(4, room, trained(100)), *(200 + POLL_INTERVAL_SECONDS * number / 10 for number in range(30)))
    assert room.asked == 3 and room.own == {"a": 2, "b": 2}


def test_room_that_comes_and_goes_does_not_count_together() -> None:
    room = Room(8)
    watched = growth(4, room, trained(100))
    assert looks(watched, 200, 210) == [None, None]
    room.workers = 0
    assert looks(watched, 216) == [None]
    room.workers = 8
    assert looks(watched, 222, 230, 241, 242) == [None, None, None, None]
    assert looks(watched, 247) == [8]


def test_each_growth_makes_the_next_wait_twice_as_long() -> None:
    made = TrialBuilder(PLANNED, EPOCH)
    for number, failure in enumerate(("resized", "worker_lost", "resized", "worker_lost")):
        made.attempt += 1
        made.emit(TrialRestarted, number, rank=-1, failure=failure, message="", iteration=0)
    events = made.events + trained(100, attempt=4)
    assert looks(growth(4, Room(8), events, 4), 200, 260, 279, 285) == [None, None, None, 8]


@pytest.mark.parametrize(
    ("iterations", "size", "grows"),
    [
        (0, 4, False),  # how long a step takes is not known
        (100, 4, True),  # 900 s are left, of which half is saved: nine starts
        (790, 4, True),  # 210 s: a little more than two starts
        (810, 4, False),
        (870, 1, True),  # 130 s, of which seven eighths are saved
        (990, 1, False),
    ],
)
def test_what_is_left_must_be_worth_a_start(iterations: int, size: int, grows: bool) -> None:
    room = Room(8)
    assert looks(growth(size, room, trained(iterations)), 2000, 2030) == [None, 8 if grows else None]
    assert room.asked == (2 if grows else 0), "it is not even asked for"


@pytest.mark.parametrize(("first_start", "grows"), [(100.0, False), (60.0, True)])
def test_a_start_costs_what_new_workers_cost_also_where_the_last_ones_had_waited(
    first_start: float, grows: bool
) -> None:
    """150 s are saved: three starts of 50 s, as long as the last one took, and fewer than two of 100 s."""
    made = TrialBuilder(PLANNED, EPOCH - 1000)
    made.emit(GroupStarted, 30, rank=-1, part_seconds={"processes": 20.0, "process_group": 10.0})
    made.loop(first_start)
    events = made.events + trained(700, attempt=1)
    assert looks(growth(4, Room(8), events, 1), 2000, 2030) == [None, 8 if grows else None]


@pytest.mark.parametrize(
    ("size", "own", "asked"),
    [
        # The host of the four that run has room for as many again; else they stay, and another host takes four.
        (8, {"a": 4}, [("a", 4)]),
        (8, {"c": 2, "d": 2}, [("!in(c,d)", 8)]),
        (4, {"c": 2}, [("!in(c,d)", 4)]),
        (4, {"c": 1, "d": 1}, [("!in(c,d)", 4)]),
        (12, {"c": 2, "a": 2}, [("a", 4), ("!in(a,c,d)", 6)]),
    ],
)
def test_what_a_larger_size_needs_besides_the_workers_that_run_is_asked_of_ray(
    monkeypatch: pytest.MonkeyPatch, size: int, own: dict[str, int], asked: list[tuple[str, int]]
) -> None:
    """Two hosts of 8 CPUs and two of 2: the larger ones are enough for what is asked here."""
    hosts = [Node(name, name, "10.0.0.1", 0, cpus) for name, cpus in (("a", 8), ("b", 8), ("c", 2), ("d", 2))]
    reserved: list[list[tuple[str, int]]] = []

    def reserve(bundles: list[dict[str, float]], selectors: list[dict[str, str]]) -> list[str]:
        reserved.append([(next(iter(s.values())), int(b["CPU"])) for b, s in zip(bundles, selectors, strict=True)])
        return ["somewhere"]

    monkeypatch.setattr(nodes, "list_nodes", lambda: hosts)
    monkeypatch.setattr(nodes, "lost_nodes", set)
    monkeypatch.setattr(nodes, "_reserve", reserve)
    assert nodes.has_room_besides(plan(world_size=size, cpus_per_worker=1), own)
    assert reserved == [asked]
    monkeypatch.setattr(nodes, "lost_nodes", lambda: {"a", "b", "d"})
    assert not nodes.has_room_besides(plan(world_size=size, cpus_per_worker=1), own)
