"""Turns a run read off a log into a plan and events, so that it goes the way of a run of ours: results, tracking, all.

The traps it protects against: an evaluation is printed before the progress line of its iteration, so the line before it
names the wrong one; and what a log does not hold must come out as null, although a plan has no gaps.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.replay.runs import Launch, LoggedRun, Progress
from orchestrator.replay.scores import LoggedEvaluation
from trainers.contract.events import (
    Evaluated,
    Event,
    LogReplayed,
    LoopFinished,
    LoopStarted,
    StepsDone,
    TrialEnded,
    TrialRestarted,
    TrialStarted,
    WorkerStarted,
)
from trainers.contract.plan import DatasetPlan, SolverPlan, TrialPlan
from trainers.recipes import Recipe

COCO_TARGETS = (37.7, 33.9)
"""Box and mask AP at which Mask R-CNN on COCO 2017 counts as trained (MLPerf Training's and AI-Rank's rules)."""

RECIPE = "detectron2"
"""Recipe of runs that were made without us."""

_LOG_PERIOD = 20
"""Iterations between detectron2's progress lines."""


@dataclass(frozen=True, slots=True)
class Targets:
    """AP that counts as trained.

    Attributes:
        box: Box AP, 0–100; None for none.
        mask: Mask AP, 0–100; None for none.
    """

    box: float | None
    mask: float | None


def known_targets(run: LoggedRun) -> Targets:
    """The targets of a run whose task has public ones: Mask R-CNN on COCO 2017 with evaluations on the way."""
    config = run.launches[0].config
    if "coco_2017_val" not in config.get("DATASETS.TEST", "") or not (run.launches[0].number("TEST.EVAL_PERIOD") or 0):
        return Targets(None, None)
    return Targets(COCO_TARGETS[0], COCO_TARGETS[1] if config.get("MODEL.MASK_ON") == "True" else None)


def replayed_events(run: LoggedRun, name: str, targets: Targets, trial_dir: str) -> tuple[TrialPlan, list[Event]]:
    """The plan and the events of a run from a log.

    Args:
        run: The run.
        name: Name for it.
        targets: What counts as trained.
        trial_dir: Folder of its log.
    """
    plan, unknown = _plan(run.launches[0], name, targets, trial_dir)
    return plan, _EventWriter(run, plan, unknown).events()


class _EventWriter:
    def __init__(self, run: LoggedRun, plan: TrialPlan, unknown: list[str]) -> None:
        self.run, self.plan, self.unknown = run, plan, unknown
        self.notes = list(run.notes)
        self.told: list[Event] = []
        self.attempt = 0

    def _emit(self, kind: type[Event], time: float, rank: int = 0, **fields: Any) -> None:
        self.told.append(kind(trial=self.plan.name, attempt=self.attempt, rank=rank, time=time, **fields))

    def events(self) -> list[Event]:
        launches = self.run.launches
        self._judge_start(launches[0])
        for position, launch in enumerate(launches):
            self.attempt = position
            if position:
                before = launches[position - 1]
                self._emit(
                    TrialRestarted, launch.began, -1, failure="unknown",
                    message=before.failed or "the log does not say why", iteration=before.iterations or 0,
                )  # fmt: skip
            self._launch(launch)
        self._close(launches[-1])
        return self.told

    def _judge_start(self, first: Launch) -> None:
        if not self.run.dated:
            self.unknown += ["evaluation_seconds", "data_wait_share", "evaluations_clock"]
        elif first.first_iteration is None:
            self.notes.append("the log has no start of training: start-up and times from the start are not known")
        elif first.first_iteration > 0:
            self.notes.append(
                f"the run goes on from iteration {first.first_iteration}, and its beginning is not in this log: "
                "times from the start are not known"
            )
        else:
            return
        self.unknown += [
            "startup_seconds", "schedule_seconds", "time_to_train_seconds", "time_to_box_target_seconds",
            "mlperf_seconds", "sections", "wall_images_per_second",
        ]  # fmt: skip

    def _launch(self, launch: Launch) -> None:
        if self.attempt == 0:
            self._emit(TrialStarted, launch.began, -1, plan=asdict(self.plan))
        for rank in range(self.plan.world_size):
            self._emit(
                WorkerStarted, launch.began, rank, host="unknown", node_id="", pid=0, local_rank=rank,
                device_name=_device_name(launch), device_memory_gib=None, versions=_versions(launch),
            )  # fmt: skip
        started = launch.loop_started if launch.loop_started is not None else launch.began
        first = launch.first_iteration
        if first is None:
            # Without its start, what was trained before the first line is not known.
            first = launch.progress[0].iteration
        self._emit(
            LoopStarted, started, iteration=first, num_train_images=launch.num_train_images or 0,
            num_val_images=launch.num_val_images or 0, setup_seconds=started - launch.began,
            config_yaml=launch.config_yaml, restored_from="" if not self.attempt else "checkpoint",
        )  # fmt: skip
        self._windows(launch, first, started)
        self._evaluations(launch)

    def _windows(self, launch: Launch, first: int, started: float) -> None:
        if not self.run.dated:
            return
        before, since = first, started
        for line in launch.progress:
            if line.iteration > before and line.time is not None:
                stalls = sum(
                    min(e.ended, line.time) - max(e.started, since)
                    for e in launch.evaluations
                    if e.started < line.time and e.ended > since
                )
                self._window(line, before, max(line.time - since - stalls, 0.0))
                before = line.iteration
            since = line.time if line.time is not None else since

    def _window(self, line: Progress, before: int, seconds: float) -> None:
        count = line.iteration - before
        assert line.time is not None
        self._emit(
            StepsDone, line.time, first_iteration=before, iteration=line.iteration,
            num_images=count * self.plan.solver.global_batch_size, seconds=seconds, step_seconds=(), data_seconds=(),
            part_seconds={"data": line.data_seconds * count} if line.data_seconds is not None else {},
            losses=line.losses, learning_rate=line.learning_rate or 0.0,
            peak_memory_gib=line.peak_memory_gib or 0.0, num_ranks=self.plan.world_size,
        )  # fmt: skip

    def _evaluations(self, launch: Launch) -> None:
        names = [e.dataset for e in launch.evaluations if e.dataset]
        for evaluation in launch.evaluations:
            if evaluation.box_scored is None:
                self.notes.append("the log breaks off in an evaluation, which was left out")
                continue
            if evaluation.dataset and evaluation.dataset != names[0]:
                self.notes.append(f"an evaluation on {evaluation.dataset} was left out: {names[0]} is the first one's")
                continue
            iteration = self._iteration(launch, evaluation)
            parts = {}
            if evaluation.inference_seconds is not None:
                parts["inference"] = evaluation.inference_seconds
            self._emit(
                Evaluated, evaluation.ended, iteration=iteration,
                epoch=iteration * self.plan.solver.global_batch_size / (launch.num_train_images or 1),
                figures=evaluation.figures, box_scored=evaluation.box_scored, mask_scored=evaluation.mask_scored,
                seconds=evaluation.ended - evaluation.started, part_seconds=parts,
            )  # fmt: skip

    def _iteration(self, launch: Launch, evaluation: LoggedEvaluation) -> int:
        """Iterations trained at an evaluation: the multiple of its period between the progress lines around it."""
        after = evaluation.after_iteration
        following = next((line.iteration for line in launch.progress if line.iteration > after), None)
        period = int(launch.number("TEST.EVAL_PERIOD") or 0)
        if following is None and launch.overall:
            return after
        if period:
            due = -(-after // period) * period
            if due and due <= (following if following is not None else after + _LOG_PERIOD):
                return due
        self.notes.append(f"an evaluation's iteration is known to {_LOG_PERIOD} iterations only")
        return following if following is not None else after

    def _close(self, last: Launch) -> None:
        step_seconds, step_iterations = last.overall[1] if last.overall else None, None
        if last.overall:
            step_iterations = last.overall[0]
        elif last.progress and last.progress[-1].mean_step_seconds:
            step_seconds = last.progress[-1].mean_step_seconds
            self.notes.append(
                f"no closing speed: the throughput is of the mean step printed at iteration {last.iterations}"
            )
        if step_seconds is None:
            self.notes.append("no step time in the log: the throughput is not known")
        if len(self.run.launches) > 1:
            self.notes.append(
                f"started {len(self.run.launches)} times: the throughput is of the last start, "
                f"from iteration {last.first_iteration}"
            )
        single = len(self.run.launches) == 1 and last.first_iteration == 0
        self._emit(
            LogReplayed, last.ended, -1, step_seconds=step_seconds,
            step_iterations=step_iterations if single else None,
            total_seconds=last.total_seconds if single else None,
            unknown=tuple(self.unknown), notes=tuple(dict.fromkeys(self.notes)),
        )  # fmt: skip
        planned = last.number("SOLVER.MAX_ITER")
        done = last.iterations or 0
        if last.overall or not self.run.dated:
            # Without windows of steps, the end alone tells how far it came.
            end = "max_iter" if last.overall else "interrupted"
            self._emit(LoopFinished, last.ended, iteration=done, reason=end, state_sha256="")
        if last.overall:
            self._emit(TrialEnded, last.ended, -1, status="FINISHED", reason="")
        else:
            of = f" of {planned:.0f}" if planned else ""
            reason = last.failed or f"the log ends after iteration {last.iterations}{of}"
            self._emit(TrialEnded, last.ended, -1, status="FAILED" if last.failed else "KILLED", reason=reason)


def _plan(launch: Launch, name: str, targets: Targets, trial_dir: str) -> tuple[TrialPlan, list[str]]:
    """The plan a log implies, and the fields of the result that it had to make up."""
    unknown = ["peak_memory_gib"] if all(p.peak_memory_gib is None for p in launch.progress) else []
    unknown += ["seed"] if launch.seed is None else []
    unknown += ["state_sha256", "checkpoint_seconds"]

    def number(key: str, *fields: str) -> float:
        value = launch.number(key)
        if value is None:
            unknown.extend(fields)
        return value or 0.0

    for count, field_name in ((launch.num_train_images, "num_train_images"), (launch.num_val_images, "num_val_images")):
        unknown += [field_name] if count is None else []
    eval_period = int(number("TEST.EVAL_PERIOD"))
    solver = SolverPlan(
        global_batch_size=int(
            number("SOLVER.IMS_PER_BATCH", "global_batch_size", "images_per_second", "wall_images_per_second")
        ),
        base_lr=number("SOLVER.BASE_LR", "base_lr"),
        max_iter=int(number("SOLVER.MAX_ITER", "max_iter")),
        steps=tuple(int(step) for step in re.findall(r"\d+", launch.config.get("SOLVER.STEPS", ""))),
        warmup_iters=int(number("SOLVER.WARMUP_ITERS")),
        eval_period=eval_period,
        evaluate_at_end=True,
        checkpoint_period=int(number("SOLVER.CHECKPOINT_PERIOD")),
    )
    plan = TrialPlan(
        experiment="replay",
        name=name,
        world_size=launch.world_size or 1,
        num_nodes=launch.num_nodes,
        recipe_name=RECIPE,
        recipe=Recipe(),
        seed=launch.seed or 0,
        scaling="weak",
        protocol="time_to_train" if eval_period else "throughput",
        config_file="",
        overrides={},
        weights=launch.config.get("MODEL.WEIGHTS"),
        weights_sha256=None,
        train=DatasetPlan(_first_name(launch.config.get("DATASETS.TRAIN")), "", ""),
        val=DatasetPlan(_first_name(launch.config.get("DATASETS.TEST")), "", ""),
        num_classes=None,
        solver=solver,
        throughput_warmup_iters=_LOG_PERIOD,
        target_box_ap=targets.box,
        target_mask_ap=targets.mask,
        stop_at_target=False,
        device="cpu" if launch.config.get("MODEL.DEVICE") == "cpu" else "cuda",
        cpus_per_worker=1,
        loader_workers=int(number("DATALOADER.NUM_WORKERS")),
        log_period=_LOG_PERIOD,
        trial_dir=trial_dir,
        checkpoint_dir="",
        keep_checkpoints=1,
    )
    return plan, unknown


def _first_name(text: str | None) -> str:
    match = re.search(r"[\w-]+", text or "")
    return match[0] if match else "unknown"


def _device_name(launch: Launch) -> str:
    for key, value in launch.environment.items():
        if key.startswith("GPU ") and key != "GPU available":
            return re.sub(r" \(arch=.*", "", value)
    return "CPU" if launch.config.get("MODEL.DEVICE") == "cpu" else "unknown"


def _versions(launch: Launch) -> dict[str, str]:
    names = {"PyTorch": "torch", "detectron2": "detectron2", "torchvision": "torchvision", "Python": "python"}
    return {name: launch.environment[key].split(" ")[0] for key, name in names.items() if launch.environment.get(key)}
