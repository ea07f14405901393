"""Matches the image names of an annotation file to files whose names differ: by folder, case, extension and more.

Tools write names in ways that no reader finds: Windows' backslashes, macOS's decomposed Unicode, the addresses of a
labelling server, absolute paths of another machine. Time is linear in the number of names and files.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import product
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

from orchestrator.files import is_utf8

SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"),
        *(".ppm", ".pgm", ".pbm", ".jp2", ".avif", ".heic"),
    )
)
"""Extensions of image files, in lower case."""

MAX_DEPTH = 8
"""Parts of a path, from its end, that are compared."""

MAX_CANDIDATES = 8
"""Files with the same end of the path that are compared; more say nothing about which is meant."""

ENCODINGS = ("cp1252", "cp437")
"""Encodings that are taken for UTF-8, and UTF-8 for them: those of Windows and of zip archives."""

PART_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Words for the parts of a data set; each may end in `set` or `sets`."""


class NameMatch(NamedTuple):
    """The file that an annotation's name means."""

    name: str
    """The `file_name` of the annotation file."""
    base: str
    """Folder that was searched."""
    folder: str
    """Folder below it that the rest of the name is relative to; "" for itself, else with a slash at its end."""
    path: str
    """The file, relative to `base`."""
    differences: tuple[str, ...]
    """In what the name differs from the file's, other than by the folder; empty where the folder alone is wrong."""


def match_names(
    names: Iterable[str], base: str, paths: Iterable[str], *, whole_paths: bool, part: str = ""
) -> dict[str, NameMatch]:
    """Finds the files that names mean.

    Args:
        names: `file_name` entries.
        base: The folder that `paths` are relative to.
        paths: Files of any kind, with slashes.
        whole_paths: Accept for a relative name only a file whose whole path agrees, not one in another folder.
        part: `train`, `val` or `test`, where the names are those of such a part: decides between equal files.

    Returns:
        The match of each name that has one.
    """
    wanted = {name: _spellings(name) for name in names}
    if not wanted:
        return {}
    depths = {len(parts) for spellings in wanted.values() for parts in spellings}
    deepest = min(max(depths), MAX_DEPTH)
    index = _index(paths, deepest)
    found: dict[str, list[tuple[str, str]]] = {}
    for name, spellings in wanted.items():
        is_strict = whole_paths and re.match(r"/|\.\./|\.\.\\|[A-Za-z]:[\\/]|\w+://", name) is None
        for parts in spellings:
            most = min(len(parts), deepest)
            if candidates := _look_up(parts, index, most, most if is_strict else 1):
                found[name] = [each for each in candidates if not is_strict or not each[0]]
                break
    votes = Counter(folder for candidates in found.values() for folder, _ in candidates)

    def likelihood(candidate: tuple[str, str], name: str) -> tuple[bool, int, bool, int]:
        folder, path = candidate
        is_exact = path.rsplit("/", 1)[-1] == name.rsplit("/", 1)[-1]
        return is_exact, votes[folder], bool(part) and part_of(folder) == part, -len(path)

    matches = {}
    for name, candidates in found.items():
        if candidates:
            folder, path = max(candidates, key=lambda each, name=name: likelihood(each, name))  # type: ignore[misc]
            matches[name] = NameMatch(name, base, folder, path, _differences(name, path.removeprefix(folder)))
    return matches


def part_of(path: str) -> str:
    """The part of a data set that a file or folder is named for: `train`, `val`, `test`, or "" for none of them."""
    for name in reversed(path.split("/")):
        words = (re.sub(r"sets?$", "", word.lower()) for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name))
        parts = {PART_WORDS[word] for word in words if word in PART_WORDS}
        if parts:
            return parts.pop() if len(parts) == 1 else ""
    return ""


def _index(paths: Iterable[str], deepest: int) -> dict[str, list[tuple[str, str]]]:
    """Image files by the end of their path, as (folder in front of that end, whole path), for each depth."""
    index: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for path in paths:
        parts = path.split("/")
        dot = parts[-1].rfind(".")
        if dot < 0 or parts[-1][dot:].lower() not in SUFFIXES:
            continue
        readings = [parts, *(reading.split("/") for reading in _other_readings(path))]
        for depth in range(1, min(len(parts), deepest) + 1):
            folder = "/".join(parts[:-depth])
            for key in {_key(reading[-depth:]) for reading in readings}:
                candidates = index[key]
                if len(candidates) < MAX_CANDIDATES:
                    candidates.append((f"{folder}/" if folder else "", path))
    return index


def _look_up(parts: list[str], index: dict[str, list[tuple[str, str]]], most: int, least: int) -> list[tuple[str, str]]:
    ends = (index.get(_key(parts[-depth:])) for depth in range(most, least - 1, -1))
    return next(filter(None, ends), [])


def _key(parts: list[str]) -> str:
    """What names of the same image have in common: without extension, %-encoding, case and Unicode form."""
    text = _without_suffix("/".join(parts))
    if text.isascii():
        return (unquote(text) if "%" in text else text).lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", unquote(text)).casefold())


def _last_key(path: str) -> str:
    return _key([path.replace("\\", "/").split("/")[-1]])


def _spellings(name: str) -> list[list[str]]:
    """A name's path in parts, as it is meant: without server, query, drive, `.` and `..`; then less likely ones."""
    path = name.replace("\\", "/")
    if "?" in path and (target := parse_qs(path.split("?", 1)[1]).get("d")):
        path = target[0]  # Label Studio's local files: /data/local-files/?d=folder/name.jpg
    elif "://" in path:
        path = path.split("://", 1)[1].split("?")[0].partition("/")[2]
    elif re.match(r"[A-Za-z]:/", path):
        path = path[2:]
    parts = [part for part in path.split("/") if part not in ("", ".", "..")] or [path]
    others = [
        re.sub(r"(\.[A-Za-z]{3,4})-?\d+$", r"\1", parts[-1]),  # VIA's key: the name and the size in bytes, or -1
        re.sub(r"^[0-9a-f]{8}-", "", parts[-1]),  # Label Studio's prefix of an uploaded file
    ]
    spellings = [parts, *([*parts[:-1], other] for other in others if other and other != parts[-1])]
    joined = "/".join(parts)
    readings = [text for text in (_stripped(joined), *_other_readings(joined)) if text not in ("", joined)]
    return [*spellings, *(text.split("/") for text in readings)]


def _stripped(path: str) -> str:
    """A path without the white space around its names."""
    return "/".join(part.strip() for part in path.split("/"))


def _other_readings(text: str) -> list[str]:
    """What a name may be whose bytes were read in a wrong encoding: one that is not UTF-8, or UTF-8 read as another."""
    readings = []
    for encoding in () if text.isascii() else ENCODINGS:
        with suppress(UnicodeError):
            readings.append(text.encode(encoding).decode() if is_utf8(text) else os.fsencode(text).decode(encoding))
    return readings


def _without_suffix(path: str) -> str:
    stem, dot, suffix = path.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in SUFFIXES else path


CHANGES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("backslashes (write /)", lambda path: path.replace("\\", "/")),
    ("%-encoding", unquote),
    ("the Unicode form of the same letters (NFD, from macOS, or NFC)", partial(unicodedata.normalize, "NFC")),
    ("upper and lower case", str.casefold),
    ("the extension", _without_suffix),
)
"""Differences between a name and its file, and what makes them equal."""

NOT_UTF_8 = "the encoding (the file's name is not UTF-8)"
MISREAD = "the encoding (UTF-8 was read as another, which made Ã© of é)"


def _differences(name: str, path: str) -> tuple[str, ...]:
    """In what a name differs from the path, relative to the image folder, of the file it means."""
    found = []
    if not name.endswith(path) and (stripped := _stripped(name)) != name:
        found.append("white space around the name")
        name = stripped
    pairs = product((name, *_other_readings(name)), (path, *_other_readings(path)))
    read = next((pair for pair in pairs if _last_key(pair[0]) == _last_key(pair[1])), (name, path))
    if read != (name, path):
        found.append(MISREAD if is_utf8(path) else NOT_UTF_8)
        name, path = read
    for what, change in CHANGES:
        if name.endswith(path):
            break
        before = _common_end(name, path)
        name, path = change(name), change(path)
        if name.endswith(path) or _common_end(name, path) > before:
            found.append(what)
    if name == path:
        return tuple(found)
    is_below = name.endswith((f"/{path}", f"\\{path}", f"={path}"))
    return (*found, "the path in front") if is_below else ("what a tool added to the name",)


def _common_end(one: str, other: str) -> int:
    """Number of letters at the ends of two texts that agree."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
