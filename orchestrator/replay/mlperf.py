"""Turns a run of an MLPerf log into the events that this program's own trials leave.

MLPerf's lines name epochs, not iterations: these follow from the images of an epoch and the batch, or from the steps
that `tracked_stats` name.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.figures.accuracy import first_evaluations, first_to_meet
from orchestrator.figures.logged_plan import LoggedPlan
from orchestrator.replay.mllog import Line, MllogRun, finite, shown
from orchestrator.replay.mlperf_plan import count, system_of
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


def mlperf_events(run: MllogRun, plan: LoggedPlan) -> list[Event]:
    """The events of a run, in order of their time."""
    return _EventWriter(run, plan).events


class _EventWriter:
    """Collects a run's events in `events`."""

    def __init__(self, run: MllogRun, plan: LoggedPlan) -> None:
        self._run, self._plan = run, plan
        self._notes = list(run.notes)
        unreadable = [
            key for key in ("global_batch_size", *COCO_IMAGES) if key in run.values and count(run.values[key]) is None
        ]
        self._notes += [f"{key} is {shown(run.values[key])} in the log, which cannot be read" for key in unreadable]
        self._no_ap: dict[str, list[str]] = {}
        """Scores that are no AP, by their name in the log."""
        if run.flaw:
            self._notes.append(f"{run.flaw}: no time of this run is measured")
        self._images, self._val_images = (self._samples(key) for key in COCO_IMAGES)
        batch = plan.solver.global_batch_size
        self._per_epoch = self._images / batch if batch and self._images else None
        self._steps = _tracked_steps(run.lines)
        if self._per_epoch is None and not self._steps:
            unknown = (
                "its batch or its images are unreadable"
                if unreadable
                else "the log does not say its batch or its images"
            )
            self._notes.append(f"{unknown}: its iterations are epochs")
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
        given = count(self._run.values.get(key))
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
            found.append(
                _Evaluation(epoch, start.time, stopped, paused, resumed, score.time, self._figures(score, epoch))
            )
        for name, scores_of_name in self._no_ap.items():
            more = f", nor are {len(scores_of_name) - 1} more" if len(scores_of_name) > 1 else ""
            self._notes.append(f"eval_accuracy {name} is {scores_of_name[0]}, no AP of 0–1{more}: not measured")
        return found

    def _figures(self, score: Line, epoch: float) -> dict[str, float | None]:
        """AP, 0–100, of a line `eval_accuracy`: of boxes and masks, or of boxes alone where it has one number."""
        values = score.value if isinstance(score.value, dict) else {"BBOX": score.value}
        found = {str(key).upper(): value for key, value in values.items()}
        figures: dict[str, float | None] = {}
        for key, name in AP_NAMES.items():
            if key not in found:
                figures |= {name: None} if key == "BBOX" else {}
                continue
            ap = finite(found[key])
            figures[name] = round(100 * ap, 8) if ap is not None and 0 <= ap <= 1 else None
            if figures[name] is None:
                self._no_ap.setdefault(key, []).append(f"{shown(found[key])} at epoch {epoch:g}")
        return figures

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
        points = [] if self._run.flaw else self._steps or self._epochs()
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
        concurrent = evaluation.resumed < evaluation.stopped and not self._run.flaw
        seconds = evaluation.stopped - evaluation.started
        masks = evaluation.figures.get("mask_ap") is not None
        self._emit(
            Evaluated, evaluation.stopped, iteration=self._iteration(evaluation.epoch, evaluation.started),
            epoch=evaluation.epoch, figures=evaluation.figures, box_scored=evaluation.scored,
            mask_scored=evaluation.scored if masks else None, seconds=seconds if seconds >= 0 else None,
            part_seconds={"stall": evaluation.resumed - evaluation.paused} if concurrent else {},
        )  # fmt: skip

    def _close(self, step_seconds: float | None, source: str) -> None:
        run, plan = self._run, self._plan
        ended, is_whole = max(run.ended, run.started), run.succeeded and not run.flaw
        has_target = plan.target_box_ap is not None or plan.target_mask_ap is not None
        if run.succeeded and has_target and not first_to_meet(plan, first_evaluations(self.events)):
            self._notes.append(
                "run_stop says success, by which MLPerf scores, but no evaluation in the log meets the targets"
            )
        self._emit(
            LogReplayed, ended, -1, step_seconds=step_seconds, step_iterations=None, total_seconds=None,
            unknown=("start", "times") if run.flaw else (), notes=(*self._notes, source),
            run_status=run.status or "missing",
            run_seconds=ended - run.started if is_whole else None,
        )  # fmt: skip
        done = [e.iteration for e in self.events if isinstance(e, StepsDone | Evaluated)]
        end = "target" if is_whole else "interrupted"
        self._emit(LoopFinished, ended, iteration=max(done, default=0), reason=end, state_sha256=None)
        why = f"run_stop says {run.status}" if run.status else "the log ends without run_stop"
        why = "the time of run_stop cannot be read" if not run.status and "run_stop" in run.timeless else why
        status, reason = ("FINISHED", "") if is_whole else ("KILLED", run.flaw or why)
        self._emit(TrialEnded, ended, -1, status=status, reason=reason)


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
