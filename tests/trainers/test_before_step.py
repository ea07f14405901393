"""A function of the benchmark's choosing is called before every step, and before nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.builders.training import plan_of
from trainers.contract.channel import Channel, Placement
from trainers.contract.events import Event, StepsDone
from trainers.rank import Rank
from trainers.worker import BEFORE_STEP_VARIABLE, before_step

calls: list[str] = []


def made_for_a_rank() -> Callable[[], None]:
    return lambda: calls.append("step")


def test_nothing_is_called_where_the_environment_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BEFORE_STEP_VARIABLE, raising=False)
    calls.clear()
    before_step()()
    assert calls == []


def test_the_environment_names_what_makes_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BEFORE_STEP_VARIABLE, f"{__name__}:made_for_a_rank")
    calls.clear()
    function = before_step()
    assert calls == []
    function()
    assert calls == ["step"]


@pytest.mark.train
def test_it_is_called_once_before_every_step(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "mask_rcnn")
    plan = dataclasses.replace(
        plan, solver=dataclasses.replace(plan.solver, max_iter=3, eval_period=0, evaluate_at_end=False)
    )
    steps: list[int] = []
    events: list[Event] = []
    rank: Rank

    def note() -> None:
        steps.append(rank.activity.iteration)

    channel = Channel(push=events.append, beat=lambda _: "run")
    rank = Rank(plan, 0, Placement(0, 1, 0, 1, "here"), channel, note)
    rank.train(0.0)
    assert steps == [0, 1, 2]
    assert [event for event in events if isinstance(event, StepsDone)][-1].iteration == 3
