"""Bundles of runs that never ran, whose every file fits the others, and forgeries of them."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.bundle.archive import MANIFEST, write_archive
from orchestrator.bundle.contents import run_files
from orchestrator.bundle.redaction import Redaction
from orchestrator.data.checks import check_split
from orchestrator.data.fingerprint import fingerprint
from orchestrator.data.generate import generate
from orchestrator.experiment.environment import package_hashes
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment, to_yaml
from orchestrator.figures.neighbours import with_neighbours
from orchestrator.figures.records import ExperimentResult
from orchestrator.figures.scaling import repeat_rows, scaling_fits, scaling_rows
from orchestrator.figures.trial import trial_result
from orchestrator.files import write_atomically
from orchestrator.report.airank import write_airank
from orchestrator.report.mlperf import write_mllog
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from tests.builders.experiments import tiny_experiment
from tests.builders.trials import TrialBuilder
from trainers.contract.evaluation_details import DETAILS_FOLDER, ClassCurve, Confusion, EvaluationDetails
from trainers.contract.events import Evaluated, LoopStarted, RunEnded, RunStarted, StepsDone
from trainers.contract.plan import TrialPlan

EPOCH = 1_790_000_000.0
ZONE_SECONDS = 5.5 * 3600
"""The workers' local time, ahead of UTC."""

Files = dict[str, bytes]
"""Content of a bundle's files by name."""


def make_run(folder: Path, data: Path) -> Path:
    """Writes the folder of a run of three seeds, 8 iterations each, evaluated every 4 (box AP 20 + seed, 40 + seed)."""
    values = tiny_experiment(
        trials={"world_sizes": [1], "scaling": "strong", "seeds": [0, 1, 2]},
        protocol={
            "kind": "time_to_train", "eval_period_iterations": 4, "warmup_iterations": 2, "target_box_ap": 35.0,
            "on_target": "continue",
        },
        storage={"checkpoint_period_iterations": 4, "path": "/home/alice/runs"},
    )  # fmt: skip
    experiment = parse_experiment(values, where="made")
    assert experiment.data.generated
    dataset = generate(data, **experiment.data.generated.model_dump())
    plans = expand(experiment, Hardware(), str(folder), data)
    command = ["python", "-m", "orchestrator.run", "tiny.yaml"]
    environment = {
        "command": " ".join(command),
        "host": "made",
        "cpus": "2",
        "git_commit": "0" * 40,
        "git_dirty": "false",
    }
    prints = {part: fingerprint(check_split(split)) for part, split in zip(("train", "val"), dataset, strict=True)}
    driver: dict[str, Any] = {"trial": "", "attempt": 0, "rank": -1}
    outbox = Outbox(folder / FILE_NAME)
    folder.mkdir(parents=True)
    outbox.append(
        RunStarted(
            **driver, time=EPOCH, experiment=experiment.model_dump(mode="json"), run_id="tiny/0",
            tags={f"run.{key}": value for key, value in environment.items()}, packages=package_hashes(),
            datasets={part: found for part, found in prints.items() if found},
        )
    )  # fmt: skip
    result = ExperimentResult(
        experiment="tiny", status="FINISHED", started=_utc(EPOCH), ended=_utc(EPOCH + 150), command=command,
        environment=environment, mlflow_tracking_uri="sqlite:////home/alice/mlflow.db",
    )  # fmt: skip
    for number, plan in enumerate(plans):
        made = _trained(plan, EPOCH + 1 + 50 * number)
        outbox.append(*made.events)
        trial = with_neighbours(trial_result(plan, made.events), made.events)
        result.trials.append(trial)
        write_airank(plan, made.events, trial, Path(plan.trial_dir))
        write_mllog(plan, made.events, trial, Path(plan.trial_dir))
        _write_log(made, Path(plan.trial_dir, "log.txt"))
    outbox.append(RunEnded(**driver, time=EPOCH + 151, status="FINISHED"))
    result.scaling, result.fits = scaling_rows(result.trials), scaling_fits(result.trials)
    result.repeats = repeat_rows(result.trials)
    result.write(folder / "results.json")
    return folder


def _trained(plan: TrialPlan, epoch: float) -> TrialBuilder:
    """0 trial starts, 10 worker, 14 loop, 2 steps each to 16 and 18, evaluation to 20, checkpoint 20.5, again to 27."""
    made = TrialBuilder(plan, epoch)
    made.started()
    made.workers(10.0)
    values: dict[str, Any] = {
        "setup_seconds": 4.0, "num_train_images": 16, "num_val_images": 4, "config_yaml": _config(plan),
        "restored_from": "", "iteration": 0,
    }  # fmt: skip
    made.emit(LoopStarted, 14.0, **values)
    for at, first, rate in ((16.0, 0, 0.0025025), (18.0, 2, 0.005), (22.5, 4, 0.005), (24.5, 6, 0.0005)):
        made.steps(at, first, 1.0, 1.0, learning_rate=rate)
        if first in (2, 6):
            ap = 20.0 + plan.seed + 5 * (first - 2)
            figures = {"box_ap": ap, "mask_ap": ap - 2, "box_ap50": (10100 + 5100) / 202}
            details = EvaluationDetails(
                iteration=first + 2, classes=("circle", "square", "triangle"), confusion=Confusion(0.5, 0.5, ()),
                curves={"box": tuple(
                    ClassCurve(name, number, (1.0,) * points, (0.5,) * points)
                    for name, number, points in (("circle", 9, 101), ("square", 7, 51), ("triangle", 0, 0))
                )}, worst_images=(), sample_ids=(), detections=(),
            )  # fmt: skip
            file = f"{DETAILS_FOLDER}/{first + 2:07d}.json"
            write_atomically(Path(plan.trial_dir, file), details.to_json())
            made.emit(
                Evaluated, at + 2, iteration=first + 2, epoch=(first + 2) / 4, figures=figures,
                box_scored=made.epoch + at + 1, mask_scored=made.epoch + at + 2, seconds=2.0,
                part_seconds={"inference": 1.0, "gather": 0.0, "score": 1.0},
                details_file=file, class_ap={"box_ap/circle": ap - 1, "box_ap/square": ap + 1, "box_ap/triangle": None},
            )  # fmt: skip
            made.checkpoint(at + 2.5, first + 2, 0.1)
            manifest = {
                "iteration": first + 2, "attempt": 0, "time": made.epoch + at + 2.4, "score": ap,
                "files": {"state-0.pt": {"bytes": 1, "sha256": "0" * 64}},
            }  # fmt: skip
            path = Path(plan.checkpoint_dir, f"iter_{first + 2:07d}", "manifest.json")
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(manifest))
    made.finished(27.0, 8, "max_iter")
    made.ended(28.0)
    return made


def _config(plan: TrialPlan) -> str:
    """What detectron2's config of a trial prints, as far as it is read."""
    solver = plan.solver
    values = {
        **plan.overrides, "SOLVER.BASE_LR": solver.base_lr, "SOLVER.MAX_ITER": solver.max_iter,
        "SOLVER.STEPS": list(solver.steps), "SOLVER.WARMUP_ITERS": solver.warmup_iters, "SEED": plan.seed,
        "SOLVER.IMS_PER_BATCH": solver.global_batch_size, "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "SOLVER.WARMUP_METHOD": "linear", "SOLVER.RESCALE_INTERVAL": False, "SOLVER.WARMUP_FACTOR": 0.001,
        "SOLVER.GAMMA": 0.1, "TEST.EVAL_PERIOD": solver.eval_period, "OUTPUT_DIR": "/home/alice/runs",
    }  # fmt: skip
    nested: dict[str, Any] = {}
    for key, value in sorted(values.items()):
        *path, name = key.split(".")
        section = nested
        for part in path:
            section = section.setdefault(part, {})
        section[name] = value
    return to_yaml(nested)


def _write_log(made: TrialBuilder, path: Path) -> None:
    lines = []

    def log(moment: float, logger: str, text: str) -> None:
        stamp = datetime.fromtimestamp(moment + ZONE_SECONDS, UTC).strftime("%m/%d %H:%M:%S")
        lines.append(f"[{stamp}] {logger} INFO: {text}")

    for event in made.events:
        if isinstance(event, LoopStarted):
            log(event.time, "trainers.rank", f"Running with full config:\n{event.config_yaml}")
            log(event.time, "trainers.rank", "Starting training from iteration 0")
        elif isinstance(event, StepsDone):
            text = f" eta: 0:00:00  iter: {event.iteration - 1}  time: 1.0  lr: {event.learning_rate:.5g}  "
            log(event.time, "detectron2.utils.events", text)
        elif isinstance(event, Evaluated):
            log(
                event.time,
                "trainers.evaluation_hook",
                f"Evaluation after {event.iteration} iterations: {event.figures}",
            )
    log(made.events[-2].time, "trainers.hooks", "Overall training speed: 6 iterations in 0:00:06 (1.0000 s / it)")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def files_of(folder: Path, name: str = "run") -> Files:
    """The files that a bundle of a run's folder has."""
    return dict(run_files(folder, name, Redaction({"HOME": "/home/alice"})))


def pack(path: Path, files: Files) -> Path:
    """A bundle of these files, with a manifest that fits them: what a forger hands out."""
    write_archive(path, files.items())
    return path


def pack_carelessly(path: Path, files: Files, true: Files) -> Path:
    """A bundle of these files with the manifest of the true ones."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        listed = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in true.items()}
        manifest = {"format": "detection-benchmark bundle", "version": 1, "files": listed}
        archive.writestr(MANIFEST, json.dumps(manifest))
    return path


def edit_json(content: bytes, change: Callable[[Any], None]) -> bytes:
    """A JSON document with something changed in it."""
    document = json.loads(content)
    change(document)
    return json.dumps(document, indent=2).encode()


def edit_events(content: bytes, change: Callable[[dict[str, Any]], bool | None]) -> bytes:
    """Events with something changed; one for which `change` returns False is left out."""
    events = [json.loads(line) for line in content.splitlines()]
    return b"".join(json.dumps(event).encode() + b"\n" for event in events if change(event) is not False)


def with_figures(files: Files, scratch: Path) -> Files:
    """The files with the record that their events give: a forger who publishes what follows from forged events."""
    scratch.mkdir()
    (scratch / FILE_NAME).write_bytes(files["runs/run/events.jsonl"])
    result = ExperimentResult.model_validate_json(files["runs/run/results.json"])
    events = [event for event, _ in Outbox(scratch / FILE_NAME).read()]
    plans = [TrialPlan.from_dict(event.plan) for event in events if event.kind == "trial_started"]  # type: ignore[attr-defined]
    results = [trial_result(plan, [e for e in events if e.trial == plan.name]) for plan in plans]
    result.trials = [with_neighbours(each, events) for each in results]
    result.scaling, result.repeats = scaling_rows(result.trials), repeat_rows(result.trials)
    return {**files, "runs/run/results.json": result.model_dump_json(indent=2).encode()}


def _utc(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
