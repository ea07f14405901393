"""The iterations and figures of metrics.json, as detectron2's writer means them."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.replay.record import Replayed, replay
from orchestrator.replay.unpacking import ReplayError

NAN = float("nan")


def _line(iteration: int, **figures: float) -> dict[str, float]:
    """A line of training steps; `figures` with __ for their /."""
    return {"iteration": iteration, "total_loss": 1.5, "lr": 0.01} | _named(figures)


def _alone(iteration: int, **figures: float) -> dict[str, float]:
    """A line of an evaluation alone."""
    return {"iteration": iteration} | _named(figures)


def _named(figures: dict[str, float]) -> dict[str, float]:
    return {name.replace("__", "/"): value for name, value in figures.items()}


def _read_all(folder: Path, *lines: dict[str, float] | str) -> list[Replayed]:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metrics.json").write_text("\n".join(texts) + "\n")
    return replay([folder])


def _read(folder: Path, *lines: dict[str, float] | str) -> Any:
    (one,) = _read_all(folder, *lines)
    return one.result


def _aps(result: Any) -> list[tuple[int, float | None]]:
    return [(e.iteration, e.box_ap) for e in result.evaluations]


def test_an_evaluation_is_at_the_iteration_of_its_line(tmp_path):
    result = _read(tmp_path, _line(19), _line(39, bbox__AP=10.0), _line(59), _line(79))
    assert _aps(result) == [(40, 10.0)]
    assert not any("is known to" in note for note in result.notes)


def test_an_evaluation_between_two_writes_is_at_its_own_iteration(tmp_path):
    lines = [_line(19), _line(39), _alone(29, bbox__AP=10.0), _line(59, bbox__AP=20.0), _line(79)]
    result = _read(tmp_path, *lines)
    assert _aps(result) == [(30, 10.0), (60, 20.0)] and result.num_restarts == 0


def test_the_evaluation_after_training_is_at_the_last_iteration_and_shows_the_end(tmp_path):
    result = _read(tmp_path, _line(19), _line(39, bbox__AP=10.0), _alone(40, bbox__AP=11.0))
    assert _aps(result) == [(40, 10.0), (40, 11.0)]
    assert (result.iterations, result.status, result.box_ap) == (40, "FINISHED", 11.0)


def test_figures_that_old_versions_repeat_are_one_evaluation(tmp_path):
    old = [_line(39, bbox__AP=10.0), _line(59, bbox__AP=10.0), _line(79, bbox__AP=20.0), _line(99, bbox__AP=20.0)]
    result = _read(tmp_path, _line(19), *old)
    assert _aps(result) == [(40, 10.0), (80, 20.0)]
    assert any("repeat the figures of the line before" in note for note in result.notes)


def test_a_resumed_run_is_one_run_with_a_restart(tmp_path):
    first = [_line(19), _line(39, bbox__AP=10.0), _line(59), _line(79, bbox__AP=20.0), _line(99)]
    result = _read(tmp_path, *first, _line(79, bbox__AP=22.0), _line(99), _line(119, bbox__AP=30.0))
    assert _aps(result) == [(40, 10.0), (80, 20.0), (120, 30.0)]
    assert (result.num_restarts, result.iterations) == (1, 120)


def test_runs_one_after_the_other_are_separate_trials(tmp_path):
    run = [_line(19), _line(39, bbox__AP=10.0), _alone(40, bbox__AP=11.0)]
    first, second = _read_all(tmp_path, *run, *run)
    assert _aps(first.result) == _aps(second.result) == [(40, 10.0), (40, 11.0)]
    assert any("holds 2 runs" in note for note in second.result.notes)


@pytest.mark.parametrize("value", [-1.0, NAN, float("inf")])
def test_what_is_no_ap_is_not_measured(tmp_path, value):
    result = _read(tmp_path, _line(19), _line(39, bbox__AP=value, bbox__AP50=value), _line(59))
    assert _aps(result) == [(40, None)] and result.box_ap is None
    assert any("the model found nothing at iteration 40" in note for note in result.notes)


def test_lines_that_are_cut_are_left_out_and_counted(tmp_path):
    cut = '{"iteration": 59, "bbox/AP": 3'
    result = _read(tmp_path, 'ion": 9, "lr": 1}', _line(19), cut + json.dumps(_line(39, bbox__AP=10.0)), cut)
    assert _aps(result) == [(40, 10.0)] and result.iterations == 40
    assert any("2 lines that are cut off" in note for note in result.notes)


def test_masks_keypoints_and_classes_are_told_apart(tmp_path):
    figures = {"bbox__AP": 10.0, "segm__AP": 9.0, "keypoints__AP": 8.0, "bbox__AP-cat": 3.0, "segm__AP-a/b": 4.0}
    (evaluation,) = _read(tmp_path, _line(19), _line(39, **figures)).evaluations
    assert evaluation.figures == {"box_ap": 10.0, "mask_ap": 9.0, "keypoint_ap": 8.0}


def test_of_several_data_sets_the_first_is_shown(tmp_path):
    result = _read(tmp_path, _line(19), _line(39, a_val__bbox__AP=10.0, b_val__bbox__AP=20.0))
    assert _aps(result) == [(40, 10.0)]
    assert "evaluations on b_val were left out: those on a_val are shown" in result.notes


def test_losses_of_a_validation_hook_are_no_restart(tmp_path):
    result = _read(tmp_path, _line(19), _line(39), _alone(29, val_loss=3.0), _line(59, bbox__AP=10.0))
    assert _aps(result) == [(60, 10.0)] and result.num_restarts == 0


def test_iterations_numbered_from_one_are_not_moved(tmp_path):
    assert _aps(_read(tmp_path, _line(20), _line(40, bbox__AP=10.0), _line(60), _line(65))) == [(40, 10.0)]


@pytest.mark.parametrize("name", ["metrics.json", "metrics.txt", "copy.jsonl"])
def test_the_format_is_found_by_the_content(tmp_path, name):
    lines = [_line(19), _line(39, bbox__AP=10.0)]
    (tmp_path / name).write_bytes(json.dumps(lines, indent=1).encode("utf-16"))
    (one,) = replay([tmp_path / name])
    assert _aps(one.result) == [(40, 10.0)]


def test_json_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ReplayError, match="no line with an iteration and a loss"):
        _read(tmp_path, {"iteration": 3, "epoch": 4})
