"""Splits a detectron2 log into dated messages.

The log prints no year, so it is found such that a run over New Year or the end of February neither gains nor loses a
day. A last line that was cut off is dropped: half a number would still parse.
"""

from __future__ import annotations

import calendar
import datetime
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

MAX_LINE_LENGTH = 1_000_000
"""Characters of a line that are examined; longer ones are no log lines."""

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_HEAD = re.compile(
    r"^\[(?P<month>\d\d)/(?P<day>\d\d) (?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d)"
    r"(?: (?P<short>[\w.]+))?\]:? *(?:(?P<name>[\w.]+) (?:DEBUG|INFO|WARNING|ERROR|CRITICAL): )?(?P<text>.*)$"
)
_HEAD_WITHIN = re.compile(r"\[\d\d/\d\d \d\d:\d\d:\d\d(?: [\w.]+)?\]")
_WHOLE_SCORES = re.compile(r"copypaste: (?:(?:-?\d+\.\d{4}|nan),)+(?:-?\d+\.\d{4}|nan)$")


class ReplayError(ValueError):
    """A log cannot be read as a training run; the message says which and why."""


@dataclass(slots=True)
class Message:
    """One message of a log."""

    time: float
    """When (Unix seconds, taking the log's local time for UTC)."""
    text: str
    """Its first line, without date and logger."""
    more: list[str] = field(default_factory=list)
    """The lines without a date that follow it."""


def read_messages(path: Path, year: int | None = None) -> tuple[list[Message], list[str]]:
    """Reads detectron2's log.txt, or what it printed; its first line is of that year, None for the newest that fits.

    Returns the messages in order, and notes on what could not be read.

    Raises:
        ReplayError: The file cannot be read, or has no line of detectron2's form.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ReplayError(f"{path}: cannot be read: {error}") from error
    text = _ANSI.sub("", raw.decode("utf-8", errors="replace"))
    notes = []
    # splitlines() would also split at characters within messages.
    lines, torn = _whole_lines(text.split("\n"))
    if torn:
        notes.append(f"{torn} lines that were interrupted by another line were left out")
    if lines and lines[-1] and not _WHOLE_SCORES.search(lines[-1]):
        notes.append("the last line is cut off and was left out")
        lines.pop()
    heads = [
        (match, line) for line in lines if len(line) < MAX_LINE_LENGTH for match in [_HEAD.match(line.rstrip("\r"))]
    ]
    dates = [(int(m["month"]), int(m["day"])) for m, _ in heads if m]
    if not dates:
        raise ReplayError(f"{path}: not a detectron2 log: no line begins with [month/day hour:minute:second")
    clock = _Clock(year or _guess_year(path, dates))
    messages: list[Message] = []
    for match, line in heads:
        if match is None:
            if messages:
                messages[-1].more.append(line.rstrip("\r"))
            continue
        moment = clock.seconds(*(int(match[part]) for part in ("month", "day", "hour", "minute", "second")))
        if moment is None:
            notes.append(f"a line with an impossible date was left out: {line[:60]}")
        else:
            messages.append(Message(moment, match["text"]))
    if not messages:
        raise ReplayError(f"{path}: not a detectron2 log: its dates are impossible")
    return messages, notes


def _whole_lines(lines: list[str]) -> tuple[list[str], int]:
    """The lines without the fragments that another dated line interrupted, and the number of fragments."""
    whole, torn = [], 0
    for line in lines:
        heads = [match.start() for match in _HEAD_WITHIN.finditer(line[:MAX_LINE_LENGTH])]
        if heads and heads[-1] > 0:
            torn += 1
            line = line[heads[-1] :]
        whole.append(line)
    return whole, torn


class _Clock:
    """Turns dates without a year into seconds; a jump back over most of a year is New Year."""

    def __init__(self, year: int) -> None:
        self.year = year
        self.last_month = 0

    def seconds(self, month: int, day: int, hour: int, minute: int, second: int) -> float | None:
        if month == 1 and self.last_month == 12:
            self.year += 1
        try:
            moment = datetime.datetime(self.year, month, day, hour, minute, second, tzinfo=datetime.UTC)
        except ValueError:
            return None
        self.last_month = month
        return moment.timestamp()


def _guess_year(path: Path, dates: list[tuple[int, int]]) -> int:
    """The newest year not after the file's that has a 29 February if, and only if, the log must have seen one."""
    modified = datetime.datetime.fromtimestamp(path.stat().st_mtime, tz=datetime.UTC)
    year = modified.year - ((modified.month, modified.day) < dates[0])
    leap_day = (2, 29) in dates
    crosses = leap_day or any(a <= (2, 28) and (3, 1) <= b <= (3, 2) for a, b in pairwise(dates))
    while crosses and leap_day != calendar.isleap(year):
        year -= 1
    return year
