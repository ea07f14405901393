"""Reads the launches of a detectron2 log, one for each start of a training process: progress, evaluations, closing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from orchestrator.experiment.detectron_config import printed_values
from orchestrator.replay.evaluations import EvaluationReader, LoggedEvaluation
from orchestrator.replay.messages import Message
from orchestrator.replay.unpacking import ReplayError

_RANK = re.compile(r"Rank of current process: (\d+)\. World size: (\d+)$")
_START = re.compile(r"Starting training from iteration (\d+)\b")
_ITERATION = re.compile(r"\biter: (\d+)(?:/\d+)?(?=[\s,;]|$)")
_FIGURE = re.compile(r"([\w/.-]+): (-?\d[^\s_]*)(?!\S)")
_NAMED = re.compile(r"\s*(?:[A-Za-z_][\w/.\[\]-]*: \S+\s*)+")
_OVERALL = re.compile(r"Overall training speed: (\d+) iterations in (.+?) \(([\d.]+) s / it\)")
_TOTAL = re.compile(r"Total training time: (.+?) \((.+?) on hooks\)")
_IMAGES_LEFT = re.compile(r"Removed \d+ images with no usable annotations\. (\d+) images left")
_IMAGES_LOADED = re.compile(r"Loaded (\d+) images in COCO format from")
_SEED = re.compile(r"Using a (?:generated )?random seed (\d+)")
_MACHINES = re.compile(r"num_machines=(\d+)")

_CLOCK_TOLERANCE_SECONDS = 2.0
"""By how much lines of one process may be out of order."""


@dataclass(slots=True)
class Progress:
    """One progress line, of which a log may have a million."""

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
    finished: bool = False
    """Whether training came to its end."""
    rank: int = 0
    """Rank of the process that printed it: training is in the log of rank 0."""

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
    def has_training(self) -> bool:
        """Whether training began, as far as the log shows."""
        return self.first_iteration is not None or bool(self.progress)

    @property
    def iterations(self) -> int | None:
        """Iterations done at its last progress line."""
        return self.progress[-1].iteration if self.progress else self.first_iteration


def counts_from_one(iterations: Sequence[int]) -> bool:
    """Whether iterations of progress lines are numbered from 1, as `plain_train_net.py` did until September 2020.

    detectron2 prints every 20th iteration and the last one: numbered from 0, these are 19, 39, …, and from 1 20, 40, ….
    """
    regular = iterations[:-1]
    return len(regular) > 1 and all(iteration > 0 and iteration % 20 == 0 for iteration in regular)


def duration(text: str) -> float | None:
    """Seconds of a duration as Python prints it (`1 day, 2:03:04.5`); None where it is none."""
    match = re.fullmatch(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d(?:\.\d+)?)", text.strip())
    if not match:
        return None
    return int(match[1] or 0) * 86400 + int(match[2]) * 3600 + int(match[3]) * 60 + float(match[4])


class LaunchReader:
    """Splits the messages of a log into launches, which `launches` holds."""

    def __init__(self, source: Path, messages: Sequence[Message]) -> None:
        self._source = source
        found = (_ITERATION.search(message.text) for message in messages if _is_progress(message))
        first = [int(match[1]) for match in islice(found, 100) if match]
        self._offset = 0 if counts_from_one(first) else 1
        self._current = Launch(messages[0].time, messages[0].time)
        self._evaluations = EvaluationReader()
        self.launches = [self._current]
        for message in messages:
            self._read(message)
        self._finish()

    def _read(self, message: Message) -> None:
        progress = _ITERATION.search(message.text) if _is_progress(message) else None
        rank = None if progress else _RANK.search(message.text)
        start = None if progress else _START.search(message.text)
        self._split(message, head=rank is not None, start=start is not None)
        launch = self._current
        launch.clock_jumped |= message.time < launch.ended - _CLOCK_TOLERANCE_SECONDS
        launch.ended = message.time
        if rank:
            launch.rank, launch.world_size = int(rank[1]), int(rank[2])
        elif start:
            launch.first_iteration, launch.loop_started = int(start[1]), message.time
        elif progress:
            self._add_progress(int(progress[1]) + self._offset, message)
            self._evaluations.interrupt()
        else:
            _add_facts(launch, message)
            self._evaluations.read(
                message, launch.iterations or 0, training=launch.first_iteration is not None,
                closed=launch.overall is not None or launch.total_seconds is not None,
            )  # fmt: skip

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
                    clock_jumped=False, failed="", finished=False,
                )
            )  # fmt: skip

    def _begin(self, launch: Launch) -> None:
        self._finish()
        self._current, self._evaluations = launch, EvaluationReader()
        self.launches.append(launch)

    def _finish(self) -> None:
        launch = self._current
        launch.evaluations = self._evaluations.finished()
        launch.finished = launch.overall is not None and not launch.failed

    def _add_progress(self, done: int, message: Message) -> None:
        launch = self._current
        if launch.progress and done <= launch.progress[-1].iteration:
            raise ReplayError(
                f"{self._source}: iteration {done} comes after {launch.progress[-1].iteration} without a new start: "
                "the log mixes several runs, and none of its figures could be trusted"
            )
        figures = _progress_figures(message)
        memory = figures.get("max_mem")
        losses = {name: value for name, value in figures.items() if "loss" in name}
        launch.progress.append(
            Progress(
                done, message.time, losses, learning_rate=figures.get("lr"), mean_step_seconds=figures.get("time"),
                data_seconds=figures.get("data_time"), peak_memory_gib=None if memory is None else memory / 1024,
            )
        )  # fmt: skip


def _is_progress(message: Message) -> bool:
    text = message.text
    return "iter: " in text and ("loss" in text or message.logger.endswith("utils.events"))


def _progress_figures(message: Message) -> dict[str, float]:
    """The figures of a progress line; one that cannot be read as a number is left out."""
    text = message.text
    for line in message.more:
        if not _NAMED.fullmatch(line):
            break
        text += f" {line}"  # of a line that was wrapped between two figures
    figures: dict[str, float] = {}
    for name, value in _FIGURE.findall(text):
        try:
            number = float(value if value[-1].isdigit() else value.rstrip(",;M"))
        except ValueError:
            continue
        if math.isfinite(number) and name not in figures:
            figures[name] = number
    return figures


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
