"""What is reported of the shapes of batches: how many, what they cost, and which steps were eager and why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.figures.trial import trial_result
from orchestrator.report.table import table_rows
from tests.builders.trials import TrialBuilder, plan
from trainers.batching import Batch, BatchTally, ShapesMet
from trainers.contract.events import event_from_json


def result_of(windows: list[tuple[int, tuple[float, ...], dict[str, Any]]], **fields: Any) -> TrialResult:
    """A trial of two workers, with windows of (rank, seconds of the steps, fields)."""
    made = TrialBuilder(plan(**fields))
    made.started()
    made.workers(1.0)
    made.loop(2.0)
    done = [0, 0]
    for rank, seconds, noted in windows:
        made.steps(10.0, done[rank], *seconds, rank=rank, **noted)
        done[rank] += len(seconds)
    made.finished(20.0, max(done), "max_iter")
    made.ended(21.0)
    events = [event_from_json(event.to_json()) for event in made.events]
    return trial_result(made.trial, events)


def test_shapes_of_all_workers_are_counted_once_and_their_seconds_are_those_of_the_slowest_worker() -> None:
    result = result_of(
        [
            (
                0,
                (3.0, 1.0, 2.0),
                {"new_shapes": {"2 x 32 x 64": 0, "2 x 64 x 32": 2}, "pixels": 60, "wasted_pixels": 6},
            ),
            (0, (1.0, 1.0), {"new_shapes": {}, "pixels": 40, "wasted_pixels": 0}),
            (1, (5.0, 1.0, 1.0), {"new_shapes": {"2 x 32 x 64": 0}, "capture_seconds": 0.5}),
        ]
    )
    assert result.num_shapes == 2
    assert result.new_shape_seconds == pytest.approx(4.0 + 0.5)  # rank 0: 2 + 1 above its median of 1
    assert result.wasted_pixel_share == pytest.approx(6 / 100)
    assert result.eager_step_share is None and result.eager_steps == {}


def test_a_step_shorter_than_the_median_saves_nothing() -> None:
    assert result_of([(0, (0.5, 1.0, 1.0), {"new_shapes": {"a": 0}})]).new_shape_seconds == 0.0


def test_eager_steps_are_reported_with_their_reasons_but_not_the_warm_up_of_a_graph() -> None:
    asked: dict[str, Any] = {"new_shapes": {}, "num_graphs": 1}
    result = result_of(
        [
            (0, (1.0,) * 4, asked | {"eager_batches": {"objects": 1}, "eager_steps": {"batch not padded": 1}}),
            (0, (1.0,) * 4, asked | {"eager_batches": {"objects": 1}, "eager_steps": {"capture failed": 1}}),
            (1, (1.0,) * 2, asked | {"eager_batches": {}, "eager_steps": {"warm-up": 2}}),
        ]
    )
    assert result.eager_steps == {"objects": 2, "capture failed": 1}
    assert result.eager_step_share == pytest.approx(3 / 10)
    assert "eager: 30.0 % of the steps had no fixed shape or CUDA graph (objects, capture failed)" in note_of(result)


def note_of(result: TrialResult) -> str:
    made = ExperimentResult(experiment="made", status="FINISHED", started="", trials=[result])
    return table_rows(made)[0].note


@pytest.mark.parametrize(("device", "noted"), [("cuda", True), ("cpu", False)])
def test_a_note_says_what_new_shapes_add_on_a_gpu(device: str, noted: bool) -> None:
    steps = (1.0,) * 9 + (3.0,)
    result = result_of([(0, steps, {"new_shapes": {"a": 0, "b": 9}})], device=device)
    assert ("2 shapes of batches added 2.0 s to its steps" in note_of(result)) == noted


def test_events_of_older_versions_have_no_figures_of_shapes() -> None:
    made = TrialBuilder(plan())
    made.steps(10.0, 0, 1.0, 1.0)
    values = json.loads(made.events[0].to_json())
    for name in ("new_shapes", "pixels", "wasted_pixels", "eager_batches"):
        del values[name]
    event = event_from_json(json.dumps(values))
    assert event == made.events[0]
    result = result_of([(0, (1.0, 1.0), {})])
    assert result.num_shapes is result.new_shape_seconds is result.wasted_pixel_share is None


def test_a_process_reports_a_shape_when_it_meets_it_first() -> None:
    def tally(*batches: Batch) -> BatchTally:
        made = BatchTally()
        for batch in batches:
            made.add(batch)
        return made

    small, large = Batch([], (), (2, 32, 64), 128), Batch([], (), (2, 64, 96), eager_reason="objects")
    met = ShapesMet(fixed=True)
    assert met.fields(tally(small, small, large)) == {
        "new_shapes": {"2 x 32 x 64": 0, "2 x 64 x 96": 2},
        "pixels": 2 * 2 * 32 * 64 + 2 * 64 * 96,
        "wasted_pixels": 2 * 128,
        "eager_batches": {"objects": 1},
        "batches_per_step": 1,
    }
    assert met.fields(tally(large))["new_shapes"] == {}
    assert ShapesMet(fixed=False).fields(tally(small))["eager_batches"] is None


def test_the_batches_of_a_step_share_its_number_and_are_counted_one_by_one() -> None:
    tally = BatchTally(per_step=2)
    for shape in ((2, 32, 64), (2, 32, 64), (2, 32, 64), (2, 64, 96)):
        tally.add(Batch([], (), shape, eager_reason="objects"))
    fields = ShapesMet(fixed=True).fields(tally)
    assert fields["new_shapes"] == {"2 x 32 x 64": 0, "2 x 64 x 96": 1}
    assert result_of([(0, (1.0, 1.0), fields), (1, (1.0, 1.0), fields)]).eager_step_share == 1.0
