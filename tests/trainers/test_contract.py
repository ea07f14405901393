"""What crosses the process boundary: targets, and events of this version and of older ones."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from trainers.contract.events import LoopFinished, StepsDone, WorkerStarted, event_from_json
from trainers.contract.targets import all_met, class_names, is_met, metric_rating

WORKER = WorkerStarted(
    trial="t", attempt=0, rank=0, time=1.0, host="h", node_id="", pid=7, local_rank=0, device_name="CPU",
    device_memory_gib=None, versions={"torch": "2"}, world_size=2,
)  # fmt: skip
STEPS = StepsDone(
    trial="t", attempt=0, rank=0, time=2.0, first_iteration=0, iteration=2, num_images=4, seconds=3.0,
    step_seconds=(1.0, 2.0), data_seconds=(0.5, 0.5), part_seconds={"data": 1.0}, losses={"total_loss": 2.5},
    learning_rate=None, peak_memory_gib=None, step_part_seconds={"forward": (0.1, 0.2)},
)  # fmt: skip


@pytest.mark.parametrize(
    ("ap", "target", "met"),
    [(37.7, 37.7, True), (37.6, 37.7, False), (None, 0.0, False), (math.nan, 0.0, False), (0.0, 0.0, True),
     (50.0, None, None), (None, None, None)],
)  # fmt: skip
def test_an_ap_that_was_not_measured_meets_no_target(ap: float | None, target: float | None, met: bool | None) -> None:
    assert is_met(ap, target) is met


@pytest.mark.parametrize(
    ("figures", "box", "mask", "met"),
    [
        ({"box_ap": 40.0, "mask_ap": 30.0}, 37.7, 33.9, False),
        ({"box_ap": 40.0, "mask_ap": 34.0}, 37.7, 33.9, True),
        ({"box_ap": 40.0}, 37.7, 33.9, False),
        ({"box_ap": 40.0}, 37.7, None, True),
        ({"box_ap": 40.0}, None, None, None),
    ],
)
def test_all_targets_that_are_set_must_be_met(
    figures: dict[str, float | None], box: float | None, mask: float | None, met: bool | None
) -> None:
    evaluation = SimpleNamespace(figures=figures, class_ap={}, validation_losses={})
    targets = SimpleNamespace(target_box_ap=box, target_mask_ap=mask, metric="box_ap", target=None)
    assert all_met(evaluation, targets) is met


@pytest.mark.parametrize(
    ("metric", "target", "met"),
    [("box_ap/cat", 30.0, True), ("box_ap/cat", 31.0, False), ("box_ap/a/b", 1.0, False), ("mask_ap", 0.0, False),
     ("box_ap50", 50.0, True), ("validation_loss", 1.5, True), ("validation_loss", 1.4, False)],
)  # fmt: skip
def test_a_target_is_for_any_metric_and_a_loss_has_to_get_down_to_it(metric: str, target: float, met: bool) -> None:
    evaluation = SimpleNamespace(
        figures={"box_ap": 10.0, "box_ap50": 50.0}, class_ap={"box_ap/cat": 30.0, "box_ap/a/b": None},
        validation_losses={"total_loss": 1.5},
    )  # fmt: skip
    targets = SimpleNamespace(target_box_ap=None, target_mask_ap=None, metric=metric, target=target)
    assert all_met(evaluation, targets) is met
    assert all_met(evaluation, SimpleNamespace(**{**vars(targets), "target_box_ap": 11.0})) is False
    assert metric_rating(evaluation, "validation_loss") == -1.5 and metric_rating(evaluation, "box_ap/cat") == 30.0


def test_classes_of_one_name_are_told_apart() -> None:
    assert class_names({1: "cat", 2: "dog", 7: "cat"}) == {1: "cat (1)", 2: "dog", 7: "cat (7)"}


@pytest.mark.parametrize("event", [WORKER, STEPS])
def test_an_event_is_read_back_as_it_was_written(event: WorkerStarted | StepsDone) -> None:
    assert event_from_json(event.to_json()) == event


def test_values_that_older_versions_wrote_for_not_known_are_read_as_none() -> None:
    worker = event_from_json(json.dumps({**json.loads(WORKER.to_json()), "world_size": 0}))
    assert isinstance(worker, WorkerStarted) and worker.world_size is None
    before_that = {key: value for key, value in json.loads(WORKER.to_json()).items() if key != "world_size"}
    worker = event_from_json(json.dumps(before_that))
    assert isinstance(worker, WorkerStarted) and worker.world_size is None
    steps = event_from_json(json.dumps({**json.loads(STEPS.to_json()), "peak_memory_gib": 0.0}))
    assert isinstance(steps, StepsDone) and steps.peak_memory_gib is None
    end = '{"kind":"loop_finished","trial":"t","attempt":0,"rank":0,"time":9.0,"iteration":2,"reason":"max_iter"'
    finished = event_from_json(end + ',"state_sha256":""}')
    assert isinstance(finished, LoopFinished) and finished.state_sha256 is None


def test_a_number_that_is_no_number_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        StepsDone(**{**vars(STEPS), "losses": {"total_loss": math.nan}}).to_json()
