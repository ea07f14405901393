"""Made-up runs of a benchmark: five seeds of Mask R-CNN on COCO, whose epochs and minutes can be chosen."""

from pathlib import Path
from typing import Any

from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.spec import Experiment
from orchestrator.figures.records import ExperimentResult
from orchestrator.figures.trial import trial_result
from orchestrator.report.airank import write_airank
from orchestrator.report.benchmark import judge_run
from orchestrator.report.mlperf import write_mllog
from tests.builders.experiments import tiny_experiment
from tests.builders.trials import CONFIG_YAML, TrialBuilder, plan
from trainers.contract.events import Evaluated, LoopStarted
from trainers.contract.plan import DatasetPlan

NAME = "fast-1xcuda-seed"


def seed_run(
    seed: int | None, epochs: int = 14, minutes: float = 20.0, *, met: bool = True, images: int = 117_266,
    per_epoch: int = 1, config: str = "", number: int | None = None, **fields: Any,
) -> TrialBuilder:  # fmt: skip
    """A run on one GPU that is evaluated every epoch and meets MLPerf's targets at the last one, unless `met` is false.

    Args:
        seed: Its seed; None for a log that names none.
        epochs: Epochs to the targets.
        minutes: MLPerf's clock at the targets.
        met: Whether it meets them.
        images: Training images.
        per_epoch: Evaluations in an epoch.
        config: More lines of the printed config.
        number: What ends its name; None for the seed.
        fields: Of the plan.
    """
    values = {
        "name": f"{NAME}{seed if number is None else number}", "seed": seed, "protocol": "benchmark", "world_size": 1,
        "device": "cuda", "global_batch_size": 128, "base_lr": 0.16, "steps": (9000, 12000), "max_iter": 13000,
        "val": DatasetPlan("coco_2017_val", "", ""), "target_box_ap": 37.7, "target_mask_ap": 33.9,
    }  # fmt: skip
    made = TrialBuilder(plan(**{**values, **fields}))
    made.started()
    made.workers(10.0, hosts=("a",))
    made.emit(
        LoopStarted, 20.0, iteration=0, num_train_images=images, num_val_images=5000, setup_seconds=10.0,
        config_yaml=CONFIG_YAML + config, restored_from="",
    )  # fmt: skip
    made.steps(25.0, 0, *(1.0,) * 4)
    count = epochs * per_epoch
    for position in range(1, count + 1):
        at = 20.0 + 60 * minutes * position / count
        box, mask = (38.0, 34.5) if met and position == count else (20.0, 18.0)
        made.emit(
            Evaluated, at, iteration=1000 * position, epoch=float(position) / per_epoch,
            figures={"box_ap": box, "mask_ap": mask}, box_scored=made.epoch + at, mask_scored=made.epoch + at,
            seconds=1.0, part_seconds={"inference": 0.5, "gather": 0.0, "score": 0.5},
        )  # fmt: skip
    made.finished(30.0 + 60 * minutes, 1000 * count)
    made.ended(40.0 + 60 * minutes)
    return made


def five(*epochs: int, **fields: Any) -> list[TrialBuilder]:
    """Runs with seeds from 0 on, of so many epochs and a minute and a half an epoch."""
    return [seed_run(seed, number, 1.5 * number, **fields) for seed, number in enumerate(epochs or (14,) * 5)]


def experiment(num_seeds: int = 5) -> Experiment:
    """A benchmark of so many seeds."""
    protocol = {"kind": "benchmark", "target_box_ap": 37.7, "target_mask_ap": 33.9, "eval_period_epochs": 1}
    values = tiny_experiment(protocol=protocol, trials={"seeds": list(range(num_seeds)), "scaling": "strong"})
    return parse_experiment(values, "made")


def judged(folder: Path, runs: list[TrialBuilder], num_seeds: int = 5) -> ExperimentResult:
    """The record of the runs with its verdict; their files are in the folder."""
    result = ExperimentResult(experiment="made", status="FINISHED", started="2026-01-01T00:00:00+00:00")
    for made in runs:
        trial = trial_result(made.trial, made.events)
        write_airank(made.trial, made.events, trial, folder / trial.name)
        write_mllog(made.trial, made.events, trial, folder / trial.name)
        result.trials.append(trial)
    result.benchmark = judge_run(experiment(num_seeds), result, folder)
    return result
