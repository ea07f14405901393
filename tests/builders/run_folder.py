"""A run's folder as a run leaves it, from made-up events of planned trials; nothing trains."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycocotools import mask as rle

from orchestrator.data.generate import generate
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment, read_yaml
from orchestrator.experiment.spec import Experiment
from orchestrator.figures.records import ExperimentResult
from orchestrator.figures.scaling import repeat_rows, scaling_fits, scaling_rows
from orchestrator.figures.trial import trial_result
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from tests.builders.evaluations import leave_details, made_details
from tests.builders.trials import TrialBuilder
from trainers.contract.events import RunEnded, RunStarted
from trainers.contract.events import WorkerStarted as Started
from trainers.contract.plan import SAMPLES_FILE, TrialPlan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SEED_ROW = {
    "name": "seed, 1 x V100", "world_size": 1, "images_per_second": 9.66, "source": "the seed's first protocol",
}  # fmt: skip
SECONDS_PER_IMAGE = 0.05


def made_experiment(name: str = "demo", **changes: Any) -> Experiment:
    """The demo, for 1, 2 and 4 workers, with a price and a reference; `changes` replace whole sections."""
    values = read_yaml(CONFIGS / "demo.yaml")
    values["data"] = {"generated": {"num_train": 8, "num_val": 8, "size": 96}}
    values["description"] = "Made-up figures, to look at the pages: nothing was trained."
    values |= {"name": name, "trials": {"world_sizes": [1, 2, 4], "scaling": "strong"}, "reference_rows": [SEED_ROW]}
    values["protocol"] = {**values["protocol"], "iterations": 240, "eval_period_iterations": 60}
    values["resources"] = {**values["resources"], "price_per_accelerator_hour": 2.5}
    return parse_experiment({**values, **changes}, where="made")


def make_run(
    folder: Path, experiment: Experiment | None = None, *, slower: float = 1.0, seed: int = 0,
    classes: Sequence[str] = (), old: bool = False,
) -> Path:  # fmt: skip
    """Writes the folder of a run of made-up trials, the last of which loses a worker once.

    Args:
        folder: Where to; the data set is drawn next to it.
        experiment: What was run; None for `made_experiment()`.
        slower: Factor on every step's seconds.
        seed: Of the noise.
        classes: Names of the classes in figures, instead of the data set's.
        old: Without what version 0.2 did not measure: figures by class, validation losses.
    """
    experiment = experiment or made_experiment()
    folder.mkdir(parents=True)
    root = folder.parent / "data"
    generate(root, num_train=8, num_val=8, size=96)
    outbox = Outbox(folder / FILE_NAME)
    plans = expand(experiment, Hardware(), str(folder), root)
    epoch = 1_790_000_000.0
    values = {"experiment": experiment.model_dump(mode="json"), "run_id": f"{experiment.name}/{seed}"}
    driver = {"trial": "", "attempt": 0, "rank": -1}
    outbox.append(RunStarted(**driver, time=epoch, tags={"run.git_commit": "0" * 40}, **values))
    result = ExperimentResult(
        experiment=experiment.name, description=experiment.description, status="FINISHED",
        started="2026-09-21T13:46:40+00:00", ended="2026-09-21T14:26:40+00:00",
        command=["python", "-m", "orchestrator.run", "configs/demo.yaml"],
        environment={"host": "made", "python": "3.11", "torch": "2.14.1", "git_commit": "0" * 40},
        mlflow_tracking_uri="sqlite:////tmp/made/mlflow.db", mlflow_run_id="0" * 32,
        reference_rows=experiment.reference_rows,
    )  # fmt: skip
    for plan in plans:
        noise = random.Random(f"{seed}/{plan.name}")  # noqa: S311 - nothing secret is drawn
        made = _emit(plan, epoch, noise, slower, restart=plan is plans[-1], classes=None if old else classes)
        outbox.append(*made.events)
        epoch = made.events[-1].time
        result.trials.append(trial_result(plan, made.events, mlflow_run_id="1" * 32))
        if old:
            _leave_samples(plan)
    outbox.append(RunEnded(**driver, time=epoch, status="FINISHED"))
    result.scaling, result.fits = scaling_rows(result.trials), scaling_fits(result.trials)
    result.repeats = repeat_rows(result.trials)
    result.write(folder / "results.json")
    return folder


def _emit(
    plan: TrialPlan, epoch: float, noise: random.Random, slower: float, *, restart: bool, classes: Sequence[str] | None
) -> TrialBuilder:
    made, at, iteration = TrialBuilder(plan, epoch), 0.0, 0
    made.started()
    restart_at = 130 if restart else -1
    while iteration < plan.solver.max_iter:
        at += 9.0
        for rank in range(plan.world_size):
            made.emit(
                Started, at, rank, host=f"host-{rank // 2}", node_id=f"{rank // 2}", pid=rank, local_rank=rank % 2,
                device_name="Test CPU", device_memory_gib=16.0, versions={"torch": "2.14.1"},
            )  # fmt: skip
        at += 4.0
        made.loop(at, iteration, setup_seconds=4.0)
        while iteration < plan.solver.max_iter:
            base = SECONDS_PER_IMAGE * slower * plan.batch_per_worker + 0.02 * (plan.world_size - 1)
            drawn = [
                [
                    base * noise.lognormvariate(0.03 * rank, 0.08) * (3.0 if noise.random() < 0.01 else 1.0)
                    for _ in range(10)
                ]
                for rank in range(plan.world_size)
            ]
            slowest = [max(steps) for steps in zip(*drawn, strict=True)]
            at += sum(slowest)
            for rank, own in enumerate(drawn):
                _window(made, plan, at, iteration, own, slowest, rank, noise)
            iteration += 10
            if iteration == restart_at:
                restart_at, iteration = -1, 100
                at += 6.0
                made.restarted(at, 130)
                break
            if iteration % plan.solver.eval_period == 0:
                at += 3.0
                box = 78 * (1 - 2.718 ** (-iteration / 90)) + noise.gauss(0, 0.6)
                more = {} if classes is None else _details(plan, iteration, box / 80, classes)
                made.evaluated(at, iteration, box, box * 0.97, seconds=3.0, **more)
            if iteration % plan.solver.checkpoint_period == 0:
                at += 0.5
                made.checkpoint(at, iteration, 0.5)
    made.finished(at + 0.2, iteration, "max_iter")
    made.ended(at + 2.0)
    return made


def _window(
    made: TrialBuilder, plan: TrialPlan, at: float, first: int, own: list[float], slowest: list[float], rank: int,
    noise: random.Random,
) -> None:  # fmt: skip
    shares = {"data": 0.05, "forward": 0.35, "backward": 0.5, "optimizer": 0.1}
    parts = {name: [share * seconds for seconds in own] for name, share in shares.items()}
    if plan.world_size > 1:
        parts["communication"] = [most - seconds for most, seconds in zip(slowest, own, strict=True)]
    progress = (first + 10) / plan.solver.max_iter
    loss = {
        f"loss_{name}": size * (1.2 - progress) * noise.uniform(0.9, 1.1)
        for name, size in (("cls", 0.6), ("box_reg", 0.5), ("mask", 0.6), ("rpn_cls", 0.3), ("rpn_loc", 0.1))
    }
    made.steps(
        at, first, *slowest, rank=rank, data_seconds=tuple(parts["data"]),
        part_seconds={name: sum(values) for name, values in parts.items()},
        step_part_seconds={name: tuple(values) for name, values in parts.items() if name != "data"},
        losses={**loss, "total_loss": sum(loss.values())} if rank == 0 else {},
        learning_rate=plan.solver.base_lr * min(1.0, (first + 10) / plan.solver.warmup_iters),
    )  # fmt: skip


def _details(plan: TrialPlan, iteration: int, quality: float, classes: Sequence[str]) -> dict[str, Any]:
    """What an evaluation leaves besides its figures: a file in the trial's folder, and the fields that go with it."""
    noise = random.Random(plan.name)  # noqa: S311 - nothing secret is drawn
    details = made_details(plan.val, iteration, quality, noise, classes)
    losses = {"loss_cls": 1.2 - quality, "loss_mask": 1.0 - 0.6 * quality}
    return {
        **leave_details(Path(plan.trial_dir), details),
        "validation_losses": {**losses, "total_loss": sum(losses.values())},
    }


def _leave_samples(plan: TrialPlan) -> None:
    """Detections of three images: the true shapes moved a little, one of them missed."""
    truth = json.loads(Path(plan.val.annotations).read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    shown = sorted(sizes)[:3]
    found = []
    for annotation in [a for a in truth["annotations"] if a["image_id"] in shown][1:]:
        height, width = sizes[annotation["image_id"]]
        moved = [[value + 2 for value in polygon] for polygon in annotation["segmentation"]]
        mask = rle.merge(rle.frPyObjects(moved, height, width))
        found.append(
            {
                "image_id": annotation["image_id"], "category_id": annotation["category_id"], "score": 0.91,
                "bbox": [annotation["bbox"][0] + 2, annotation["bbox"][1] + 2, *annotation["bbox"][2:]],
                "segmentation": {"size": [height, width], "counts": mask["counts"].decode()},
            }
        )  # fmt: skip
    Path(plan.trial_dir).mkdir(exist_ok=True)
    Path(plan.trial_dir, SAMPLES_FILE).write_text(json.dumps({"image_ids": shown, "detections": found}))
