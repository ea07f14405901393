"""The lines of a job's log, made from events that never happened."""

import dataclasses
import io

import pytest
from rich.console import Console

from orchestrator.report import progress
from orchestrator.report.progress import ProgressDisplay
from orchestrator.report.run_eta import RunEta
from tests.builders.trials import TrialBuilder, plan, trained
from trainers.contract.events import LoopStarted, StepsDone


def _shown(events: list, quiet: bool = False) -> list[str]:
    output = io.StringIO()
    display = ProgressDisplay(Console(file=output, width=200), quiet)
    for event in events:
        display(event)
    return output.getvalue().splitlines()


@pytest.fixture(autouse=True)
def _every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)


def test_a_window_is_a_line_with_rate_and_loss() -> None:
    # 16 images in the 4.0 s of the slower worker; 4 more iterations in twice 4 s.
    assert "reference-2xcpu iteration 4/8  ETA 0:00:04  4.00 images/s  loss 1.000" in _shown(trained().events)


def test_what_was_not_measured_is_not_shown_as_zero() -> None:
    builder = trained()
    unknown = {"losses": {}, "num_images": None, "learning_rate": None, "peak_memory_gib": None}
    events = [dataclasses.replace(e, **unknown) if isinstance(e, StepsDone) else e for e in builder.events]
    counts = {"num_train_images": None, "num_val_images": None, "setup_seconds": None}
    events = [dataclasses.replace(e, **counts) if isinstance(e, LoopStarted) else e for e in events]
    lines = _shown(events)
    assert "reference-2xcpu iteration 4/8  ETA 0:00:04  – images/s" in lines
    assert "reference-2xcpu training on – images, evaluating on –; set up in – s" in lines
    assert not [line for line in lines if "loss" in line]


def test_an_evaluation_without_ap_says_so() -> None:
    builder = TrialBuilder(plan())
    builder.started()
    builder.evaluated(20.0, 4, None, None)
    assert _shown(builder.events)[-1] == "reference-2xcpu evaluation at 4: no AP (2.0 s)"


def test_an_evaluation_says_how_far_its_targets_are() -> None:
    lines = _shown(trained().events)
    first = "box AP 51.00, target 50 met; mask AP 40.00, target 45 5.00 away (2.0 s)"
    assert f"reference-2xcpu evaluation at 4: {first}" in lines
    second = "box AP 55.00 (+4.00), target 50 met; mask AP 46.00 (+6.00), target 45 met (2.0 s)"
    assert f"reference-2xcpu evaluation at 8: {second}" in lines


def test_quiet_shows_failures_only() -> None:
    builder = trained()
    builder.ended(30.0, "FAILED", "no such data")
    assert _shown(builder.events, quiet=True) == ["reference-2xcpu failed: no such data"]


def test_figures_of_averaged_weights_and_an_early_end_are_shown() -> None:
    builder = trained(patience=1)
    builder.evaluated(29.0, 12, 55.0, None)
    figures = {"box_ap": 55.0, "ema_box_ap": 56.25, "ema_mask_ap": 50.5}
    evaluation = dataclasses.replace(builder.events[-1], figures=figures)
    ended = dataclasses.replace(builder.events[-2], reason="stopped by protocol.patience: …")
    lines = _shown([builder.events[0], evaluation, ended])
    assert any("of averaged weights box AP 56.25, mask AP 50.50" in line for line in lines)
    assert lines[-1].endswith("ended early: stopped by protocol.patience: …")


def test_the_metric_is_shown_with_its_target() -> None:
    builder = TrialBuilder(plan(target_box_ap=None, target_mask_ap=None, metric="validation_loss", target=1.25))
    builder.started()
    for at, total in ((20.0, 1.5), (30.0, 1.25)):
        builder.evaluated(at, int(at), 55.0, None)
        builder.events[-1] = dataclasses.replace(builder.events[-1], validation_losses={"total_loss": total})
    lines = _shown(builder.events)
    assert lines[-2].endswith("box AP 55.00; validation_loss 1.50, target 1.25 0.25 away (2.0 s)")
    assert lines[-1].endswith("validation_loss 1.25, target 1.25 met (2.0 s)")


def test_lines_of_a_log_have_their_trials_names_and_the_time_to_the_end_of_the_run() -> None:
    made = {name: trained(name=name) for name in ("t0", "t1", "t2")}
    output = io.StringIO()
    display = ProgressDisplay(Console(file=output, width=200), False, [each.trial for each in made.values()])
    both = sorted((e for name in ("t0", "t1") for e in made[name].events), key=lambda event: event.time)
    for event in both:
        display(event)
    lines = output.getvalue().splitlines()
    assert any(line.startswith("t0 evaluation at 4: box AP 51.00") for line in lines)
    # Both have 4 s left of some 22: the third begins when one of them ends.
    assert "t1 iteration 4/8  ETA 0:00:04  4.00 images/s  loss 1.000  ETA of the run 0:00:26" in lines


def test_the_end_of_a_run_is_that_of_the_trials_that_wait_too() -> None:
    eta = RunEta(5)
    eta.began("t0", 0.0)
    eta.began("t1", 0.0)
    assert eta.left("t0", 60.0, 40.0) is None, "t1 has not said anything yet"
    assert eta.left("t1", 60.0, 40.0) == 60 + 100 + 100  # 100 s each, three more on two places
    eta.ended("t0", 100.0)
    eta.ended("t1", 100.0)
    eta.began("t2", 100.0)
    assert eta.left("t2", 50.0, 150.0) == 50 + 100  # the other place is free
    eta.ended("t2", 200.0)
    assert not eta.any_live and eta.num_ended == 3


def test_a_trial_that_is_gone_on_with_is_shown_from_its_restart() -> None:
    made, output = trained(), io.StringIO()
    made.restarted(40.0, 8)
    made.loop(50.0, 8)
    display = ProgressDisplay(Console(file=output, width=200), False, [dataclasses.replace(made.trial)])
    for event in made.events[-3:]:
        display(event)
    lines = output.getvalue().splitlines()
    assert lines[0] == "reference-2xcpu starting 2 workers on cpu, recipe reference"
    assert lines[1].startswith("reference-2xcpu restarting the workers")
    assert lines[2].endswith("resuming at iteration 8")
