"""Who is blamed when nothing goes on."""

from __future__ import annotations

from orchestrator.execution.event_pump import HeartbeatSample
from orchestrator.execution.watchdog import Stuck, Watchdog
from trainers.contract.events import Heartbeat, Section

TIMEOUTS = {"setup": 60.0, "step": 10.0, "evaluation": 30.0, "checkpoint": 20.0, "report": 10.0, "heartbeat": 5.0}


def sample(rank: int, section: Section, part: str, iteration: int, since: float, at: float = 100.0) -> HeartbeatSample:
    """A heartbeat that was received at `at` from a host whose clock is an hour ahead."""
    beat = Heartbeat(
        trial="t",
        attempt=0,
        rank=rank,
        time=at + 3600,
        section=section,
        part=part,
        iteration=iteration,
        since=since + 3600,
    )
    return HeartbeatSample(beat, at)


def verdict(*samples: HeartbeatSample, now: float = 100.0, world_size: int = 2, started: float = 90.0) -> list[Stuck]:
    watchdog = Watchdog(TIMEOUTS, world_size, started)
    by_rank = {one.heartbeat.rank: one for one in samples}
    assert watchdog.look(by_rank, now) == [], "nothing is certain at the first look"
    return watchdog.look(by_rank, now + 2.5)


def test_the_rank_that_the_others_wait_for_is_blamed() -> None:
    found = verdict(sample(0, "step", "backward", 7, since=85), sample(1, "step", "forward", 7, since=85))
    assert [one.rank for one in found] == [1]
    assert found[0].message == "step (forward) of iteration 7 has taken 18 s"
    assert found[0].began == 85, "on the driver's clock"


def test_a_rank_that_waits_at_the_end_of_a_window_is_not_blamed() -> None:
    found = verdict(sample(0, "report", "", 9, since=80), sample(1, "step", "data", 8, since=95))
    assert [one.rank for one in found] == [1]


def test_a_rank_that_has_gone_on_to_the_next_step_is_not_blamed() -> None:
    found = verdict(sample(0, "step", "backward", 9, since=80), sample(1, "checkpoint", "", 9, since=95))
    assert [one.rank for one in found] == [1]


def test_a_process_without_a_sign_of_life_is_blamed_before_those_that_wait_for_it() -> None:
    found = verdict(sample(0, "step", "backward", 7, since=80), sample(1, "step", "optimizer", 7, since=94, at=94))
    assert [one.rank for one in found] == [1]
    assert "no sign of life" in found[0].message and found[0].began == 94


def test_a_long_evaluation_is_not_a_long_step() -> None:
    assert verdict(sample(0, "evaluation", "", 9, since=75), sample(1, "evaluation", "", 9, since=75)) == []


def test_a_rank_that_never_came_is_blamed_after_the_time_for_setting_up() -> None:
    assert verdict(sample(0, "setup", "", 0, since=95), started=50) == []
    found = verdict(sample(0, "setup", "", 0, since=95), started=30)
    assert [(one.rank, one.last) for one in found] == [(1, None)]


def test_a_rank_that_has_ended_may_be_silent() -> None:
    assert verdict(sample(0, "checkpoint", "", 9, since=95), sample(1, "report", "ended", 9, since=50, at=50)) == []


def test_a_machine_that_slept_is_given_time_to_wake() -> None:
    watchdog = Watchdog(TIMEOUTS, 1, 0.0)
    assert watchdog.look({0: sample(0, "step", "data", 7, since=99)}, 5000.0) == []
    assert watchdog.look({0: sample(0, "step", "data", 7, since=5000.5, at=5001)}, 5001.0) == []
    assert watchdog.look({0: sample(0, "step", "data", 8, since=5003, at=5003.5)}, 5004.0) == []


def test_ranks_that_ended_long_ago_mean_that_ray_train_is_frozen() -> None:
    watchdog = Watchdog(TIMEOUTS, 2, 90.0)
    ended = {rank: sample(rank, "checkpoint", "ended", 9, since=94, at=95.0 + rank) for rank in (0, 1)}
    assert not watchdog.all_ended(ended, 100.9), "the last of them ended less than 5 s ago"
    assert watchdog.all_ended(ended, 101.1)
    assert watchdog.look(ended, 101.1) == [], "no rank is to blame"


def test_ray_train_is_not_frozen_while_a_rank_has_not_ended() -> None:
    watchdog = Watchdog(TIMEOUTS, 2, 90.0)
    ended = sample(1, "checkpoint", "ended", 9, since=94, at=95.0)
    assert not watchdog.all_ended({1: ended}, 500.0), "rank 0 has not begun"
    assert not watchdog.all_ended({0: sample(0, "checkpoint", "", 9, since=94, at=499.0), 1: ended}, 500.0)
    assert not Watchdog(TIMEOUTS, 1, 96.0).all_ended({1: ended}, 500.0), "these are of the attempt before"
