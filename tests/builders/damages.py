"""What consoles, collectors, mail and packers do to a log, as functions of its text or bytes."""

import bz2
import gzip
import html
import lzma
import re
from collections.abc import Callable

ESC = "\x1b"
STAMP = "2024-05-04T10:{:02d}:{:02d}.{}Z "


def _each_line(change: Callable[[int, str], str]) -> Callable[[str], str]:
    """Changes every line, given its number."""

    def apply(text: str) -> str:
        lines = text.removesuffix("\n").split("\n")
        return "\n".join(change(i, line) for i, line in enumerate(lines)) + "\n"

    return apply


def prefixed(prefix: str) -> Callable[[str], str]:
    """The same prefix on every line."""
    return _each_line(lambda i, line: prefix + line)


def prefixed_heads(prefix: str) -> Callable[[str], str]:
    """A prefix on the first line of every message only."""
    return _each_line(lambda i, line: prefix + line if re.search(r"\[\d\d/\d\d ", line) else line)


def wrapped(width: int, trimmed: bool = False) -> Callable[[str], str]:
    """Lines broken at a terminal's last column; a `trimmed` copy loses the blanks at the end of its rows."""

    def apply(text: str) -> str:
        rows = []
        text = re.sub(r"\x1b\[\d+m", "", text)  # which take no columns, and are not copied
        for line in text.removesuffix("\n").split("\n"):
            rows += [line[i : i + width] for i in range(0, len(line), width)] or [""]
        return "\n".join(row.rstrip() if trimmed else row for row in rows) + "\n"

    return apply


def with_other_ranks(label: str) -> Callable[[str], str]:
    """Lines of two processes with a label each, of which the second prints what every rank prints."""

    def apply(text: str) -> str:
        lines = []
        for line in text.removesuffix("\n").split("\n"):
            lines.append(label.format(0) + line)
            if "evaluator" in line or "Loaded" in line:
                lines.append(label.format(1) + line)
        return "\n".join(lines) + "\n"

    return apply


TEXT: dict[str, Callable[[str], str]] = {
    "lost escapes": lambda text: text.replace(ESC, ""),
    "escapes as carets": lambda text: text.replace(ESC, "^["),
    "escapes written out": lambda text: text.replace(ESC, "\\x1b"),
    "escapes as pictures": lambda text: text.replace(ESC, "\u241b"),
    "Windows line ends": lambda text: text.replace("\n", "\r\n"),
    "doubled line ends": lambda text: text.replace("\n", "\r\r\n"),
    "Ray": prefixed("(RayTrainWorker pid=3453, ip=10.0.0.1) "),
    "Ray in colour": prefixed("\x1b[36m(RayTrainWorker pid=3453)\x1b[0m "),
    "kubectl": _each_line(lambda i, line: STAMP.format(i // 60 % 60, i % 60, 123456789 + i) + line),
    "GitHub Actions": _each_line(lambda i, line: STAMP.format(i // 60 % 60, i % 60, 1234567 + i) + line),
    "kubectl of a pod": prefixed("[pod/train-0/main] "),
    "docker compose": prefixed("trainer-1  | "),
    "journald": _each_line(lambda i, line: f"May {4 + i // 50:2d} 10:00:{i % 60:02d} gpu7 python[812]: {line}"),
    "srun -l": prefixed("0: "),
    "torchrun": prefixed("[rank0]:"),
    "mpirun": prefixed("[1,0]<stdout>:"),
    "line numbers": _each_line(lambda i, line: f"{i + 1:6d}\t{line}"),
    "grep -n": _each_line(lambda i, line: f"{i + 1}:{line}"),
    "quoted": prefixed("> "),
    "quoted code": prefixed("    "),
    "heads only": prefixed_heads("worker 0 - "),
    "HTML": html.escape,
    "HTML twice": lambda text: html.escape(html.escape(text)),
    "blanks of a web page": lambda text: text.replace("  ", " \xa0"),
    "80 columns": wrapped(80),
    "80 columns, trimmed": wrapped(80, trimmed=True),
    "132 columns": wrapped(132),
    "other ranks of srun": with_other_ranks("{}: "),
    "other ranks of torchrun": with_other_ranks("[default{}]: "),
    "other pods": with_other_ranks("[pod/train-{}/main] "),
}
"""Damages to a text; they may follow one another in any order."""

BYTES: dict[str, Callable[[bytes], bytes]] = {
    "UTF-8 mark": lambda raw: b"\xef\xbb\xbf" + raw,
    "UTF-16": lambda raw: raw.decode().encode("utf-16"),
    "UTF-16, big end first": lambda raw: raw.decode().encode("utf-16-be"),
    "UTF-16 without mark": lambda raw: raw.decode().encode("utf-16-le"),
    "appended by PowerShell": lambda raw: (
        b"\n".join(raw.split(b"\n")[:9]) + b"\n\xff\xfe" + b"\n".join(raw.split(b"\n")[9:]).decode().encode("utf-16-le")
    ),
}
"""Encodings; one at a time."""

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "gzip of two": lambda raw: gzip.compress(raw[:300]) + gzip.compress(raw[300:]),
    "xz": lzma.compress,
    "bzip2": bz2.compress,
}
"""What packs a file."""
