"""What `--predict` asks for and refuses, what is known of a batch, and predictions next to what was measured."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.prediction_file import read_prediction
from orchestrator.experiment.reading import load_experiment, parse_experiment
from orchestrator.experiment.references import read_references
from orchestrator.experiment.spec import CONFIGS, Experiment, SpecError
from orchestrator.figures.records import ExperimentResult
from orchestrator.figures.scaling import scaling_rows
from orchestrator.figures.trial import trial_result
from orchestrator.prediction.asking import ask, calibration, parse_sizes
from orchestrator.prediction.check import borrowed, leave_one_out, series_of
from orchestrator.prediction.convergence import convergence, knows, largest_known_batch
from orchestrator.prediction.predict import complete, keep
from orchestrator.report.curves import throughput
from orchestrator.report.drawing import ReportInput
from orchestrator.report.prediction import prediction_group, prediction_notes, prediction_tables
from orchestrator.report.table import markdown_table, table_rows
from orchestrator.tracking.notes import prediction_tags
from tests.builders.commands import ROOT, run_command
from tests.builders.experiments import tiny_experiment
from tests.builders.predictions import made_prediction
from tests.builders.trials import trained
from trainers.contract.plan import Predicted, TrialPlan

SEED_8 = CONFIGS / "seed_8gpu_time_to_train.yaml"
GPUS = Hardware(num_gpus=8, num_cpus=96)


def tiny(**changes: Any) -> Experiment:
    return parse_experiment(tiny_experiment(**changes), where="tiny")


@pytest.mark.parametrize("text", ["0", "-1", "", "64,", "many", "6.5", "4;8", "٣", "99999999", "4,4"])
def test_sizes_that_are_none_are_refused(text: str):
    with pytest.raises(SpecError, match="--predict"):
        parse_sizes(text, "--predict")


def test_sizes_come_in_ascending_order():
    assert parse_sizes("128, 64", "--predict") == [64, 128]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trials": {"world_sizes": [1], "seeds": [0, 1]}}, r"trials.seeds has 2: add --set trials.seeds=\[0\]"),
        ({"trials": {"world_sizes": [1], "recipes": ["reference", "fast"]}}, "trials.recipes has 2"),
        ({"trials": {"world_sizes": [1], "scaling": "both"}}, "scaling is both"),
        ({"trials": {"world_sizes": [1], "scaling": "strong"}}, "--predict 64: .* does not divide among 64 workers"),
        ({"trials": {"world_sizes": [1], "scaling": "weak"}}, "--predict 64: .*MAX_ITER is 0"),
    ],
)
def test_experiments_that_cannot_be_predicted_are_refused(changes: dict[str, Any], words: str):
    with pytest.raises(SpecError, match=words):
        ask(tiny(**changes), [64])


def test_a_benchmark_is_predicted_for_one_of_its_seeds():
    with pytest.raises(SpecError, match=r"trials.seeds=\[0\] --set protocol.kind=time_to_train"):
        ask(load_experiment(CONFIGS / "demo_benchmark.yaml"), [64])


def test_batch_and_learning_rate_are_the_experiments_own_rule_at_every_size():
    (sixteen, many) = ask(load_experiment(SEED_8), [64, 1024]).asked
    assert (sixteen.global_batch_size, sixteen.base_lr, sixteen.iterations) == (128, pytest.approx(0.16), 11_250)
    assert sixteen.convergence == "MLPerf's point: LR 0.16, 14.0 epochs" and sixteen.epochs_to_target == 14
    assert many.convergence.startswith("not known to converge: MLPerf's largest batch is 272")
    assert many.epochs_to_target is None


@pytest.mark.parametrize("scaling", ["weak", "strong"])
def test_a_calibration_has_the_batch_and_rate_that_the_experiment_would_have_there(scaling: str, tmp_path: Path):
    experiment = load_experiment(SEED_8, [f"trials.scaling={scaling}", "model.overrides.SOLVER.BASE_LR=0.04"])
    short = calibration(experiment, ask(experiment, [16]), None, GPUS)
    whole = experiment.model_copy(update={"trials": experiment.trials.model_copy(update={"world_sizes": [1, 2, 8]})})
    whole = whole.model_copy(update={"protocol": experiment.protocol.model_copy(update={"iterations": 63})})
    plans, wanted = (expand(each, GPUS, str(tmp_path), tmp_path) for each in (short, whole))
    assert [(p.world_size, p.solver.global_batch_size, p.solver.base_lr) for p in plans] == [
        (p.world_size, p.solver.global_batch_size, p.solver.base_lr) for p in wanted
    ]
    assert {(p.solver.max_iter, p.solver.eval_period, p.solver.evaluate_at_end) for p in plans} == {(63, 0, False)}
    assert {p.protocol for p in plans} == {"throughput"}


def test_a_calibration_takes_the_sizes_for_which_there_is_room():
    experiment = load_experiment(SEED_8)
    asked = ask(experiment, [64])
    assert calibration(experiment, asked, None, Hardware(num_gpus=4)).trials.world_sizes == [1, 2]
    assert calibration(experiment, asked, None, None).trials.world_sizes == [1, 2, 8]
    assert calibration(experiment, asked, [2, 4], GPUS).trials.world_sizes == [2, 4]


@pytest.mark.parametrize(
    ("predicted", "given", "words"),
    [
        ([8], [1, 8], "measures up to 8 workers, and only larger sizes are predicted"),
        ([2], None, "--predict 2: it takes two smaller sizes .*; ask for 3 workers or more"),
        ([8], [1], "--calibrate 1: it takes two smaller sizes .* such as --calibrate 1,2"),
    ],
)
def test_calibrations_that_cannot_predict_are_refused(predicted: list[int], given: list[int] | None, words: str):
    experiment = load_experiment(SEED_8)
    with pytest.raises(SpecError, match=words):
        calibration(experiment, ask(experiment, predicted), given, GPUS)


def test_what_no_calibration_needs_is_left_out_of_it():
    values = tiny_experiment(
        protocol={"target_box_ap": 50, "eval_period_iterations": 4, "patience": 2, "ema": {}, "metric": "mask_ap"},
        tracking={"log_model": "best"}, prediction="/gone", resources={"min_workers": 1, "resize_after_seconds": 5},
        faults={"standby": True},
    )  # fmt: skip
    experiment = parse_experiment(values, where="tiny")
    short = calibration(experiment, ask(experiment, [4]), [1, 2], None)
    assert short.prediction is None and not short.protocol.evaluates and short.resources.min_workers is None
    assert short.faults.standby == "auto"
    assert parse_experiment(short.model_dump(mode="json"), where="again") == short


def test_batches_between_two_points_are_interpolated_and_beyond_them_unknown():
    assert convergence(96).epochs == pytest.approx(14.0, abs=0.1) and convergence(96).base_lr == pytest.approx(0.12)
    between = convergence(192)
    assert between.text.startswith("between MLPerf's points 128 and 256")
    assert between.base_lr == pytest.approx(0.2) and between.epochs == pytest.approx(15.55)
    assert convergence(4).epochs is None and convergence(273).epochs is None
    assert largest_known_batch(64) == 256 and largest_known_batch(1024) is None


def test_points_are_for_their_model_data_and_targets():
    assert knows(load_experiment(SEED_8)) == ""
    assert "COCO 2017 alone" in knows(tiny())
    assert "targets are higher" in knows(load_experiment(SEED_8, ["protocol.target_box_ap=39"]))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    keep(made_prediction(tiny()), tmp_path)
    return tmp_path


def planned(folder: Path, **changes: Any) -> TrialPlan:
    trials = {"world_sizes": [2], "scaling": "strong"}
    experiment = tiny(prediction=str(folder), **{"trials": trials, **changes})
    return expand(experiment, Hardware(num_cpus=2), str(folder), folder)[0]


def test_a_trial_carries_its_prediction_before_it_runs(kept: Path):
    plan = planned(kept)
    assert plan.predicted == Predicted(100.0, 90.0, 110.0, "Test CPU")
    assert TrialPlan.from_dict(asdict(plan)) == plan


def test_other_sizes_have_no_prediction_and_a_run_of_others_alone_is_refused(kept: Path):
    assert planned(kept, trials={"world_sizes": [4, 2], "scaling": "strong"}).predicted is None
    with pytest.raises(SpecError, match=r"for 2 workers with batch 4 .*: 4 with batch 4 \(reference, strong\)"):
        planned(kept, trials={"world_sizes": [4], "scaling": "strong"})
    with pytest.raises(SpecError, match="for none of the trials here"):
        planned(kept, trials={"world_sizes": [2], "scaling": "weak"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"weights": "", "overrides": {}}}, "another setup: model.overrides"),
        ({"data": {"generated": {"num_train": 16, "num_val": 4, "size": 96}}}, "another setup: data.generated.size"),
        ({"trials": {"world_sizes": [2], "scaling": "strong", "switches": {"tf32": True}}}, "trials.switches"),
    ],
)
def test_a_prediction_of_another_setup_is_refused(kept: Path, changes: dict[str, Any], words: str):
    with pytest.raises(SpecError, match=words):
        planned(kept, **changes)


def test_files_that_are_no_prediction_are_refused(tmp_path: Path):
    with pytest.raises(SpecError, match="there is none; `python -m orchestrator"):
        planned(tmp_path / "gone")
    (tmp_path / "other.json").write_text('{"setup": {}}')
    with pytest.raises(SpecError, match=r"other.json: no prediction that this version reads: recipe Field required"):
        planned(tmp_path / "other.json")
    keep(made_prediction(tiny(), sizes=[]), tmp_path)
    with pytest.raises(SpecError, match="its calibration has not ended"):
        planned(tmp_path)


def measured(device: str) -> ExperimentResult:
    """Two workers that were predicted to train 4 images/s, and train 3.75."""
    made = trained(predicted=Predicted(4.0, 3.5, 4.5, device))
    trial = trial_result(made.trial, made.events)
    result = ExperimentResult(experiment="made", status="FINISHED", started="", trials=[trial])
    result.scaling = scaling_rows(result.trials)
    return result


def test_what_was_measured_stands_next_to_its_prediction():
    result = measured("Test CPU")
    (trial,) = result.trials
    assert trial.predicted.error == pytest.approx(4 / 3.75 - 1)
    assert "4.00 images/s (3.50–4.50) were predicted: 6.7 % too much" in table_rows(result)[0].note
    assert "were predicted: 6.7 % too much" in markdown_table(result)


def test_on_another_device_no_error_is_given_and_a_note_says_why():
    (trial,) = measured("NVIDIA H100").trials
    assert trial.predicted.images_per_second == 4.0 and trial.predicted.error is None
    assert "its prediction is for NVIDIA H100, it ran on Test CPU: no error" in trial.notes


def test_a_trial_without_a_prediction_has_none():
    assert trial_result(trained().trial, trained().events).predicted.images_per_second is None


def test_a_run_without_a_question_has_no_prediction_and_a_damaged_one_is_left_out(tmp_path: Path):
    result = measured("Test CPU")
    assert complete(tmp_path, result) is None
    (tmp_path / "prediction.json").write_text("{")
    assert complete(tmp_path, result) is None


def test_trials_that_give_no_prediction_leave_the_reason(tmp_path: Path):
    keep(made_prediction(tiny(), sizes=[]), tmp_path)
    prediction = complete(tmp_path, measured("Test CPU"))
    assert prediction is not None and prediction.sizes == []
    assert prediction.assumptions[0].startswith("nothing is predicted: a prediction needs trials of two sizes")
    assert read_prediction(tmp_path) == prediction and prediction_tables(prediction) == []


def test_a_prediction_is_marked_wherever_it_is_shown():
    result = measured("Test CPU")
    result.prediction = made_prediction(tiny())
    titles = [table.title for table in prediction_tables(result.prediction)]
    assert titles == ["PREDICTED from 1 workers on Test CPU (reference, strong scaling)", "PREDICTED step, ms"]
    assert "nothing was measured" in list(prediction_notes(result.prediction))
    assert "**PREDICTED step, ms**" in markdown_table(result)
    assert prediction_tags(result) == {"prediction.2": "100.00 images/s (90.00–110.00), efficiency 80.0 %"}
    assert prediction_group(result.prediction)
    axes = throughput(ReportInput({"": result}, [])).axes[0]  # type: ignore[union-attr]
    assert "predicted, 95 % interval" in axes.get_legend_handles_labels()[1]


def test_published_sizes_are_predicted_from_one_another():
    every = series_of([row for file in sorted((ROOT / "references").glob("*.yaml")) for row in read_references(file)])
    checks = {(c.series, c.world_size): c for name, series in every.items() for c in leave_one_out(name, series)}
    seed = checks["seed, NVIDIA V100, fp32", 8]
    assert seed.predicted == pytest.approx(8 * 9.66) and seed.error == pytest.approx(77.28 / 55.26 - 1)
    # 12 images in 66.5 ms and 4 in 31.2 ms: 4.42 ms an image and 13.5 ms more.
    assert checks["MLPerf v3.0, NVIDIA H100, amp", 256].predicted == pytest.approx(14_272, rel=1e-3)
    text = (ROOT / "docs" / "scaling.md").read_text()
    for check in checks.values():
        if f"| {check.series.replace(', NVIDIA', ',')} | {check.world_size} |" in text:
            assert f"{check.error:+.1%}".replace("%", " %") in text
    assert {f"{check.error:+.1%}" for check in borrowed(every)} >= {"+2.0%", "+12.6%"}


def test_the_command_that_repeats_the_check_and_its_refusals(tmp_path: Path):
    module = "orchestrator.prediction.check"
    shown = run_command(*sorted((ROOT / "references").glob("*.yaml")), cwd=ROOT, module=module)
    assert shown.returncode == 0 and "+39.8%" in shown.stdout
    (tmp_path / "none.yaml").write_text("reference_rows: []")
    refused = run_command(tmp_path / "none.yaml", cwd=ROOT, module=module)
    assert refused.returncode == 2 and "no series has a throughput" in refused.stderr


def test_the_plan_of_a_calibration_says_what_it_is_to_predict(tmp_path: Path):
    arguments = (SEED_8, "--dry-run", "--predict", "64")
    shown = run_command(*arguments, cwd=tmp_path)
    assert shown.returncode == 0 and "reference-8xcuda" in shown.stdout
    assert "To predict: 64 workers, batch 128, LR 0.16, 11,250 iterations; MLPerf's point" in shown.stdout
    alone = run_command(SEED_8, "--dry-run", "--calibrate", "1,2", cwd=tmp_path)
    assert alone.returncode == 2 and "no effect without --predict" in alone.stderr
    unset = run_command(SEED_8, "--dry-run", "--predict", "", cwd=tmp_path)  # a shell's variable without a value
    assert unset.returncode == 2 and "numbers of workers from 1" in unset.stderr
