"""What a check found wrong, and how it is shown: as a table on a terminal, as plain lines in a log, or as JSON.

Names inside a finding come from untrusted files: they are made printable, for terminals as well as for encoders.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

Level = Literal["error", "warning"]

MAX_EXAMPLES = 3
"""Entries of a file that are named where many have the same finding."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    level: Level
    """An `error` stops the run before it starts, a `warning` does not."""
    code: str
    """Stable short name of the kind, such as `image_missing`."""
    file: str
    """File, folder or field of the experiment it is about; "" for none."""
    id: str
    """Which entry of it, such as `annotation 17`; "" for none."""
    what: str
    """What is wrong, with the value that was found."""
    hint: str
    """How to fix it: a sentence without a full stop, or a question with its mark."""
    count: int = 1
    """Entries of the file that have it; the others say what the first is like."""

    def to_line(self) -> str:
        """The finding in one line, for logs."""
        place = ": ".join(part for part in (self.file, self.id) if part)
        end = "" if self.hint.endswith(("?", "!", ".")) else "."
        return f"{self.level} [{self.code}] {place}{': ' if place else ''}{self.what}. {self.hint}{end}"


@dataclass(slots=True)
class _Group:
    """Findings that differ in the entry they are about, no more."""

    first: Finding
    count: int = 1
    others: list[str] = field(default_factory=list)
    """Places of the next few."""


class FindingList:
    """Collects the findings of one check; one that many entries of a file have is one, with a count and examples."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, ...], _Group] = {}

    def error(self, code: str, file: str, id: str, what: str, hint: str, *, group: str = "") -> None:
        """Adds an error; see `add`."""
        self.add(Finding("error", code, file, id, what, hint), group)

    def warning(self, code: str, file: str, id: str, what: str, hint: str, *, group: str = "") -> None:
        """Adds a warning; see `add`."""
        self.add(Finding("warning", code, file, id, what, hint), group)

    def add(self, finding: Finding, group: str = "") -> None:
        """Adds a finding, after making its text printable.

        Findings of one level and code in one file, whose ids differ in a number only, become one: the first, and a
        count. `group` stands in for the file where the entries are files themselves, such as their folder.
        """
        kind = re.sub(r"[0-9]+", "", finding.id)
        key = (finding.level, finding.code, group or finding.file, kind)
        known = self._groups.get(key)
        if known is None:
            self._groups[key] = _Group(_printable_finding(finding))
            return
        known.count += 1
        if known.count <= MAX_EXAMPLES:
            known.others.append(printable(finding.id))

    def to_list(self) -> list[Finding]:
        """All findings, errors first, otherwise in the order they were added."""
        return sort_findings(map(_in_one, self._groups.values()))


def _printable_finding(finding: Finding) -> Finding:
    # A tree of folders has several lines; names from a data set are quoted, so that theirs are escaped already.
    what, hint = ("\n".join(map(printable, text.split("\n"))) for text in (finding.what, finding.hint))
    return replace(finding, file=printable(finding.file), id=printable(finding.id), what=what, hint=hint)


def _in_one(group: _Group) -> Finding:
    if group.count == 1:
        return group.first
    rest = ", ".join(group.others) + (" …" if group.count > MAX_EXAMPLES else "")
    what = f"{group.first.what}; and {group.count - 1:,} more like this: {rest}"
    return replace(group.first, what=what, count=group.count)


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Puts errors before warnings, otherwise in the same order; what was found twice is listed once."""
    return sorted(dict.fromkeys(findings), key=lambda finding: finding.level != "error")


def as_errors(findings: Iterable[Finding]) -> list[Finding]:
    """The findings with every warning raised to an error."""
    return [replace(finding, level="error") for finding in findings]


def has_errors(findings: Iterable[Finding]) -> bool:
    """Whether any finding stops the run."""
    return any(finding.level == "error" for finding in findings)


def to_json(findings: Sequence[Finding], **more: Any) -> str:
    """Writes `{"ok": …, "errors": n, "warnings": n, "findings": [{level, code, …, count}], **more}`."""
    import orjson

    errors = sum(finding.level == "error" for finding in findings)
    counts = {"ok": not errors, "errors": errors, "warnings": len(findings) - errors}
    document = {**counts, "findings": [asdict(finding) for finding in findings], **more}
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode()


def print_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Shows findings on the error stream: as a table on a terminal, else one line each."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not findings:
        return
    console = console or Console(stderr=True, emoji=False)
    if not console.is_terminal:
        for finding in findings:
            console.print(finding.to_line(), markup=False, highlight=False, soft_wrap=True, emoji=False)
    else:
        table = Table(box=box.SIMPLE_HEAD, title=None, show_lines=True, pad_edge=False)
        for heading, ratio in (("", None), ("where", 3), ("what", 4), ("how to fix", 4)):
            table.add_column(heading, ratio=ratio, overflow="fold")
        for finding in findings:
            style = "bold red" if finding.level == "error" else "yellow"
            where = "\n".join(part for part in (finding.file, finding.id) if part)
            table.add_row(Text(finding.level, style), Text(where), Text(finding.what), Text(finding.hint))
        console.print(table)
    levels = Counter(finding.level for finding in findings)
    counts = ", ".join(f"{levels[name]} {name}{'s' * (levels[name] != 1)}" for name in ("error", "warning"))
    console.print(f"{counts}.", highlight=False)


def root_cause(error: BaseException) -> str:
    """What went wrong at first, in words: libraries wrap the reason in exceptions whose text is their own affair."""
    seen: list[BaseException] = []  # a library that raises one exception twice can close a circle
    while (cause := error.__cause__ or error.__context__) is not None and error not in seen:
        seen.append(error)
        error = cause
    text = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
    file = getattr(error, "filename", None)
    return f"{text}: {file}" if isinstance(file, str) and file not in text else text


def printable(text: str) -> str:
    """Escapes what a terminal would obey or an encoder refuse: control characters and lone surrogates."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
