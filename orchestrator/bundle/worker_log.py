"""Compares a trial's events with `log.txt`, which detectron2's own logger wrote on the same worker."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.bundle.contents import BundledRun
from orchestrator.findings import FindingList
from trainers.contract.events import ClockChanged, Evaluated, Event, LoopStarted, StepsDone
from trainers.contract.plan import TrialPlan

MAX_LAG_SECONDS = 5.0
"""Most that a line comes after its event, on a busy machine; stamps have whole seconds."""

ZONE_SECONDS = 900.0
"""Stamps are local time, which is so many seconds, or a multiple, away from UTC."""

MAX_SPREAD_SECONDS = 3600.0
"""Summer time may begin or end within a run."""

_LINE = re.compile(r"^\[(\d\d)/(\d\d) (\d\d):(\d\d):(\d\d)\] (\S+) \w+: (.*)$")
_PROGRESS = re.compile(r"\biter: (\d+) .*?\blr: ([\d.e+-]+)")
_EVALUATION = re.compile(r"^Evaluation after (\d+) iterations: \{(.*)\}$")
_FIGURE = re.compile(r"'(\w+)': (None|nan|[\d.e+-]+)")
_START = re.compile(r"^Starting training from iteration (\d+)$")
_SPEED = re.compile(r"^Overall training speed: (\d+) iterations in .*\(([\d.]+) s / it\)$")

HINT = "Its worker's log.txt and its events were written together"


@dataclass(slots=True)
class _Log:
    """What a worker's log says, in its order."""

    starts: list[tuple[int, float | None]] = field(default_factory=list)
    """Iteration, and the stamp as Unix seconds where local time were UTC."""
    rates: list[tuple[int, str, float | None]] = field(default_factory=list)
    """Iterations done, printed learning rate, stamp."""
    evaluations: list[tuple[int, dict[str, float | None], float | None]] = field(default_factory=list)
    configs: list[str] = field(default_factory=list)
    speeds: list[tuple[int, float]] = field(default_factory=list)
    """Iterations that were measured, and seconds of each."""


def check_log(run: BundledRun, plan: TrialPlan, findings: FindingList) -> None:
    """Compares the events of a trial with the logs of its workers, where they are there."""
    path = run.place(plan.name, "log.txt")
    if not path.is_file():
        what = "there is no log.txt, so that its events have no witness"
        findings.warning("log_unchecked", f"{run.name}/{plan.name}", "", what, "Ask for it")
        return
    events = run.of(plan.name)
    log = _read(path, events[0].time)
    own = [event for event in events if event.rank == 0]
    place = f"{run.name}/{plan.name}/log.txt"
    for what in (*_steps(log, own), *_evaluations(log, own), *_config(log, own), *_speed(log, own, plan)):
        findings.error("log_disagrees", place, "", what, HINT)
    if any(isinstance(event, ClockChanged) for event in events):
        what = "somebody set the machine's clock, so that its stamps are not compared"
        findings.warning("log_unchecked", place, "stamps", what, "Look at the notes of the trial")
    elif problem := _stamps(log, own):
        findings.error("clock_moved", place, "", problem, HINT)
    for rank in range(1, plan.world_size):
        other = run.place(plan.name, f"log.txt.rank{rank}")
        if other.is_file():
            mine = [event for event in events if event.rank == rank]
            for what in _speed(_read(other, events[0].time), mine, plan):
                findings.error("log_disagrees", f"{place}.rank{rank}", "", what, HINT)


def _read(path: Path, begun: float) -> _Log:
    log = _Log()
    config: list[str] | None = None
    year = datetime.fromtimestamp(begun, UTC).year
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None:
            if config is not None:
                config.append(line)
            continue
        if config is not None:
            log.configs.append("\n".join(config))
            config = None
        *numbers, _, text = match.groups()
        stamp = _seconds(year, numbers, begun)
        if text == "Running with full config:":
            config = []
        elif found := _PROGRESS.search(text):
            log.rates.append((int(found[1]) + 1, found[2], stamp))
        elif found := _EVALUATION.match(text):
            figures = {
                name: None if value in ("None", "nan") else float(value) for name, value in _FIGURE.findall(found[2])
            }
            log.evaluations.append((int(found[1]), figures, stamp))
        elif found := _START.match(text):
            log.starts.append((int(found[1]), stamp))
        elif found := _SPEED.match(text):
            log.speeds.append((int(found[1]), float(found[2])))
    return log


def _seconds(year: int, numbers: Sequence[str], begun: float) -> float | None:
    """A stamp, which has no year, as Unix seconds where local time were UTC; None for no date."""
    try:
        month, day, hour, minute, second = map(int, numbers)
        moments = [datetime(y, month, day, hour, minute, second, tzinfo=UTC).timestamp() for y in (year, year + 1)]
    except ValueError:
        return None
    return min(moments, key=lambda moment: abs(moment - begun))


def _steps(log: _Log, own: Sequence[Event]) -> Iterator[str]:
    """Starts and windows that one has and the other lacks, and learning rates that differ."""
    loops = Counter(event.iteration for event in own if isinstance(event, LoopStarted))
    windows = {event.iteration: event.learning_rate for event in own if isinstance(event, StepsDone)}
    printed = Counter(iteration for iteration, _ in log.starts)
    if loops - printed or (printed - loops and len(loops) == 1):
        yield f"training starts at iteration {_numbers(printed)} in the log, at {_numbers(loops)} in the events"
    logged = {iteration: rate for iteration, rate, _ in log.rates}
    spare = loops.total() - 1  # a worker that was lost may have written a line, and not its event, or the other way
    if len(windows.keys() - logged.keys()) > spare:
        yield f"it has no line of iteration {min(windows.keys() - logged.keys())}, which the events have"
    if logged.keys() - windows.keys() and not spare:
        yield f"it has a line of iteration {min(logged.keys() - windows.keys())}, which the events have not"
    for iteration in sorted(logged.keys() & windows.keys()):
        rate = windows[iteration]
        if rate is not None and f"{rate:.5g}" != logged[iteration]:
            yield f"the rate at iteration {iteration} is {logged[iteration]} in the log, {rate:.5g} in the events"
            return


def _evaluations(log: _Log, own: Sequence[Event]) -> Iterator[str]:
    logged: dict[int, list[dict[str, float | None]]] = {}
    for iteration, figures, _ in log.evaluations:
        logged.setdefault(iteration, []).append(figures)
    for event in own:
        if not isinstance(event, Evaluated):
            continue
        if event.iteration not in logged:
            yield f"it has no evaluation after {event.iteration} iterations, which the events have"
            continue
        given = [
            name
            for name, value in event.figures.items()
            if not any(name in figures and _equal(figures[name], value) for figures in logged[event.iteration])
        ]
        if given:
            true = logged[event.iteration][0].get(given[0])
            what = f"after {event.iteration} iterations, {given[0]} is {true} in the log"
            yield f"{what}, {event.figures[given[0]]} in the events"
    evaluated = {event.iteration for event in own if isinstance(event, Evaluated)}
    if (extra := logged.keys() - evaluated) and len({event.attempt for event in own}) == 1:
        yield f"it has an evaluation after {min(extra)} iterations, which the events have not"


def _config(log: _Log, own: Sequence[Event]) -> Iterator[str]:
    ran = {event.config_yaml.strip() for event in own if isinstance(event, LoopStarted)}
    if log.configs and ran - {text.strip() for text in log.configs}:
        yield "the config that it prints is not that of the events"


def _speed(log: _Log, own: Sequence[Event], plan: TrialPlan) -> Iterator[str]:
    """The closing line of an undisturbed worker against the steps of its events."""
    finished = {event.attempt for event in own if isinstance(event, StepsDone)}
    if len(log.speeds) != 1 or len(finished) != 1:
        return
    seconds = [
        second
        for event in own
        if isinstance(event, StepsDone)
        for second in event.step_seconds[max(0, plan.throughput_warmup_iters - event.first_iteration) :]
    ]
    (number, each), mean = log.speeds[0], sum(seconds) / max(1, len(seconds))
    if number != len(seconds) or abs(each - mean) > 1e-4:
        yield f"it closes with {number} iterations of {each:.4f} s, the events have {len(seconds)} of {mean:.4f} s"


def _stamps(log: _Log, own: Sequence[Event]) -> str:
    """What is wrong with the log's stamps against the moments of the events; "" for nothing."""
    offsets = []
    for kind, stamps in (
        (LoopStarted, dict(log.starts)),
        (StepsDone, {iteration: stamp for iteration, _, stamp in log.rates}),
        (Evaluated, {iteration: stamp for iteration, _, stamp in log.evaluations}),
    ):
        times: dict[int, list[Event]] = {}
        for event in own:
            if isinstance(event, kind) and not (isinstance(event, Evaluated) and event.overlapped):
                times.setdefault(event.iteration, []).append(event)
        for iteration, events in times.items():
            stamp = stamps.get(iteration)
            if stamp is None or len(events) > 1:  # repeated after a restart
                continue
            ahead = stamp - events[0].time
            offset = round(ahead / ZONE_SECONDS) * ZONE_SECONDS
            if abs(ahead - offset) > MAX_LAG_SECONDS:
                return f"{events[0].kind} at iteration {iteration} is {abs(ahead - offset):.0f} s away from its line"
            offsets.append(offset)
    if offsets and max(offsets) - min(offsets) > MAX_SPREAD_SECONDS:
        return "its stamps and the events are more than an hour apart in some places, and not in others"
    return ""


def _equal(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


def _numbers(counts: Counter[int]) -> str:
    return ", ".join(map(str, sorted(counts.elements()))) or "none"
