"""An events file that was cut or damaged: what is missing is named, and what is left is tracked, each row once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from mlflow.tracking import MlflowClient

from orchestrator.figures.causes import lost_events
from orchestrator.figures.goodput import measured_mtbf_hours
from orchestrator.figures.trial import trial_result
from orchestrator.report.drawing import ReportInput
from orchestrator.report.timings import timeline
from orchestrator.runlog.folder import TrialEvents
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from orchestrator.tracking.driver import Tracker
from tests.builders.metric_rows import repeated_points
from tests.builders.run_folder import made_experiment, make_run
from tests.builders.trials import TrialBuilder, plan, trained
from trainers.contract.events import (
    Event,
    EventsLost,
    LogReplayed,
    StepsDone,
    TrialEnded,
    TrialRestarted,
    TrialStarted,
    event_from_json,
)


def resumed(first: int) -> TrialBuilder:
    """Trains 4 iterations, loses its driver, and goes on from an iteration up to 8."""
    made = TrialBuilder(plan())
    made.started()
    made.workers(10.0)
    made.loop(14.0)
    for rank in (0, 1):
        made.steps(18.0, 0, 1.0, 1.0, 1.0, 1.0, rank=rank)
    made.restarted(30.0, 4)
    made.workers(40.0)
    made.loop(44.0, first)
    for rank in (0, 1):
        made.steps(45.0, first, *(8 - first) * [1.0], rank=rank)
    made.evaluated(47.0, 8, 55.0, 46.0)
    made.finished(48.0, 8)
    made.ended(50.0)
    return made


def test_a_log_that_lacks_nothing_has_no_such_note() -> None:
    assert lost_events(trained().events, 4) == []
    assert lost_events(resumed(4).events, 4) == lost_events(resumed(2).events, 4) == []


def test_a_start_from_a_checkpoint_that_is_newer_than_the_log_is_a_gap() -> None:
    made = resumed(6)
    (note,) = trial_result(made.trial, made.events).notes
    assert note.startswith("the events of iterations 5 to 6 are not in events.jsonl")
    (note,) = lost_events(made.events, 2)
    assert "; so are the evaluations after 6:" in note


def test_what_is_missing_in_the_middle_and_at_the_end_is_found_too() -> None:
    events = trained().events
    windows = [e for e in events if isinstance(e, StepsDone)]
    (note,) = lost_events([e for e in events if e not in windows[:2]], 4)
    assert note.startswith("the events of iterations 1 to 4")
    (note,) = lost_events([e for e in events if e is not windows[1]], 4)
    assert note.startswith("the events of iterations 1 to 4"), "of one rank alone"
    (note,) = lost_events([e for e in events if e not in windows[2:]], 4)
    assert note.startswith("the events of iterations 5 to 8")


def test_lines_that_cannot_be_read_are_a_note_once() -> None:
    made = trained()
    for _ in range(2):
        made.events.append(EventsLost(trial=made.trial.name, attempt=0, rank=-1, time=0.0, lines=(7, 9)))
    notes = trial_result(made.trial, made.events).notes
    assert notes == ["2 lines (7, 9) of events.jsonl cannot be read: what it held is missing"]


def test_a_trial_whose_start_is_lost_has_no_figure_from_its_start() -> None:
    """Its resumption reports the start again."""
    made = resumed(4)
    (start,) = [event for event in made.events if isinstance(event, TrialStarted)]
    restart = next(number for number, event in enumerate(made.events) if isinstance(event, TrialRestarted))
    again = replace(start, attempt=1, time=made.events[restart].time)
    events = [*made.events[1:restart], again, *made.events[restart:]]
    result = trial_result(made.trial, events)
    assert (result.sections, result.startup_seconds, result.goodput, result.ettr) == (None, None, None, None)
    assert result.downtime_seconds == trial_result(made.trial, made.events).downtime_seconds
    assert measured_mtbf_hours(made.events) == pytest.approx(50 / 3600)
    assert measured_mtbf_hours(events) is None
    figure = timeline(ReportInput({}, [TrialEvents("made", result, events, made.trial, Path())]))
    assert isinstance(figure, Figure)
    bars = [path.get_extents().x0 for bars in figure.axes[0].collections for path in bars.get_paths()]
    assert min(bars) == 0, "the timeline begins with what is known"


def test_a_replayed_log_does_not_hold_every_window_and_lacks_nothing() -> None:
    made = resumed(6)
    made.emit(LogReplayed, 0.0, step_seconds=None, step_iterations=None, total_seconds=None, unknown=(), notes=())
    assert lost_events(made.events, 4) == []


@given(st.data())
def test_figures_can_be_made_whatever_is_missing(data: st.DataObject) -> None:
    made = resumed(4)
    kept = data.draw(st.lists(st.booleans(), min_size=len(made.events) - 1, max_size=len(made.events) - 1))
    events = [event for event, keep in zip(made.events[:-1], kept, strict=True) if keep]
    assert isinstance(made.events[-1], TrialEnded)
    trial_result(made.trial, [*events, made.events[-1]])


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one trial, tracked to its end."""
    run = make_run(tmp_path_factory.mktemp("made") / "run", made_experiment(trials={"world_sizes": [1]}))
    assert Tracker(run, store(run)).sync()
    return run


def store(run: Path) -> str:
    return f"sqlite:///{run.parent / 'mlflow.db'}"


@pytest.fixture
def run(tracked: Path, tmp_path: Path) -> Path:
    shutil.copytree(tracked.parent, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    state = json.loads((run / "tracking.json").read_text())
    (run / "tracking.json").write_text(json.dumps({**state, "place": store(run)}))
    return run


def rows(run: Path) -> Counter[tuple[str, str, int]]:
    client = MlflowClient(store(run))
    found = Counter[tuple[str, str, int]]()
    for id in Tracker(run, store(run)).run_ids().values():
        for name in client.get_run(id).data.metrics:
            found.update((id, name, point.step) for point in client.get_metric_history(id, name))
    return found


def cut(run: Path, share: float, tail: bytes = b"") -> list[str]:
    """Cuts the log at a share of it, in the middle of a line; returns the lines that are lost."""
    content = (run / FILE_NAME).read_bytes()
    size = int(len(content) * share)
    (run / FILE_NAME).write_bytes(content[:size] + tail)
    return content[content.rfind(b"\n", 0, size) + 1 :].decode().splitlines()


def go_on(run: Path, lines: list[str], later: float) -> None:
    """Writes the events of what is trained again, at other times than before."""
    for line in lines:
        values = json.loads(line)
        Outbox(run / FILE_NAME).append(*[_at(values, later)])


def _at(values: dict[str, Any], later: float) -> Event:
    return event_from_json(json.dumps({**values, "time": values["time"] + later}))


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_log_that_was_cut_is_tracked_from_its_start_and_no_row_comes_twice(run: Path, share: float) -> None:
    before = rows(run)
    assert set(before.values()) == {1}
    lost = cut(run, share)
    assert lost
    go_on(run, lost, later=3600.0)
    assert Tracker(run, store(run)).sync(), "its end is tracked"
    after = rows(run)
    assert set(after.values()) == {1} and not before - after
    new = {(name, step) for _, name, step in after - before}
    ends = {name for name, _ in new}
    assert len(new) == len(ends), "the second end of the trial has one more point of each of its figures"
    assert not any(name.startswith(("loss/", "coco/box", "time/window")) for name in ends)
    (state,) = [json.loads((run / "tracking.json").read_text())]
    assert state["offset"] == (run / FILE_NAME).stat().st_size


def test_the_model_of_a_log_that_was_cut_has_the_points_of_its_run(tmp_path: Path) -> None:
    experiment = made_experiment(
        trials={"world_sizes": [1]}, storage={"checkpoint_period_iterations": 60}, tracking={"log_model": True}
    )
    run = make_run(tmp_path / "run", experiment)
    lines = (run / FILE_NAME).read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if '"evaluated"' in line and '"iteration":240' in line)
    (run / FILE_NAME).write_text("\n".join(lines[: first + 1]) + "\n")
    assert not Tracker(run, store(run)).sync()
    (run / FILE_NAME).write_text("\n".join(lines[:first]) + "\n")
    # On a GPU, another evaluation has not exactly the same AP.
    go_on(run, [line.replace('"box_ap":', '"box_ap":1') for line in lines[first:]], later=3600.0)
    assert Tracker(run, store(run)).sync()
    assert repeated_points(tmp_path / "mlflow.db") == []
    client, id = MlflowClient(store(run)), Tracker(run, store(run)).run_ids()["reference-1xcpu"]
    (model,) = client.search_logged_models(["1"])
    points = {name: client.get_metric_history(id, name)[-1] for name in ("coco/box_ap", "coco/mask_ap")}
    assert {metric.key: (metric.value, metric.timestamp, metric.step) for metric in model.metrics or ()} == {
        name: (point.value, point.timestamp, 240) for name, point in points.items()
    }


def test_a_log_that_lost_lines_in_its_middle_changes_no_row(run: Path) -> None:
    before, lines = rows(run), (run / FILE_NAME).read_text().splitlines(keepends=True)
    windows = [number for number, line in enumerate(lines) if '"steps_done"' in line]
    del lines[windows[len(windows) // 2] : windows[-1]]
    (run / FILE_NAME).write_text("".join(lines))
    assert Tracker(run, store(run)).sync()
    assert rows(run) == before


def test_an_offset_that_is_past_the_end_or_in_a_line_is_no_offset(run: Path) -> None:
    before = rows(run)
    state = json.loads((run / "tracking.json").read_text())
    for offset in (10**9, 17):
        (run / "tracking.json").write_text(json.dumps({**state, "offset": offset}))
        assert Tracker(run, store(run)).sync()
        assert json.loads((run / "tracking.json").read_text())["offset"] == state["offset"]
    assert rows(run) == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"place": 1}', "\0\0"])
def test_a_state_of_tracking_that_is_damaged_is_made_again(run: Path, content: str) -> None:
    before = rows(run)
    ids = Tracker(run, store(run)).run_ids()
    (run / "tracking.json").write_text(content)
    assert Tracker(run, store(run)).sync()
    assert Tracker(run, store(run)).run_ids() == ids and rows(run) == before


def test_a_trial_whose_start_is_lost_does_not_keep_the_rest_from_being_tracked(run: Path) -> None:
    lines = (run / FILE_NAME).read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if b'"trial_started"' not in line]
    assert len(kept) == len(lines) - 1
    (run / FILE_NAME).write_bytes(b"".join(kept))
    assert Tracker(run, store(run)).sync()
