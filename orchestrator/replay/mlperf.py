"""Turns a run of an MLPerf log into the plan and the events that this program's own trials leave.

MLPerf's lines name epochs, not iterations: these follow from the images of an epoch and the batch, or from the steps
that `tracked_stats` name.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.figures.logged_plan import LoggedDataset, LoggedPlan, LoggedSolver
from orchestrator.replay.mllog import Line, MllogRun, description_file, finite, system_name
from orchestrator.replay.trial import COCO_TARGETS, Targets
from trainers.contract.events import (
    Evaluated,
    Event,
    LogReplayed,
    LoopFinished,
    LoopStarted,
    StepsDone,
    TrialEnded,
    TrialStarted,
    WorkerStarted,
)

COCO_IMAGES = {"train_samples": (117_266, 118_287), "eval_samples": (5_000,)}
"""Images of COCO 2017 that the closed division trains (those with an object, or all) and evaluates."""

AP_NAMES = {"BBOX": "box_ap", "SEGM": "mask_ap"}

_WORKERS = re.compile(r"^(\d+) x (.+)$")
"""A platform as this program writes it: `8 x NVIDIA V100`; others count nodes there (`1xNVIDIA DGX A100`)."""


@dataclass(frozen=True, slots=True)
class System:
    """What a run ran on."""

    num_accelerators: int | None = None
    num_nodes: int | None = None
    accelerator: str = ""
    """Model name; empty where it is not known."""


@dataclass(frozen=True, slots=True)
class _Evaluation:
    epoch: float
    started: float
    stopped: float
    paused: float
    """When training paused for it (Unix seconds)."""
    resumed: float
    """When training went on; `stopped` where it did not."""
    scored: float
    figures: dict[str, float | None]


def mlperf_plan(run: MllogRun, name: str, targets: Targets | None) -> LoggedPlan:
    """The settings that a run's log prints; what it does not print is None."""
    values, system, division = run.values, system_of(run), run.values.get("submission_division")
    if targets is None:
        targets = Targets(*COCO_TARGETS) if division == "closed" else Targets(None, None)
    decays = values.get("opt_learning_rate_decay_steps")
    return LoggedPlan(
        name=name,
        source=str(run.source.absolute()),
        world_size=system.num_accelerators or 1,
        num_nodes=system.num_nodes,
        recipe_name=" ".join(filter(None, (_platform(run), system_name(run.source)))),
        precision=None,
        seed=_integer(values.get("seed")),
        scaling="weak",
        protocol="time_to_train",
        weights=None,
        train=LoggedDataset("coco_2017_train" if division == "closed" else None),
        val=LoggedDataset("coco_2017_val" if division == "closed" else None),
        solver=LoggedSolver(
            global_batch_size=_integer(values.get("global_batch_size")),
            base_lr=finite(values.get("opt_base_learning_rate")),
            max_iter=None,
            steps=tuple(map(int, filter(finite, decays))) if isinstance(decays, list) else None,
            warmup_iters=_integer(values.get("opt_learning_rate_warmup_steps")),
            eval_period=None,
            checkpoint_period=None,
        ),
        throughput_warmup_iters=0,
        target_box_ap=targets.box,
        target_mask_ap=targets.mask,
        device="cuda" if re.search("NVIDIA|Tesla", system.accelerator) else None,
    )


def system_of(run: MllogRun) -> System:
    """What a run ran on: by the submission's description of the system where its folder is there, else by the log."""
    if file := description_file(run.source):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            nodes, each = int(found["number_of_nodes"]), int(found["accelerators_per_node"])
            return System(nodes * each, nodes, str(found["accelerator_model_name"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a file that somebody copied out of its submission
    if own := _WORKERS.match(str(run.values.get("submission_platform", ""))):
        return System(int(own[1]), accelerator=own[2])
    batch, each_batch = (finite(run.values.get(key)) for key in ("global_batch_size", "d_batch_size"))
    number = max(run.num_processes, round(batch / each_batch) if batch and each_batch else 0)
    return System(number if number > 1 else None)


def mlperf_events(run: MllogRun, plan: LoggedPlan) -> list[Event]:
    """The events of a run, in order of their time."""
    return _EventWriter(run, plan).events


class _EventWriter:
    """Collects a run's events in `events`."""

    def __init__(self, run: MllogRun, plan: LoggedPlan) -> None:
        self._run, self._plan = run, plan
        self._notes = list(run.notes)
        self._images, self._val_images = (self._samples(key) for key in COCO_IMAGES)
        batch = plan.solver.global_batch_size
        self._per_epoch = self._images / batch if batch and self._images else None
        self._steps = _tracked_steps(run.lines)
        if self._per_epoch is None and not self._steps:
            self._notes.append("the log does not say its batch or its images: its iterations are epochs")
        if plan.world_size == 1:
            self._notes.append("the log does not say how many accelerators there were; it is listed as one")
        self.events: list[Event] = []
        system = system_of(run)
        self._emit(TrialStarted, run.began, -1, plan=asdict(plan))
        self._emit(
            WorkerStarted, run.began, host="", node_id="", pid=None, local_rank=0, device_memory_gib=None,
            device_name=system.accelerator, versions={}, world_size=plan.world_size,
        )  # fmt: skip
        self._emit(
            LoopStarted, run.started, iteration=0, num_train_images=self._images, num_val_images=self._val_images,
            setup_seconds=run.started - run.began, config_yaml="", restored_from="",
        )  # fmt: skip
        evaluations = self._evaluations()
        self._timeline(evaluations)
        self._close(*self._step_seconds(evaluations))

    def _emit(self, kind: type[Event], time: float, rank: int = 0, **fields: Any) -> None:
        self.events.append(kind(trial=self._plan.name, attempt=0, rank=rank, time=time, **fields))

    def _samples(self, key: str) -> int | None:
        """Images of an epoch, or of an evaluation: of the closed division COCO's, whatever the log calls them."""
        given = _integer(self._run.values.get(key))
        allowed = COCO_IMAGES[key]
        if self._run.values.get("submission_division") != "closed" or given in allowed:
            return given
        if given is not None:
            self._notes.append(f"{key} is {given:,} in the log; COCO 2017 has {allowed[0]:,}, which is taken")
        return allowed[0]

    def _evaluations(self) -> list[_Evaluation]:
        """The evaluations with a score; they may end while training goes on."""
        lines = self._run.lines
        stops, scores = (_by_epoch(lines, key) for key in ("eval_stop", "eval_accuracy"))
        found = []
        for epoch, start in _by_epoch(lines, "eval_start").items():
            if epoch not in scores:
                continue
            score = scores[epoch]
            stopped = max(stops[epoch].time if epoch in stops else score.time, score.time)
            paused = max((x.time for x in lines if x.key == "block_stop" and x.time <= start.time), default=start.time)
            going_on = (x.time for x in lines if x.key in ("block_start", "epoch_start") and x.time >= paused)
            resumed = min(going_on, default=stopped)
            found.append(_Evaluation(epoch, start.time, stopped, paused, resumed, score.time, _figures(score)))
        return found

    def _step_seconds(self, evaluations: Sequence[_Evaluation]) -> tuple[float | None, str]:
        """Seconds of a step, and where they are from."""
        batch = self._plan.solver.global_batch_size
        steps = [e for e in self.events if isinstance(e, StepsDone)]
        rates = [
            rate for line in self._run.lines if line.key == "tracked_stats" and isinstance(line.value, dict)
            if (rate := finite(line.value.get("throughput"))) and rate > 0
        ]  # fmt: skip
        seconds, number = sum(e.seconds for e in steps), sum(e.iteration - e.first_iteration for e in steps)
        own = f"{batch * number / seconds:,.2f}" if batch and seconds else ""
        if rates and batch:
            more = f"; by its steps and their times, without evaluations, it is {own}" if own and evaluations else ""
            return batch / statistics.median(rates), f"images/s is the median of the log's tracked_stats{more}"
        if seconds and number:
            return seconds / number, "images/s is the images of all epochs over their seconds, without evaluations"
        return None, "no step time was found: the throughput is not known"

    def _timeline(self, evaluations: Sequence[_Evaluation]) -> None:
        """Emits windows of steps and evaluations in the order of their ends."""
        pauses = [(e.paused, e.resumed) for e in evaluations]
        points = self._steps or self._epochs()
        made: list[tuple[float, _Evaluation | tuple[int, int, float]]] = [(e.stopped, e) for e in evaluations]
        before, since = 0, self._run.started
        for iteration, time in points:
            if iteration > before and time > since:
                paused = sum(max(0.0, min(end, time) - max(begin, since)) for begin, end in pauses)
                made.append((time, (before, iteration, max(time - since - paused, 0.0))))
                before = iteration
            since = time
        batch = self._plan.solver.global_batch_size
        for time, what in sorted(made, key=lambda each: each[0]):
            if isinstance(what, _Evaluation):
                self._evaluated(what)
            else:
                first, iteration, seconds = what
                self._emit(
                    StepsDone, time, first_iteration=first, iteration=iteration, seconds=seconds, step_seconds=(),
                    num_images=(iteration - first) * batch if batch else None, data_seconds=(), part_seconds={},
                    losses={}, learning_rate=None, peak_memory_gib=None, num_ranks=self._plan.world_size,
                )  # fmt: skip

    def _epochs(self) -> list[tuple[int, float]]:
        """Iterations done and when, at the end of each block of epochs, and at its beginning; none where unknown."""
        points, started, done = [], None, 0.0
        for line in self._run.lines if self._per_epoch else ():
            if line.key == "block_start" and started is None:
                started = line
                points.append((self._iteration(done, line.time), line.time))
            elif line.key == "block_stop" and started:
                done += started.number("epoch_count") or line.number("epoch_count") or 1.0
                started = None
                points.append((self._iteration(done, line.time), line.time))
        return points

    def _iteration(self, epochs: float, time: float) -> int:
        """Iterations after so many epochs, else by the steps that were logged until then, else the epochs."""
        if self._per_epoch:
            return round(epochs * self._per_epoch)
        return max((number for number, moment in self._steps if moment <= time), default=round(epochs))

    def _evaluated(self, evaluation: _Evaluation) -> None:
        concurrent = evaluation.resumed < evaluation.stopped
        masks = evaluation.figures.get("mask_ap") is not None
        self._emit(
            Evaluated, evaluation.stopped, iteration=self._iteration(evaluation.epoch, evaluation.started),
            epoch=evaluation.epoch, figures=evaluation.figures, box_scored=evaluation.scored,
            mask_scored=evaluation.scored if masks else None, seconds=evaluation.stopped - evaluation.started,
            part_seconds={"stall": evaluation.resumed - evaluation.paused} if concurrent else {},
        )  # fmt: skip

    def _close(self, step_seconds: float | None, source: str) -> None:
        run = self._run
        self._emit(
            LogReplayed, run.ended, -1, step_seconds=step_seconds, step_iterations=None, total_seconds=None,
            unknown=(), notes=(*self._notes, source), run_status=run.status or "missing",
            run_seconds=run.ended - run.started if run.succeeded else None,
        )  # fmt: skip
        done = [e.iteration for e in self.events if isinstance(e, StepsDone | Evaluated)]
        end = "target" if run.succeeded else "interrupted"
        self._emit(LoopFinished, run.ended, iteration=max(done, default=0), reason=end, state_sha256=None)
        why = f"run_stop says {run.status}" if run.status else "the log ends without run_stop"
        status, reason = ("FINISHED", "") if run.succeeded else ("KILLED", why)
        self._emit(TrialEnded, run.ended, -1, status=status, reason=reason)


def _by_epoch(lines: Sequence[Line], key: str) -> dict[float, Line]:
    """The first line of that key for each epoch; where a line names none, they are counted."""
    found: dict[float, Line] = {}
    for line in lines:
        if line.key == key:
            epoch = line.number("epoch_num", "epoch")
            found.setdefault(len(found) + 1.0 if epoch is None else epoch, line)
    return found


def _tracked_steps(lines: Sequence[Line]) -> list[tuple[int, float]]:
    """Steps done and when, where `tracked_stats` name them."""
    numbers = ((line.number("step", "step_num"), line.time) for line in lines if line.key == "tracked_stats")
    return [(int(number), time) for number, time in numbers if number is not None]


def _figures(score: Line) -> dict[str, float | None]:
    """AP, 0–100, of a line `eval_accuracy`: of boxes and masks, or of boxes alone where it has one number."""
    values = score.value if isinstance(score.value, dict) else {"BBOX": score.value}
    known = {str(key).upper(): finite(value) for key, value in values.items()}
    return {
        name: None if (ap := known.get(key)) is None else round(100 * ap, 8)
        for key, name in AP_NAMES.items()
        if key in known or key == "BBOX"
    }


def _platform(run: MllogRun) -> str:
    """Its submitter and platform, without the number of workers in front of it."""
    platform = str(run.values.get("submission_platform", ""))
    own = _WORKERS.match(platform)
    return own[2] if own else " ".join(filter(None, (str(run.values.get("submission_org", "")), platform)))


def _integer(value: Any) -> int | None:
    number = finite(value)
    return None if number is None else int(number)
