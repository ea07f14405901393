"""Training and evaluation against plain detectron2, each side in a separate process with the same threads."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks import slots, turns
from benchmarks.measure import Row, alternate, by_blocks
from benchmarks.ours import write_plan
from benchmarks.turns import WARMUP_STEPS
from orchestrator.data.generate import generate
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.spec import DEFAULT_CONFIG
from trainers.contract.cpus import num_usable_cpus
from trainers.contract.events import Event, StepsDone, event_from_json
from trainers.contract.plan import TrialPlan

DATA = Path("data/benchmarks")
"""Generated images, reused by later invocations."""


def demo(steps: int, cpus: int = 1, world_size: int = 1, recipe: str = "reference", **protocol: Any) -> TrialPlan:
    """The demo's model and data, for a number of steps without evaluation unless `protocol` says otherwise."""
    values = yaml.safe_load(DEFAULT_CONFIG.read_text(encoding="utf-8"))
    return generated_plan(values, cpus, world_size, recipe, protocol or _steps(steps))


def r50(steps: int, cpus: int, recipe: str, size: int = 320) -> TrialPlan:
    """The real R50-FPN, batch 2."""
    values = {
        "name": "r50",
        "data": {"generated": {"num_train": 32, "num_val": 8, "size": size, "num_classes": 3}},
        "model": {
            "weights": "",
            "overrides": {
                "SOLVER.IMS_PER_BATCH": 2,
                "SOLVER.BASE_LR": 0.0001,
                "INPUT.MIN_SIZE_TRAIN": [size],
                "INPUT.MIN_SIZE_TEST": size,
            },
        },
    }
    return generated_plan(values, cpus, 1, recipe, _steps(steps))


def _steps(number: int) -> dict[str, Any]:
    return {"kind": "throughput", "iterations": number, "warmup_iterations": WARMUP_STEPS, "evaluate_at_end": False}


def generated_plan(
    values: dict[str, Any], cpus: int, world_size: int, recipe: str, protocol: dict[str, Any], device: str = "cpu"
) -> TrialPlan:
    """The plan of an experiment on generated data, which is drawn where it is missing.

    Args:
        values: The experiment's; sections that the other arguments are about are replaced.
        cpus: Of each worker.
        world_size: Number of workers.
        recipe: Name of the recipe.
        protocol: Section of the experiment.
        device: `cpu` or `cuda`.
    """
    values["protocol"] = protocol
    values["trials"] = {"world_sizes": [world_size], "scaling": "strong", "recipes": [recipe]}
    values["resources"] = {"device": device, "cpus_per_worker": cpus}
    values["storage"] = {"checkpoint_period_iterations": 0}
    experiment = parse_experiment(values, "benchmark")
    drawn = experiment.data.generated
    assert drawn is not None
    root = (DATA / f"{drawn.size}px-{drawn.num_train}-{drawn.num_val}").absolute()
    generate(root, num_train=drawn.num_train, num_val=drawn.num_val, size=drawn.size, num_classes=drawn.num_classes)
    return expand(experiment, Hardware(num_cpus=num_usable_cpus()), "/unused", root)[0]


def run_process(command: list[str], cpus: int) -> None:
    """Runs a command with its threads pinned; its output is shown only if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(cpus), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def _within(plan: TrialPlan, folder: str) -> TrialPlan:
    """The plan with all its output in a folder: it would go on from a checkpoint left by another run."""
    return dataclasses.replace(plan, trial_dir=f"{folder}/trial", checkpoint_dir=f"{folder}/checkpoints")


def ours_command(plan: TrialPlan, folder: str, launcher: tuple[str, ...] = ()) -> list[str]:
    """Our worker without Ray, on a plan; its events go to `FOLDER/events`."""
    write_plan(_within(plan, folder), Path(folder, "plan.json"))
    return [*(launcher or (sys.executable,)), "-m", "benchmarks.ours", f"{folder}/plan.json", f"{folder}/events"]


def read_events(file: Path) -> list[Event]:
    """The events that our workers wrote, a line each."""
    return [event_from_json(line) for line in file.read_text(encoding="utf-8").splitlines()]


def peer_command(plan: TrialPlan, folder: str, *flags: str) -> list[str]:
    """Plain detectron2 on a plan; its measurements go to `FOLDER/result.json`."""
    write_plan(_within(plan, folder), Path(folder, "plan.json"))
    return [sys.executable, "-m", "benchmarks.peer", f"{folder}/plan.json", f"{folder}/result.json", *flags]


def peer_result(plan: TrialPlan, *flags: str) -> dict[str, Any]:
    """The measurements of plain detectron2 on a plan."""
    with tempfile.TemporaryDirectory() as folder:
        run_process(peer_command(plan, folder, *flags), plan.cpus_per_worker)
        result: dict[str, Any] = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    return result


def recipe_row(name: str, target: float, plan: Callable[[str], TrialPlan], recipe: str) -> Row:
    """A recipe against DefaultTrainer on the same plan, step by step in turns."""
    ours, peer = plan(recipe), plan("plain")
    threads = peer.cpus_per_worker
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        sides = turns.in_turns(ours_command(ours, first), peer_command(peer, second), threads=threads)
    found, theirs = by_blocks(sides[0].seconds, sides[1].seconds, ours.solver.global_batch_size)
    return Row(name, f"DefaultTrainer, {threads} thread(s)", "images/s", found, theirs, target, higher_is_better=True)


def reference_recipe() -> Row:
    """The demo's model, the same numerics, one worker of one thread."""
    return recipe_row("reference_recipe", 1.1, lambda recipe: demo(60, recipe=recipe), "reference")


def fast_recipe() -> Row:
    """The demo's model, everything on, one worker of one thread."""
    return recipe_row("fast_recipe", 1.4, lambda recipe: demo(60, recipe=recipe), "fast")


def fast_r50() -> Row:
    """The real R50-FPN at 320 px with batch 2, on all cores."""
    cpus = num_usable_cpus()
    return recipe_row("fast_r50", 2.2, lambda recipe: r50(30, cpus, recipe), "fast")


def evaluation() -> Row:
    """From the first image to COCO's figures with the demo's model, one thread; see `benchmarks.evaluating`."""
    plan = demo(1, recipe="fast", kind="time_to_train", eval_period_iterations=1000)

    def side(which: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            write_plan(_within(plan, folder), Path(folder, "plan.json"))
            result = Path(folder, "result.json")
            command = [sys.executable, "-m", "benchmarks.evaluating", f"{folder}/plan.json", str(result), which]
            run_process(command, plan.cpus_per_worker)
            return float(json.loads(result.read_text(encoding="utf-8"))["seconds"])

    found, theirs = alternate(lambda: side("ours"), lambda: side("peer"), 3)
    return Row("evaluation", "inference_on_dataset with COCOEvaluator", "s", tuple(found), tuple(theirs), 1.5,
               higher_is_better=False)  # fmt: skip


def experiment_command(config: dict[str, Any], folder: Path) -> list[str]:
    """Our command on an experiment, which is written to a folder; the run's folder is `run` in it."""
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [sys.executable, "-m", "orchestrator.run", str(path), "--output", str(folder / "run"), "--quiet"]


def demo_experiment(recipe: str, world_size: int, cpus: int, folder: Path, **changes: Any) -> dict[str, Any]:
    """The demo's experiment file with one trial, and `changes` to its parts."""
    values: dict[str, Any] = yaml.safe_load(DEFAULT_CONFIG.read_text(encoding="utf-8"))
    values["trials"] = {"world_sizes": [world_size], "scaling": "strong", "recipes": [recipe]}
    values["resources"] = {"device": "cpu", "cpus_per_worker": cpus}
    values["tracking"] = {"uri": f"sqlite:///{folder}/mlflow.db"}
    return {**values, **changes}


def launcher_tax() -> Row:
    """Steady images per second of two workers under Ray Train, and of the same function under torchrun.

    Each is started four times: of two identical processes, one is a hundredth faster from its start to its end.
    """
    steps = 80
    plan = demo(steps, world_size=2)
    protocol = {"kind": "throughput", "iterations": steps, "warmup_iterations": WARMUP_STEPS, "evaluate_at_end": False}
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    found: list[float] = []
    theirs: list[float] = []
    shares: list[float] = []
    for _ in range(4):
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            config = demo_experiment("reference", 2, 1, Path(first), protocol=protocol)
            under_ray = experiment_command(config, Path(first))
            ours, peer = turns.in_turns(under_ray, ours_command(plan, second, torchrun), num_ranks=2)
        rates = by_blocks(ours.seconds, peer.seconds, plan.solver.global_batch_size)
        found += rates[0]
        theirs += rates[1]
        shares.append(ours.others_seconds / sum(ours.seconds + peer.seconds))
    share = statistics.mean(shares)
    note = f"besides the workers, Ray and the driver took {share:.0%} of one core, during the turns of both sides"
    return Row("launcher_tax", "the same worker under torchrun, 2 workers", "images/s", tuple(found), tuple(theirs),
               0.99, higher_is_better=True, note=note)  # fmt: skip


def first_step() -> Row:
    """From the command to the first optimizer step; reported without a target.

    The start goes through Ray's public API and takes as long as that takes.
    """
    protocol = {"kind": "throughput", "iterations": 2, "warmup_iterations": 0}
    plan = demo(2)

    def ours() -> float:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            started = time.time()
            run_process(experiment_command(demo_experiment("fast", 1, 1, folder, protocol=protocol), folder), 1)
            (steps,) = (e for e in read_events(folder / "run" / "events.jsonl") if isinstance(e, StepsDone))
        return steps.time - steps.seconds + steps.step_seconds[0] - started

    def peer() -> float:
        started = time.time()
        return float(peer_result(plan)["first_step"]) - started

    found, theirs = alternate(ours, peer, 2)
    return Row("first_step", "the plain script's first step", "s", tuple(found), tuple(theirs), None,
               higher_is_better=False)  # fmt: skip


def time_to_target() -> Row:
    """From the command to the result at the demo's target: one process with all cores of the machine on both sides.

    Over three seeds: rounding alone decides at which evaluation one of them meets the target.
    """
    cpus = num_usable_cpus()
    values = yaml.safe_load(DEFAULT_CONFIG.read_text(encoding="utf-8"))
    plan = demo(1, cpus=cpus, **values["protocol"])
    found, theirs, iterations = [], [], []
    for seed in range(3):
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            experiment = demo_experiment("fast", 1, cpus, Path(first))
            experiment["trials"]["seeds"] = [seed]
            ours = experiment_command(experiment, Path(first))
            peer = peer_command(dataclasses.replace(plan, seed=seed), second, "--stop-at-target")
            seconds = [slots.ran(own) for own in slots.in_slots([ours, peer], threads=cpus)]
            result = json.loads(Path(second, "result.json").read_text(encoding="utf-8"))
            (trial,) = json.loads(Path(first, "run", "results.json").read_text(encoding="utf-8"))["trials"]
        if not (result["reached"] and trial["time_to_train_seconds"]):
            raise RuntimeError(f"a side did not reach the target with seed {seed}")
        found.append(seconds[0])
        theirs.append(seconds[1])
        iterations.append(f"{trial['iterations']} against {result['iterations']}")
    note = f"iterations with each seed: {', '.join(iterations)}"
    return Row("time_to_target", "DefaultTrainer, script to result", "s", tuple(found), tuple(theirs), 1.5,
               higher_is_better=False, note=note)  # fmt: skip
