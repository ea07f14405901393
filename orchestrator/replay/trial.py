"""Turns a run read from a log into the plan and the events that this program's own trials leave."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from orchestrator.figures.logged_plan import LoggedDataset, LoggedPlan, LoggedSolver
from orchestrator.replay.evaluations import LoggedEvaluation
from orchestrator.replay.iterations import LOG_PERIOD, evaluation_iterations
from orchestrator.replay.launches import Launch, Progress
from orchestrator.replay.runs import LoggedRun
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

COCO_TARGETS = (37.7, 33.9)
"""Box and mask AP at which Mask R-CNN on COCO 2017 counts as trained (MLPerf Training's and AI-Rank's rules)."""

RECIPE = "detectron2"
"""Recipe name of runs of other programs."""

VERSIONS = {"PyTorch": "torch", "detectron2": "detectron2", "torchvision": "torchvision", "Python": "python"}
"""Rows of detectron2's environment table, and the packages whose versions they hold."""

PRECISIONS: dict[str | None, Literal["fp32", "amp"]] = {"False": "fp32", "True": "amp"}
DEVICES: dict[str, Literal["cuda", "cpu"]] = {"cuda": "cuda", "cpu": "cpu"}


@dataclass(frozen=True, slots=True)
class Targets:
    """AP that counts as trained, 0–100; None for no target."""

    box: float | None
    mask: float | None


def known_targets(run: LoggedRun) -> Targets:
    """The targets of a run whose task has public ones: Mask R-CNN on COCO 2017, evaluated during training."""
    head = run.launches[0]
    if "coco_2017_val" not in head.config.get("DATASETS.TEST", "") or not head.integer("TEST.EVAL_PERIOD"):
        return Targets(None, None)
    has_masks = any("mask_ap" in evaluation.figures for launch in run.launches for evaluation in launch.evaluations)
    masks = head.config.get("MODEL.MASK_ON", str(has_masks)) == "True"
    return Targets(COCO_TARGETS[0], COCO_TARGETS[1] if masks else None)


def logged_plan(run: LoggedRun, name: str, targets: Targets) -> LoggedPlan:
    """The settings that the head of a run's log prints; what it does not print is None."""
    head = run.launches[0]
    eval_period, steps = head.integer("TEST.EVAL_PERIOD"), head.config.get("SOLVER.STEPS")
    return LoggedPlan(
        name=name,
        source=str(run.source.absolute()),
        world_size=head.world_size or 1,
        num_nodes=head.num_nodes,
        recipe_name=RECIPE,
        precision=PRECISIONS.get(head.config.get("SOLVER.AMP.ENABLED")),
        seed=head.seed,
        scaling="weak",
        protocol=_protocol(head),
        weights=head.config.get("MODEL.WEIGHTS"),
        train=_dataset(head, "DATASETS.TRAIN"),
        val=_dataset(head, "DATASETS.TEST"),
        solver=LoggedSolver(
            global_batch_size=head.integer("SOLVER.IMS_PER_BATCH"),
            base_lr=head.number("SOLVER.BASE_LR"),
            max_iter=head.integer("SOLVER.MAX_ITER"),
            steps=tuple(int(step) for step in re.findall(r"\d+", steps)) if steps is not None else None,
            warmup_iters=head.integer("SOLVER.WARMUP_ITERS"),
            eval_period=eval_period,
            checkpoint_period=head.integer("SOLVER.CHECKPOINT_PERIOD"),
        ),
        throughput_warmup_iters=LOG_PERIOD,
        target_box_ap=targets.box,
        target_mask_ap=targets.mask,
        device=DEVICES.get(head.config.get("MODEL.DEVICE", "cuda" if gpu_name(head) else "")),
    )


def _protocol(launch: Launch) -> Literal["throughput", "time_to_train"] | None:
    eval_period = launch.integer("TEST.EVAL_PERIOD")
    if eval_period is None or not launch.has_training:
        return None
    return "time_to_train" if eval_period else "throughput"


def _dataset(launch: Launch, key: str) -> LoggedDataset:
    name = re.search(r"[\w-]+", launch.config.get(key, ""))
    return LoggedDataset(name[0] if name else None)


def gpu_name(launch: Launch) -> str | None:
    """Model name of the GPU in a launch's environment table; None where it names none."""
    for key, value in launch.environment.items():
        if key.startswith("GPU ") and key != "GPU available":
            return re.sub(r" \(arch=.*", "", value)
    return None


def _without_ap(evaluation: LoggedEvaluation, *, dated: bool) -> str:
    """What to say of evaluations without any AP, with a gap for their iterations."""
    if evaluation.found_nothing:
        return "the model found nothing at {}: no AP was measured"
    if not evaluation.figures:
        return "no AP can be read of the evaluation at {}"
    if dated:
        return "no AP was measured at {}: the log has nan or -1 there"
    return "the model found nothing at {}, or there was nothing to find: no AP was measured"


def replayed_events(run: LoggedRun, plan: LoggedPlan) -> list[Event]:
    """The events of a run, in the order of its log."""
    return _EventWriter(run, plan).events


class _EventWriter:
    """Collects a run's events in `events`."""

    def __init__(self, run: LoggedRun, plan: LoggedPlan) -> None:
        self._run, self._plan = run, plan
        self._notes = list(run.notes)
        self._attempt = 0
        self._nothing: dict[str, list[int]] = {}
        """What an evaluation says instead of an AP, and the iterations of those that do."""
        self.events: list[Event] = []
        if run.launches[0].world_size is None:
            self._notes.append("the log does not say how many workers there were; it is listed as one")
        unknown = self._unknown(run.launches[0])
        for attempt, launch in enumerate(run.launches):
            self._attempt = attempt
            self._launch(launch)
        self._close(run.launches[-1], unknown)

    def _emit(self, kind: type[Event], time: float, rank: int = 0, **fields: Any) -> None:
        self.events.append(kind(trial=self._plan.name, attempt=self._attempt, rank=rank, time=time, **fields))

    def _unknown(self, first: Launch) -> tuple[str, ...]:
        if not self._run.dated:
            return ("times", "start")
        if not first.has_training:
            self._notes.append("the log is of an evaluation without training (--eval-only)")
        elif first.first_iteration is None:
            self._notes.append("no start of training was found: start-up and times from the start are not known")
        elif first.first_iteration > 0:
            self._notes.append(
                f"the run resumes at iteration {first.first_iteration}, and its beginning is not in this log: "
                "times from the start are not known"
            )
        else:
            return ()
        return ("start",)

    def _launch(self, launch: Launch) -> None:
        if self._attempt == 0:
            self._emit(TrialStarted, launch.began, -1, plan=asdict(self._plan))
        else:
            before = self._run.launches[self._attempt - 1]
            self._emit(
                TrialRestarted, launch.began, -1, failure="unknown",
                message=before.failed or "the log does not say why", iteration=before.iterations or 0,
            )  # fmt: skip
        self._emit(
            WorkerStarted, launch.began, host="", node_id="", pid=None, local_rank=0, device_memory_gib=None,
            device_name=gpu_name(launch) or ("CPU" if self._plan.device == "cpu" else ""),
            versions={
                name: launch.environment[row].split(" ")[0] for row, name in VERSIONS.items()
                if launch.environment.get(row)
            },
            world_size=launch.world_size,
        )  # fmt: skip
        if launch.has_training:
            self._loop(launch)
        self._evaluations(launch)

    def _loop(self, launch: Launch) -> None:
        started = launch.loop_started if launch.loop_started is not None else launch.began
        first = launch.first_iteration
        if first is None:
            # Without its start, what was trained before the first line is not known.
            first = launch.progress[0].iteration
        self._emit(
            LoopStarted, started, iteration=first, num_train_images=launch.num_train_images,
            num_val_images=launch.num_val_images, config_yaml=launch.config_yaml,
            setup_seconds=started - launch.began if launch.loop_started is not None else None,
            restored_from="checkpoint" if self._attempt else "",
        )  # fmt: skip
        if self._run.dated:
            self._windows(launch, first, started)

    def _windows(self, launch: Launch, first: int, started: float) -> None:
        before, since = first, started
        for line in launch.progress:
            if line.time is None:
                continue
            if line.iteration > before:
                stalls = sum(
                    min(e.ended, line.time) - max(e.started, since)
                    for e in launch.evaluations
                    if e.started < line.time and e.ended > since
                )
                self._window(line, line.time, before, max(line.time - since - stalls, 0.0))
                before = line.iteration
            since = line.time

    def _window(self, line: Progress, time: float, before: int, seconds: float) -> None:
        count, batch = line.iteration - before, self._plan.solver.global_batch_size
        self._emit(
            StepsDone, time, first_iteration=before, iteration=line.iteration,
            num_images=count * batch if batch is not None else None, seconds=seconds, step_seconds=(), data_seconds=(),
            part_seconds={"data": line.data_seconds * count} if line.data_seconds is not None else {},
            losses=line.losses, learning_rate=line.learning_rate, peak_memory_gib=line.peak_memory_gib,
            num_ranks=self._plan.world_size,
        )  # fmt: skip

    def _evaluations(self, launch: Launch) -> None:
        names = [e.dataset for e in launch.evaluations if e.dataset]
        batch = self._plan.solver.global_batch_size
        iterations, notes = evaluation_iterations(launch) if launch.has_training else self._weights(launch)
        self._notes += notes
        for evaluation, iteration in zip(launch.evaluations, iterations, strict=True):
            figures = evaluation.figures
            if not figures and not evaluation.complete:
                self._notes.append("the log breaks off in an evaluation, which was left out")
                continue
            if evaluation.dataset and evaluation.dataset != names[0]:
                self._notes.append(f"an evaluation on {evaluation.dataset} was left out: {names[0]} is the first one's")
                continue
            if all(value is None for value in figures.values()):
                self._nothing.setdefault(_without_ap(evaluation, dated=self._run.dated), []).append(iteration)
            inference = evaluation.inference_seconds
            scored = evaluation.box_scored if evaluation.box_scored is not None else evaluation.ended
            self._emit(
                Evaluated, evaluation.ended, iteration=iteration, figures={"box_ap": None, **figures},
                epoch=iteration * batch / launch.num_train_images if batch and launch.num_train_images else None,
                box_scored=scored, mask_scored=evaluation.mask_scored, keypoint_scored=evaluation.keypoint_scored,
                seconds=evaluation.ended - evaluation.started if self._run.dated else None,
                part_seconds={"inference": inference} if inference is not None else {},
            )  # fmt: skip

    def _weights(self, launch: Launch) -> tuple[list[int], list[str]]:
        """Iterations of evaluations without training: those of the checkpoint, where its name has them."""
        weights = launch.config.get("MODEL.WEIGHTS", "")
        checkpoint = re.search(r"model_(\d{7})\.pth", weights)
        if checkpoint:
            return [int(checkpoint[1]) + 1] * len(launch.evaluations), []
        note = f"how far {weights or 'the model'} was trained is not known: its evaluation is listed at iteration 0"
        return [0] * len(launch.evaluations), [note]

    def _close(self, last: Launch, unknown: tuple[str, ...]) -> None:
        step_seconds = self._step_seconds(last) if last.has_training else None
        launches = len(self._run.launches)
        if launches > 1 and self._run.dated:
            self._notes.append(
                f"started {launches} times: the throughput is of the last start, from iteration {last.first_iteration}"
            )
        for what, iterations in self._nothing.items():
            plural = "s" if len(iterations) > 1 else ""
            self._notes.append(what.format(f"iteration{plural} {', '.join(map(str, dict.fromkeys(iterations)))}"))
        whole = launches == 1 and last.first_iteration == 0
        self._emit(
            LogReplayed, last.ended, -1, step_seconds=step_seconds,
            step_iterations=last.overall[0] if whole and last.overall else None,
            total_seconds=last.total_seconds if whole else None,
            unknown=unknown, notes=tuple(dict.fromkeys(self._notes)),
        )  # fmt: skip
        if last.has_training and (last.finished or not self._run.dated):
            # Without windows of steps, only the end shows how far it came.
            end = "max_iter" if last.finished else "interrupted"
            self._emit(LoopFinished, last.ended, iteration=last.iterations or 0, reason=end, state_sha256=None)
        if last.finished or (last.evaluations and not last.has_training and last.evaluations[-1].complete):
            self._emit(TrialEnded, last.ended, -1, status="FINISHED", reason="")
        else:
            planned = self._plan.solver.max_iter
            of = f" of {planned}" if planned else ""
            after = f"after iteration {last.iterations}{of}" if last.has_training else "in an evaluation"
            status = "FAILED" if last.failed else "KILLED"
            self._emit(TrialEnded, last.ended, -1, status=status, reason=last.failed or f"the log ends {after}")

    def _step_seconds(self, last: Launch) -> float | None:
        """The mean step that the log closes with, else the one it had reached."""
        if last.overall:
            return last.overall[1]
        if last.progress and last.progress[-1].mean_step_seconds:
            self._notes.append(
                f"no closing speed was found: the throughput is of the mean step printed at iteration {last.iterations}"
            )
            return last.progress[-1].mean_step_seconds
        self._notes.append("no step time was found: the throughput is not known")
        return None
