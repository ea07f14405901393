"""Finds the training runs in a detectron2 log: starts, progress, evaluations, the closing figures.

The traps it protects against: one file may hold several runs, or one run that was started again; two runs writing into
one file at once would mix their figures (an error); and the printed `time:` is the mean since the start, not a sample.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.replay.lines import Message, ReplayError
from orchestrator.replay.scores import LoggedEvaluation, ScoreReader

_WORLD = re.compile(r"Rank of current process: (\d+)\. World size: (\d+)")
_START = re.compile(r"Starting training from iteration (\d+)")
_ITERATION = re.compile(r"\biter: (\d+)\b")
_FIGURE = re.compile(r"([\w/.-]+): (-?\d[\w.+-]*)")
_OVERALL = re.compile(r"Overall training speed: (\d+) iterations in (.+?) \(([\d.]+) s / it\)")
_TOTAL = re.compile(r"Total training time: (.+?) \((.+?) on hooks\)")
_IMAGES_LEFT = re.compile(r"Removed \d+ images with no usable annotations\. (\d+) images left")
_IMAGES_LOADED = re.compile(r"Loaded (\d+) images in COCO format from")
_SEED = re.compile(r"Using a (?:generated )?random seed (\d+)")
_MOMENT = 2.0
"""Seconds that lines of one process may stand out of order."""

_MACHINES = re.compile(r"num_machines=(\d+)")


@dataclass(frozen=True, slots=True)
class Progress:
    """One progress line.

    Attributes:
        iteration: Iterations done.
        time: When it was printed (Unix seconds); None where the source has no times.
        losses: Losses by detectron2's name (medians over the last 20 iterations, as printed).
        learning_rate: At that iteration.
        mean_step_seconds: The printed `time`: the mean since the start of the process.
        data_seconds: The printed `data_time`: the mean over the last 20 iterations.
        peak_memory_gib: The printed `max_mem`.
    """

    iteration: int
    time: float | None
    losses: dict[str, float]
    learning_rate: float | None
    mean_step_seconds: float | None
    data_seconds: float | None
    peak_memory_gib: float | None


@dataclass(slots=True)
class Launch:
    """One start of a training process.

    Attributes:
        began: Its first line (Unix seconds).
        ended: Its last line.
        world_size: Workers; None where its head is missing.
        num_nodes: Machines.
        config: The full config as dotted keys and the text of their values.
        config_yaml: The full config as it was printed.
        environment: The environment table.
        seed: Random seed.
        num_train_images: Images trained on per epoch.
        num_val_images: Images evaluated on.
        first_iteration: Iterations done when it started; None where training never started.
        loop_started: When training started.
        progress: Its progress lines.
        evaluations: Its evaluations.
        overall: The closing (iterations, seconds per iteration).
        total_seconds: The closing training time, hooks included.
        total_told: When it was printed.
        clock_jumped: Whether a line is dated more than a moment before the one above it.
        hook_seconds: Of which on hooks.
        failed: Its error, or "".
    """

    began: float
    ended: float
    world_size: int | None = None
    num_nodes: int | None = None
    config: dict[str, str] = field(default_factory=dict)
    config_yaml: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    num_train_images: int | None = None
    num_val_images: int | None = None
    first_iteration: int | None = None
    loop_started: float | None = None
    progress: list[Progress] = field(default_factory=list)
    evaluations: list[LoggedEvaluation] = field(default_factory=list)
    overall: tuple[int, float] | None = None
    total_seconds: float | None = None
    total_told: float | None = None
    clock_jumped: bool = False
    hook_seconds: float | None = None
    failed: str = ""

    def number(self, key: str) -> float | None:
        """A config value as a number; None where it is missing or no number."""
        try:
            return float(self.config[key])
        except (KeyError, ValueError):
            return None

    @property
    def iterations(self) -> int | None:
        """Iterations done at its last progress line."""
        return self.progress[-1].iteration if self.progress else self.first_iteration


@dataclass(slots=True)
class LoggedRun:
    """One run: its launches in order, the later ones gone on from a checkpoint.

    Attributes:
        source: File it was read from.
        launches: At least one; only the first may have started at an iteration other than 0 by an earlier log.
        notes: What is missing or must be known to read its figures.
        dated: Whether its times are known.
    """

    source: Path
    launches: list[Launch]
    notes: list[str]
    dated: bool = True


def find_runs(source: Path, messages: Sequence[Message], notes: Sequence[str]) -> list[LoggedRun]:
    """The training runs of a log, in order.

    Args:
        source: Where the messages come from, for messages.
        messages: The log.
        notes: Notes that go with every run.

    Raises:
        ReplayError: There is no training in it, or two runs are mixed.
    """
    runs: list[LoggedRun] = []
    dropped = 0
    for launch in _launches(source, messages):
        if launch.first_iteration is None and not launch.progress:
            dropped += 1
        elif runs and _goes_on(runs[-1].launches[-1], launch):
            runs[-1].launches.append(launch)
        else:
            runs.append(LoggedRun(source, [launch], list(notes)))
    if not runs:
        raise ReplayError(f"{source}: a detectron2 log without training: no start and no progress line")
    if dropped:
        runs[0].notes.append(f"{dropped} starts that never came to training were left out")
    for run in runs:
        if any(_clock_is_wrong(launch) for launch in run.launches):
            run.dated = False
            run.notes.append("the log's clock jumps: its times are not to be trusted, and none is given")
    if len(runs) > 1:
        for run in runs:
            run.notes.append(f"the file holds {len(runs)} runs, told one by one")
    return runs


def _clock_is_wrong(launch: Launch) -> bool:
    """Whether a launch's dates go back, or disagree with the training time that it closes with."""
    if launch.clock_jumped or launch.ended < launch.began:
        return True
    if launch.total_seconds is None or launch.total_told is None or launch.loop_started is None:
        return False
    by_dates = launch.total_told - launch.loop_started
    return abs(by_dates - launch.total_seconds) > max(60.0, 0.01 * launch.total_seconds)


def _goes_on(before: Launch, after: Launch) -> bool:
    """Whether a launch continues the one before: it starts at an iteration that was reached, with the same setup."""
    start = after.first_iteration or 0
    same = all(
        a is None or b is None or a == b
        for a, b in (
            (before.world_size, after.world_size),
            (before.number("SOLVER.IMS_PER_BATCH"), after.number("SOLVER.IMS_PER_BATCH")),
        )
    )
    # A checkpoint may be newer than the last progress line by less than one period of them.
    return start > 0 and same and before.overall is None and start <= (before.iterations or 0) + 20


def _launches(source: Path, messages: Sequence[Message]) -> list[Launch]:
    launches = [Launch(messages[0].time, messages[0].time)]
    scores = ScoreReader()
    for message in messages:
        world = _WORLD.search(message.text)
        start = _START.search(message.text)
        current = launches[-1]
        if world and world[1] == "0" and (current.world_size is not None or current.progress):
            _finish(current, scores)
            scores = ScoreReader()
            launches.append(Launch(message.time, message.time))
        elif start and current.first_iteration is not None:
            if not current.progress:
                raise ReplayError(f"{source}: two runs are mixed in this log (two starts before any progress)")
            _finish(current, scores)
            scores = ScoreReader()
            again = Launch(message.time, message.time, current.world_size, current.num_nodes, current.config)
            again.config_yaml, again.environment, again.seed = current.config_yaml, current.environment, current.seed
            again.num_train_images, again.num_val_images = current.num_train_images, current.num_val_images
            launches.append(again)
        current = launches[-1]
        current.clock_jumped |= message.time < current.ended - _MOMENT
        current.ended = message.time
        if world and world[1] == "0":
            current.world_size = int(world[2])
        elif start:
            current.first_iteration, current.loop_started = int(start[1]), message.time
        elif _ITERATION.search(message.text) and "loss" in message.text:
            _add_progress(source, current, message)
            scores.interrupt()
        else:
            _add_fact(current, message)
            scores.read(message, current.iterations or 0, training=current.first_iteration is not None)
    _finish(launches[-1], scores)
    return launches


def _add_progress(source: Path, launch: Launch, message: Message) -> None:
    iteration = _ITERATION.search(message.text)
    assert iteration is not None
    done = int(iteration[1]) + 1
    if launch.progress and done <= launch.progress[-1].iteration:
        raise ReplayError(
            f"{source}: iteration {done} comes after {launch.progress[-1].iteration} without a new start: "
            "the log mixes several runs, and no figure of it could be trusted"
        )
    figures = {}
    for name, text in _FIGURE.findall(message.text):
        try:
            figures[name] = float(text.removesuffix("M"))
        except ValueError:
            continue
    memory = figures.get("max_mem")
    launch.progress.append(
        Progress(
            iteration=done,
            time=message.time,
            losses={name: value for name, value in figures.items() if "loss" in name},
            learning_rate=figures.get("lr"),
            mean_step_seconds=figures.get("time"),
            data_seconds=figures.get("data_time"),
            peak_memory_gib=memory / 1024 if memory is not None else None,
        )
    )


def _add_fact(launch: Launch, message: Message) -> None:
    """Takes what a message other than progress and scores says of the launch."""
    text = message.text
    if overall := _OVERALL.search(text):
        launch.overall = int(overall[1]), float(overall[3])
    elif total := _TOTAL.search(text):
        launch.total_seconds, launch.hook_seconds = duration(total[1]), duration(total[2])
        launch.total_told = message.time
    elif text.startswith("Running with full config"):
        launch.config_yaml = "\n".join(message.more)
        launch.config = flat_config(message.more)
    elif text.startswith("Environment info"):
        rows = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in message.more)
        launch.environment = {row[0]: row[1] for row in rows if len(row) == 2 and not row[0].startswith("-")}
    elif images := _IMAGES_LEFT.search(text):
        launch.num_train_images = int(images[1])
    elif images := _IMAGES_LOADED.search(text):
        if launch.loop_started is not None:
            launch.num_val_images = int(images[1])
        elif launch.num_train_images is None:
            launch.num_train_images = int(images[1])
    elif seed := _SEED.search(text):
        launch.seed = int(seed[1])
    elif machines := _MACHINES.search(text):
        launch.num_nodes = int(machines[1])
    elif text.startswith("Exception during training"):
        launch.failed = next((line for line in reversed(message.more) if line.strip()), text)


def _finish(launch: Launch, scores: ScoreReader) -> None:
    launch.evaluations = scores.finished()


def duration(text: str) -> float | None:
    """Seconds of a duration as Python prints it (`1 day, 2:03:04.5`); None where it is none."""
    match = re.fullmatch(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d(?:\.\d+)?)", text.strip())
    if not match:
        return None
    return int(match[1] or 0) * 86400 + int(match[2]) * 3600 + int(match[3]) * 60 + float(match[4])


def flat_config(lines: Sequence[str]) -> dict[str, str]:
    """The values of a printed config (YAML indented by two blanks) as dotted keys, as text; lists with commas."""
    flat: dict[str, str] = {}
    path: list[str] = []
    for line in lines:
        item = re.match(r"^ *- (.*)$", line)
        if item and path:
            name = ".".join(path)
            flat[name] = f"{flat[name]}, {item[1]}" if name in flat else item[1]
            continue
        match = re.match(r"^( *)([\w.]+):(?: (.*))?$", line)
        if not match:
            continue
        path = [*path[: len(match[1]) // 2], match[2]]
        if match[3]:
            flat[".".join(path)] = match[3].strip().strip("'\"")
    return flat
