"""What a trial's record has of workers that wait for a failure where that is decided without a cluster."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from orchestrator.execution import standby
from orchestrator.experiment.spec import Faults
from tests.builders.trials import plan
from tests.builders.waiting import wait_for
from trainers.contract.events import StandbyLost


@pytest.mark.parametrize(("stopped", "lost"), [(True, []), (False, [StandbyLost])], ids=["stopped", "no answer"])
def test_workers_that_a_stop_finds_taking_over_are_not_reported_as_lost(
    stopped: bool, lost: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    emitted: list[type] = []
    ended: list[bool] = []
    timeouts = {**plan().timeouts, "heartbeat": 60.0 if stopped else 0.0}
    waiting: Any = SimpleNamespace(
        plan=plan(timeouts=timeouts),
        nodes=None,
        reserve=lambda: SimpleNamespace(ready=object),
        wait=lambda _: False,
        end=lambda: ended.append(True),
    )
    monkeypatch.setattr(standby, "lost_nodes", set)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout, **_: (time.sleep(timeout), ([], refs))[1])
    group = standby.Standby(Faults(standby=True), "", lambda kind, **_: emitted.append(kind))
    group._group, group._gate = waiting, SimpleNamespace(call=SimpleNamespace(remote=object))
    assert group.take_over(plan(), 1, None, lambda: not stopped) is None
    assert emitted == lost
    wait_for(lambda: ended == [True])


@pytest.mark.parametrize(("starting", "lost"), [(True, []), (False, [StandbyLost])], ids=["starting", "silent"])
def test_workers_that_still_start_may_take_as_long_as_a_start(
    starting: bool, lost: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    emitted: list[type] = []
    room, answer, looks = object(), object(), iter([True, True, True, False])
    waiting: Any = SimpleNamespace(
        plan=plan(timeouts={**plan().timeouts, "heartbeat": 0.0, "setup": 60.0}),
        nodes=None,
        reserve=lambda: SimpleNamespace(ready=lambda: room),
        wait=lambda _: False,
        end=lambda: None,
    )
    monkeypatch.setattr(standby, "lost_nodes", set)
    monkeypatch.setattr(ray, "wait", lambda *_, **__: ([room], [answer]))
    group = standby.Standby(Faults(standby=True), "", lambda kind, **_: emitted.append(kind))
    group._group, group._gate = waiting, SimpleNamespace(call=SimpleNamespace(remote=lambda: answer))
    group._ready = object() if starting else None
    assert group.take_over(plan(), 1, None, lambda: next(looks)) is None
    assert emitted == lost
