"""Finds the training runs in a detectron2 log: starts, progress, evaluations, closing figures.

A file may hold several runs, or one run that was started again; two runs that wrote into one file at once are an error,
for their figures cannot be separated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from orchestrator.experiment.detectron_config import printed_values
from orchestrator.replay.evaluations import EvaluationReader, LoggedEvaluation
from orchestrator.replay.messages import Message, ReplayError

_WORLD = re.compile(r"Rank of current process: 0\. World size: (\d+)")
_START = re.compile(r"Starting training from iteration (\d+)")
_ITERATION = re.compile(r"\biter: (\d+)\b")
_FIGURE = re.compile(r"([\w/.-]+): (-?\d[\w.+-]*)")
_OVERALL = re.compile(r"Overall training speed: (\d+) iterations in (.+?) \(([\d.]+) s / it\)")
_TOTAL = re.compile(r"Total training time: (.+?) \((.+?) on hooks\)")
_IMAGES_LEFT = re.compile(r"Removed \d+ images with no usable annotations\. (\d+) images left")
_IMAGES_LOADED = re.compile(r"Loaded (\d+) images in COCO format from")
_SEED = re.compile(r"Using a (?:generated )?random seed (\d+)")
_MACHINES = re.compile(r"num_machines=(\d+)")

_CLOCK_TOLERANCE_SECONDS = 2.0
"""By how much lines of one process may be out of order."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One progress line."""

    iteration: int
    time: float | None
    """When it was printed (Unix seconds); None where the source has no times."""
    losses: dict[str, float]
    """Losses by detectron2's name (medians over the last 20 iterations, as printed)."""
    learning_rate: float | None
    mean_step_seconds: float | None
    """The printed `time`: the mean since the start of the process, not a sample."""
    data_seconds: float | None
    """The printed `data_time`: the mean over the last 20 iterations."""
    peak_memory_gib: float | None
    """The printed `max_mem`, which only GPUs have."""


@dataclass(slots=True)
class Launch:
    """One start of a training process; what its log does not hold is None."""

    began: float
    """Time of its first line (Unix seconds)."""
    ended: float
    """Time of its last line."""
    world_size: int | None = None
    num_nodes: int | None = None
    config: dict[str, str] = field(default_factory=dict)
    """The full config as dotted keys and the text of their values."""
    config_yaml: str = ""
    """The full config as printed."""
    environment: dict[str, str] = field(default_factory=dict)
    """The environment table."""
    seed: int | None = None
    num_train_images: int | None = None
    num_val_images: int | None = None
    first_iteration: int | None = None
    """Iterations done when it started."""
    loop_started: float | None = None
    """When training started (Unix seconds)."""
    progress: list[Progress] = field(default_factory=list)
    evaluations: list[LoggedEvaluation] = field(default_factory=list)
    overall: tuple[int, float] | None = None
    """The closing iterations and seconds per iteration."""
    total_seconds: float | None = None
    """The closing training time, hooks included."""
    total_printed: float | None = None
    """When that was printed."""
    clock_jumped: bool = False
    """Whether its clock was set back."""
    failed: str = ""
    """Last line of the exception that ended it; empty for none."""

    def number(self, key: str) -> float | None:
        """A config value as a number; None where it is missing or not a number."""
        try:
            return float(self.config[key])
        except (KeyError, ValueError):
            return None

    def integer(self, key: str) -> int | None:
        """A config value as an integer; None where it is missing or not a number."""
        value = self.number(key)
        return None if value is None else int(value)

    @property
    def iterations(self) -> int | None:
        """Iterations done at its last progress line."""
        return self.progress[-1].iteration if self.progress else self.first_iteration


@dataclass(slots=True)
class LoggedRun:
    """One run: its launches in order, each after the first resumed from a checkpoint."""

    source: Path
    launches: list[Launch]
    """At least one; the first may itself resume a run of another log."""
    notes: list[str]
    """What is missing or must be known to read its figures."""
    dated: bool = True
    """Whether its times are known."""


def find_runs(source: Path, messages: Sequence[Message], notes: Sequence[str]) -> list[LoggedRun]:
    """Finds the training runs in the messages of a file, in order; the notes apply to each of them.

    Raises:
        ReplayError: There is no training in it, or two runs are mixed.
    """
    runs: list[LoggedRun] = []
    launches = _LaunchReader(source, messages).launches
    trained = [launch for launch in launches if launch.first_iteration is not None or launch.progress]
    for launch in trained:
        if runs and _resumes(runs[-1].launches[-1], launch):
            runs[-1].launches.append(launch)
        else:
            runs.append(LoggedRun(source, [launch], list(notes)))
    if not runs:
        raise ReplayError(f"{source}: a detectron2 log without training: no start and no progress line")
    if dropped := len(launches) - len(trained):
        runs[0].notes.append(f"{dropped} starts that never reached training were left out")
    for run in runs:
        if any(_clock_is_wrong(launch) for launch in run.launches):
            run.dated = False
            run.notes.append("the log's clock jumps: its times cannot be trusted, and none is given")
        if len(runs) > 1:
            run.notes.append(f"the file holds {len(runs)} runs, which are separate trials here")
    return runs


def duration(text: str) -> float | None:
    """Seconds of a duration as Python prints it (`1 day, 2:03:04.5`); None where it is none."""
    match = re.fullmatch(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d(?:\.\d+)?)", text.strip())
    if not match:
        return None
    return int(match[1] or 0) * 86400 + int(match[2]) * 3600 + int(match[3]) * 60 + float(match[4])


def _clock_is_wrong(launch: Launch) -> bool:
    """Whether a launch's dates go back, or disagree with the training time that it closes with."""
    if launch.clock_jumped or launch.ended < launch.began:
        return True
    if launch.total_seconds is None or launch.total_printed is None or launch.loop_started is None:
        return False
    by_dates = launch.total_printed - launch.loop_started
    return abs(by_dates - launch.total_seconds) > max(60.0, 0.01 * launch.total_seconds)


def _resumes(before: Launch, after: Launch) -> bool:
    """Whether a launch continues the one before: same setup, and it starts at an iteration that was reached."""
    start, batch = after.first_iteration or 0, "SOLVER.IMS_PER_BATCH"
    setups = (before.world_size, after.world_size), (before.number(batch), after.number(batch))
    same = all(a is None or b is None or a == b for a, b in setups)
    # A checkpoint may be newer than the last progress line by less than one period of them.
    return start > 0 and same and before.overall is None and start <= (before.iterations or 0) + 20


class _LaunchReader:
    """Splits the messages of a log into launches, which `launches` holds."""

    def __init__(self, source: Path, messages: Sequence[Message]) -> None:
        self._source = source
        self._current = Launch(messages[0].time, messages[0].time)
        self._evaluations = EvaluationReader()
        self.launches = [self._current]
        for message in messages:
            self._read(message)
        self._finish()

    def _read(self, message: Message) -> None:
        world, start = _WORLD.search(message.text), _START.search(message.text)
        self._split(message, head=world is not None, start=start is not None)
        launch = self._current
        launch.clock_jumped |= message.time < launch.ended - _CLOCK_TOLERANCE_SECONDS
        launch.ended = message.time
        if world:
            launch.world_size = int(world[1])
        elif start:
            launch.first_iteration, launch.loop_started = int(start[1]), message.time
        elif (iteration := _ITERATION.search(message.text)) and "loss" in message.text:
            self._add_progress(int(iteration[1]) + 1, message)
            self._evaluations.interrupt()
        else:
            _add_facts(launch, message)
            self._evaluations.read(message, launch.iterations or 0, training=launch.first_iteration is not None)

    def _split(self, message: Message, *, head: bool, start: bool) -> None:
        """Begins a new launch where a message cannot belong to the current one."""
        current = self._current
        if head and (current.world_size is not None or current.progress):
            self._begin(Launch(message.time, message.time))
        elif start and current.first_iteration is not None:
            if not current.progress:
                raise ReplayError(f"{self._source}: two runs are mixed in this log (two starts before any progress)")
            # Started again within one process: its head holds for both.
            self._begin(
                replace(
                    current, began=message.time, ended=message.time, first_iteration=None, loop_started=None,
                    progress=[], evaluations=[], overall=None, total_seconds=None, total_printed=None,
                    clock_jumped=False, failed="",
                )
            )  # fmt: skip

    def _begin(self, launch: Launch) -> None:
        self._finish()
        self._current, self._evaluations = launch, EvaluationReader()
        self.launches.append(launch)

    def _finish(self) -> None:
        self._current.evaluations = self._evaluations.finished()

    def _add_progress(self, done: int, message: Message) -> None:
        launch = self._current
        if launch.progress and done <= launch.progress[-1].iteration:
            raise ReplayError(
                f"{self._source}: iteration {done} comes after {launch.progress[-1].iteration} without a new start: "
                "the log mixes several runs, and none of its figures could be trusted"
            )
        figures = {}
        for name, text in _FIGURE.findall(message.text):
            try:
                figures[name] = float(text.removesuffix("M"))
            except ValueError:
                continue
        memory = figures.get("max_mem")
        losses = {name: value for name, value in figures.items() if "loss" in name}
        launch.progress.append(
            Progress(
                done, message.time, losses, learning_rate=figures.get("lr"), mean_step_seconds=figures.get("time"),
                data_seconds=figures.get("data_time"), peak_memory_gib=None if memory is None else memory / 1024,
            )
        )  # fmt: skip


def _add_facts(launch: Launch, message: Message) -> None:
    """Takes what a message other than progress and evaluations says of the launch."""
    text = message.text
    if text.startswith("Running with full config"):
        launch.config_yaml = "\n".join(message.more)
        launch.config = printed_values(message.more)
    elif text.startswith("Environment info"):
        rows = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in message.more)
        launch.environment = {row[0]: row[1] for row in rows if len(row) == 2 and not row[0].startswith("-")}
    elif text.startswith("Exception during training"):
        launch.failed = next((line for line in reversed(message.more) if line.strip()), text)
    elif overall := _OVERALL.search(text):
        launch.overall = int(overall[1]), float(overall[3])
    elif total := _TOTAL.search(text):
        launch.total_seconds, launch.total_printed = duration(total[1]), message.time
    elif seed := _SEED.search(text):
        launch.seed = int(seed[1])
    elif machines := _MACHINES.search(text):
        launch.num_nodes = int(machines[1])
    elif images := _IMAGES_LEFT.search(text):
        launch.num_train_images = int(images[1])
    elif images := _IMAGES_LOADED.search(text):
        if launch.loop_started is not None:
            launch.num_val_images = int(images[1])
        elif launch.num_train_images is None:
            launch.num_train_images = int(images[1])
