"""Takes out of a log what consoles, collectors and mail add to it: colours, HTML, prefixes, wrapped lines.

What is not certain stays as it is, so that a later reader finds nothing rather than a wrong number.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

BEGIN = re.compile(r"\[\d\d/\d\d \d\d:\d\d:\d\d")
"""The date that every message of detectron2 begins with."""

MIN_WIDTH, MAX_WIDTH = 40, 500
"""Columns of a terminal: longer lines were not wrapped by one."""

WRAPPED = "the log was copied from a terminal that broke its lines, which were put together"

MAX_LAYERS = 6
"""Prefixes and wraps that are taken off one after the other."""

_GAP = 3
"""Most blanks between two figures of a progress line: a copy loses those at the end of a row."""

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LOST_ESCAPE = re.compile(r"\[\d{1,3}(?:;\d{1,3})*m")
_ODD_ESCAPE = re.compile(
    r"(?:[\x1b\x9b\u241b\u2190\ufffd]|\^\[|\\x1b|\\u001b|\\033|\\e|#033)?\[\d{1,3}(?:;\d{1,3})*m(?:\x1b?\[K)?"
    r"|\x1b\][^\x07\x1b\n]*(?:\x07|\x1b\\)|\x1b[()][A-Z0-9]|(?:\^\[)?\[m\[K"
)
"""Colours whose escape character was lost or written out, and titles of windows."""

_ENTITY = re.compile(r"&(?:lt|gt|quot|amp|nbsp|#\d+|#x[0-9a-fA-F]+);")
_TAG = re.compile(r"</?(?:span|pre|code|div|p|font|b|i|a|td|tr)\b[^<>\n]*>")
_WHOLE_PROGRESS = re.compile(r"max_mem: \d+M\s*$")
_ONE_LINE = ("iter: ", "copypaste:", "Rank of current process:")
_RAY_REPEATED = re.compile(r" *\[repeated \d+x across cluster\][^\n]*")
_LEVEL = re.compile(r"(?:(?:WARNING|ERROR|CRITICAL|\x1b?\[[\d;]+m) *)+$")
_NUMBER = r"\d+(?:[.,]\d+)*"
_MONTH_OR_DAY = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec|Mon|Tue|Wed|Thu|Fri|Sat|Sun)\b"
_PADDING = r"\s*"
_PIECE = re.compile(
    rf"\x1b?\[[\d;]+m|(?P<padding>(?:^\s+|\s\s+)(?=\d))|{_MONTH_OR_DAY} *|{_NUMBER}|[A-Za-z]+|[^A-Za-z\d]"
)
_TIME = re.compile(
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?|\d{4}[-/]\d\d[-/]\d\d"
    rf"|{_MONTH_OR_DAY} +\d+ (?:\d{{4}} )?\d\d:\d\d:\d\d(?:[.,]\d+)?|\d\d:\d\d:\d\d(?:[.,]\d+)?|\b\d{{9,}}(?:\.\d+)?"
)


def printed_lines(text: str) -> tuple[list[str], list[str]]:
    """The lines of a log as detectron2 printed them, and notes on what was left out."""
    text = _decoded(text)
    notes: list[str] = []
    if "\x1b" in text or _LOST_ESCAPE.search(text):
        rows = text.split("\n")
        if max(map(len, rows)) <= MAX_WIDTH:  # what broke the lines may have counted the characters of colours
            text = "\n".join(_taken_apart(rows, notes, whole_prefix=False))
        text = _ANSI.sub("", text)
        if "\x1b" in text or _LOST_ESCAPE.search(text):
            text = _ODD_ESCAPE.sub("", text)
    return _taken_apart(text.split("\n"), notes, whole_prefix=True), notes


def _taken_apart(lines: list[str], notes: list[str], *, whole_prefix: bool) -> list[str]:
    """The lines without what was added to them in one layer after the other."""
    for _ in range(MAX_LAYERS):
        lines = _outdented(lines)
        shared, whole = _prefixes(lines)
        if shared:
            lines = _one_process(lines, shared, notes)
        elif unwrapped := _unwrapped(lines, whole):
            lines = unwrapped
            if WRAPPED not in notes:
                notes.append(WRAPPED)
        elif whole and whole_prefix:
            lines = _one_process(lines, whole, notes)
        else:
            break
    return lines


def _decoded(text: str) -> str:
    """The text without markup, and with plain line ends and blanks."""
    if text.lstrip().startswith('{"log":'):
        text = _docker_text(text)
    if "</span>" in text or "</pre>" in text or "<br" in text:
        text = _TAG.sub("", re.sub(r"<br */?>\n?", "\n", text))
    for _ in range(3):  # what was pasted from page to page is escaped more than once
        if "&" not in text or not _ENTITY.search(text):
            break
        text = html.unescape(text)
    if "\r" in text:
        text = re.sub(r"\r+\n?", "\n", text)
    for odd, plain in (("\xa0", " "), ("\u200b", "")):
        text = text.replace(odd, plain)
    return _RAY_REPEATED.sub("", text) if "[repeated " in text else text


def _docker_text(text: str) -> str:
    """What Docker's own log files hold: a line of JSON for each line of the container."""
    parts = []
    for line in text.split("\n"):
        try:
            parts.append(str(json.loads(line)["log"]))
        except (ValueError, KeyError, TypeError):
            continue
    return "".join(parts)


def _prefixes(lines: Sequence[str]) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    """What most messages have before their date, as patterns.

    The first is of those of its first words that practically all lines have, more lines than have the whole of it; the
    second is of the whole. None where there is none.
    """
    prefixes = {i: p for i, line in enumerate(lines) if (p := _prefix(line)) is not None}
    shapes = Counter(_shape(prefix) for prefix in prefixes.values() if prefix)
    if shapes.total() * 2 <= len(prefixes):
        return None, None
    fewest = max(min(2, len(prefixes)), shapes.total() / 50)
    common = [shape for shape, count in shapes.items() if count >= fewest]
    if not common:
        return None, None
    others = [line for i, line in enumerate(lines) if i not in prefixes and line.strip()]
    whole = _pattern(common)
    most = max(_num_matches(whole, others), 0.98 * len(others) - 1)
    for words in range(max(map(len, common)) - 1, 0, -1):
        first = _pattern([shape[:words] for shape in common])
        if _is_whole_word(common[0], words) and _num_matches(first, others) > most:
            return first, whole
    return None, whole


def _is_whole_word(shape: Sequence[str], end: int) -> bool:
    """Whether a prefix may end after so many pieces: within no word, number or time."""
    before, last, following = shape[end - 2 : end - 1], shape[end - 1], shape[end]
    if following == _PADDING or following.startswith("\\ ") or last.startswith("\\ "):
        return True
    if last in (_PADDING, _NUMBER) or last.isalpha():
        return False
    return not (list(before) == [_NUMBER] and following == _NUMBER)


def _num_matches(pattern: re.Pattern[str], lines: Sequence[str]) -> int:
    return sum(pattern.match(line) is not None for line in lines)


def _outdented(lines: list[str]) -> list[str]:
    """The lines without the blanks that all of them begin with."""
    while any(lines) and all(line[:1] in ("", " ") for line in lines):
        lines = [line[1:] for line in lines]
    return lines


def _prefix(line: str) -> str | None:
    """What precedes the date of a message's first line, without its level and colour; None for other lines."""
    if line[:1] == "[" and line[3:4] == "/" and BEGIN.match(line):
        return ""
    begin = BEGIN.search(line)
    return _LEVEL.sub("", line[: begin.start()]) if begin else None


def _shape(prefix: str) -> tuple[str, ...]:
    """Patterns of a prefix's pieces, the same for all times, numbers of processes and of lines."""
    return tuple(map(_piece_shape, _PIECE.finditer(prefix)))


def _piece_shape(piece: re.Match[str]) -> str:
    if piece["padding"]:
        return _PADDING
    if re.match(_MONTH_OR_DAY, piece[0]):
        return rf"{_MONTH_OR_DAY} *"
    return _NUMBER if piece[0][0].isdigit() else re.escape(piece[0])


def _pattern(shapes: Iterable[Sequence[str]]) -> re.Pattern[str]:
    """Matches a prefix of any of the shapes; an empty line has lost the blank at its end."""
    return re.compile("|".join("".join(shape[:-1]) + _at_end(shape[-1]) for shape in shapes if shape))


def _at_end(piece: str) -> str:
    return f"(?:{piece}|$)" if piece.startswith(("\\ ", "\\\t")) else piece


def _one_process(lines: Sequence[str], pattern: re.Pattern[str], notes: list[str]) -> list[str]:
    """The lines without their prefix: of the processes that train, where prefixes name several."""
    found = [pattern.match(line) for line in lines]
    stripped = [line[prefix.end() :] if prefix else line for prefix, line in zip(found, lines, strict=True)]
    sources = _sources([prefix[0] for prefix in found if prefix])
    named = [next(sources) if prefix else None for prefix in found]
    for sign in ("iter: ", "Rank of current process: 0.", "copypaste: "):
        keep = {source for source, line in zip(named, stripped, strict=True) if sign in line}
        if keep:
            break
    else:
        return stripped
    kept = [line for source, line in zip(named, stripped, strict=True) if source is None or source in keep]
    if dropped := len(stripped) - len(kept):
        notes.append(f"{dropped} lines of other processes were left out")
    return kept


def _sources(prefixes: Sequence[str]) -> Iterator[str]:
    """What each prefix says of the process that printed its line: all but times and numbers of lines."""
    texts = [re.split(rf"({_NUMBER})", _TIME.sub("", prefix)) for prefix in prefixes]
    columns = list(zip(*texts, strict=False))
    counting = {j for j, column in enumerate(columns) if j % 2 and _is_counting(column)}
    return ("".join(" ".join(text[j] for j in range(len(text)) if j not in counting).split()) for text in texts)


def _is_counting(column: Sequence[str]) -> bool:
    numbers = [float(text) for text in column if text.isdecimal()]
    rising = sum(a <= b for a, b in pairwise(numbers))
    return len(set(numbers)) * 2 > len(column) and rising >= 0.9 * (len(column) - 1)


def _unwrapped(lines: Sequence[str], prefix: re.Pattern[str] | None) -> list[str] | None:
    """The lines with those put together that a terminal broke at its last column; None where none did.

    What a terminal broke off has no `prefix`.
    """
    width = max(map(len, lines))
    if not MIN_WIDTH <= width <= MAX_WIDTH:
        return None

    def begins(line: str) -> bool:
        return not line.strip() or bool(BEGIN.search(line)) or bool(prefix and prefix.match(line))

    full = [i for i, line in enumerate(lines[:-1]) if len(line) >= width - _GAP and _is_one_line(line)]
    broken = sum(not begins(lines[i + 1]) and _digits_alike(lines[i]) != _digits_alike(lines[i + 1]) for i in full)
    if broken < 2 or broken * 2 < len(full):
        return None
    whole: list[str] = []
    row = ""
    for line in lines:
        if (
            whole
            and len(row) >= width - _GAP
            and not begins(line)
            and _goes_on(whole[-1], row, line, width, has_prefix=prefix is not None)
        ):
            if len(row) < width and row[-1:].isdigit() and line[:1] in "0123456789.":
                return None  # one number or two: not certain
            whole[-1] = _joined(whole[-1] + " " * (width - len(row)), line)
        else:
            whole.append(line)
        row = line
    return whole


def _digits_alike(line: str) -> str:
    """How a line begins, as far as a prefix that is no indentation shows by it."""
    return re.sub(r"\d", "0", line[:3]) if line[:1] != " " else line


def _is_one_line(message: str) -> bool:
    """Whether a message is printed on one line, and this is not the whole of it: most of the others end in a colon."""
    if not BEGIN.search(message) or _WHOLE_PROGRESS.search(message):
        return False
    return any(sign in message for sign in _ONE_LINE) or not message.rstrip().endswith(":")


def _goes_on(message: str, row: str, following: str, width: int, *, has_prefix: bool) -> bool:
    """Whether a message whose last row is `row`, a full one or nearly so, goes on in the `following` one."""
    if len(row) < width:
        return has_prefix or _is_one_line(message)
    return not (row.endswith("|") and following.startswith("|")) and not _WHOLE_PROGRESS.search(row)


def _joined(row: str, following: str) -> str:
    """Both as one line; where the first ends in a figure and the second begins with a name, a blank was lost."""
    apart = re.search(r": -?\d\S*$", row) and re.match(r"[A-Za-z_][\w/.\[\]-]*: ", following)
    return f"{row} {following}" if apart else row + following
