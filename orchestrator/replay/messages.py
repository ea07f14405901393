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

from orchestrator.replay.console import BEGIN, printed_lines
from orchestrator.replay.unpacking import ReplayError

MAX_LINE_LENGTH = 1_000_000
"""Characters of a line that are examined; longer ones are no log lines."""

LOOKED_FOR = "expected detectron2's log.txt, a copy of what it printed, or its metrics.json"

_HEAD = re.compile(
    r"^(?:(?:WARNING|ERROR|CRITICAL) )?\[(\d\d)/(\d\d) (\d\d):(\d\d):(\d\d)(?: ([\w.]+))?\]:? *(?:0m)?"
    r"(?:([\w.]+) (?:DEBUG|INFO|WARNING|ERROR|CRITICAL): )?(.*)$"
)
"""Month, day, hour, minute, second, logger in a console or a file, text."""

_HEAD_WITHIN = re.compile(r"(?:(?:WARNING|ERROR|CRITICAL) )?\[\d\d/\d\d \d\d:\d\d:\d\d(?: [\w.]+)?\]")
_ON_ONE_LINE = ("Start inference", "Starting training", "Total ", "Overall ", "copypaste: ", "Loaded ", "Removed ")
_WHOLE_SCORES = re.compile(r"copypaste: (?:(?:-?\d+\.\d{4}|nan),)+(?:-?\d+\.\d{4}|nan)$")


@dataclass(slots=True)
class Message:
    """One message of a log."""

    time: float
    """When (Unix seconds, taking the log's local time for UTC)."""
    text: str
    """Its first line, without date and logger."""
    logger: str
    """The logger that printed it, `d2.` for detectron2's own; empty where the line does not say."""
    more: list[str] = field(default_factory=list)
    """The lines without a date that follow it."""


def read_messages(path: Path, text: str, year: int | None = None) -> tuple[list[Message], list[str]]:
    """Reads detectron2's log.txt, or what it printed; its first line is of that year, None for the newest that fits.

    Args:
        path: The file, which names the log in errors.
        text: Its text.
        year: Year of its first line.

    Returns:
        The messages in order, and notes on what could not be read.

    Raises:
        ReplayError: No line has detectron2's form.
    """
    printed, notes = printed_lines(text)
    lines, torn = _whole_lines(printed)
    if torn:
        notes.append(f"{torn} lines that were interrupted by another line were left out")
    if lines and lines[-1] and not _WHOLE_SCORES.search(lines[-1]):
        notes.append("the last line is cut off and was left out")
        lines.pop()
    heads = [(_HEAD.match(line), line) for line in lines if len(line) < MAX_LINE_LENGTH]
    dates = [(int(m[1]), int(m[2])) for m, _ in heads if m]
    if not dates:
        raise ReplayError(f"{path}: not a detectron2 log: {_why_not(text)}; {LOOKED_FOR}")
    clock = _Clock(year or _guess_year(path, dates))
    messages: list[Message] = []
    for match, line in heads:
        if match is None:
            if messages:
                messages[-1].more.append(line)
            continue
        month, day, hour, minute, second, short, name, first = match.groups()
        moment = clock.seconds(int(month), int(day), int(hour), int(minute), int(second))
        if moment is None:
            notes.append(f"a line with an impossible date was left out: {line[:60]}")
        else:
            messages.append(Message(moment, first, short or name or ""))
    if not messages:
        raise ReplayError(f"{path}: not a detectron2 log: its dates are impossible")
    if _is_broken(messages):
        raise ReplayError(
            f"{path}: its lines were broken by a terminal or mail, and cannot be put together with certainty; "
            "take the file itself, or a copy of a wider terminal"
        )
    for message in messages:
        _cut_unsure_number(message)
    return messages, notes


def _is_broken(messages: list[Message]) -> bool:
    """Whether much of what detectron2 prints on one line goes on in the next one."""
    progress = [message for message in messages if "iter: " in message.text]
    broken = sum(" lr: " in " ".join(m.more) for m in progress if m.more and " lr: " not in m.text)
    others = [message for message in messages if message.text.startswith(_ON_ONE_LINE)]
    return broken * 2 > len(progress) or sum(bool(m.more) for m in others) * 4 > max(len(others), 8)


def _why_not(text: str) -> str:
    """What a file is instead, as far as it shows."""
    start = text[:4096]
    if sum(c == "\ufffd" or (c < " " and c not in "\t\n\r\x1b\f") for c in start) * 20 > len(start):
        return "it is binary"
    if '"cells"' in start and start.lstrip().startswith("{"):
        return "it is a notebook: copy the output of its cells"
    if "blob data]" in text:
        return "journalctl left out its coloured lines: print them with `journalctl --all`"
    return "no line begins with [month/day hour:minute:second"


def _cut_unsure_number(message: Message) -> None:
    """Takes off a number at the end of a line where the next line may be the rest of it."""
    more = message.more
    if more and more[0][:1] in "0123456789.,-+e" and more[0] and not message.text.startswith("copypaste"):
        rest = re.match(r"[\d.,e+-]+M?(?:\s|$)", more[0])
        if rest and re.search(r"\d[\d.,e+-]*$", message.text):
            message.text = re.sub(r"\S*$", "", message.text)


def _whole_lines(lines: list[str]) -> tuple[list[str], int]:
    """The lines without the fragments that another dated line interrupted, and the number of fragments."""
    whole, torn = [], 0
    for line in lines:
        if line.find("[", 1) > 0 and BEGIN.search(line, 1):
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
        self._days: dict[tuple[int, int, int], float] = {}

    def seconds(self, month: int, day: int, hour: int, minute: int, second: int) -> float | None:
        if month == 1 and self.last_month == 12:
            self.year += 1
        date = self.year, month, day
        if date not in self._days:
            try:
                self._days[date] = datetime.datetime(*date, tzinfo=datetime.UTC).timestamp()
            except ValueError:
                return None
        if hour > 23 or minute > 59 or second > 59:
            return None
        self.last_month = month
        return self._days[date] + hour * 3600 + minute * 60 + second


def _guess_year(path: Path, dates: list[tuple[int, int]]) -> int:
    """The newest year not after the file's that has a 29 February if, and only if, the log must have seen one."""
    modified = datetime.datetime.fromtimestamp(path.stat().st_mtime, tz=datetime.UTC)
    year = modified.year - ((modified.month, modified.day) < dates[0])
    leap_day = (2, 29) in dates
    crosses = leap_day or any(a <= (2, 28) and (3, 1) <= b <= (3, 2) for a, b in pairwise(dates))
    while crosses and leap_day != calendar.isleap(year):
        year -= 1
    return year
