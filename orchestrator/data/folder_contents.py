"""Lists what a data set's folder holds, and recognises the annotation files in COCO's format."""

from __future__ import annotations

import codecs
import json
import mmap
import os
import re
from collections import Counter, deque
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from trainers.contract.annotations import AnnotationFileError, to_utf8

MAX_DEPTH = 4
"""Folders below the data set's that are looked at."""

MAX_FOLDERS = 5000
"""Folders looked at; a data set with one per video may have thousands."""

NUM_SAMPLED = 8
"""File names of an annotation file that have to lead to files."""


class Contents(NamedTuple):
    """What a data set's folder holds."""

    folders: list[Path]
    jsons: list[Path]
    suffixes: Counter[str]
    """Number of files by extension, in lower case."""


def scan(root: Path) -> Contents:
    """Lists a folder, the near folders first, without hidden and unreadable ones."""
    contents = Contents([], [], Counter())
    queue = deque([(root, 0)])
    while queue and len(contents.folders) < MAX_FOLDERS:
        folder, depth = queue.popleft()
        contents.folders.append(folder)
        _, folders, files = next(os.walk(folder), ("", [], []))
        if depth < MAX_DEPTH:
            queue.extend((folder / name, depth + 1) for name in sorted(folders) if not name.startswith("."))
        for name in files:
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - a text, 118,000 times
            contents.suffixes[suffix] += 1
            if suffix == ".json" and not name.startswith("."):
                contents.jsons.append(folder / name)
    return contents


def is_annotation_file(file: Path) -> bool:
    """Whether a JSON file has the lists of COCO's format; decided by its keys, without reading it all as JSON."""
    text = read_text(file)
    if text is None:
        return False
    head = text[:4096].removeprefix(codecs.BOM_UTF8).lstrip()
    if not head.startswith(b"{") or not re.search(rb'"(info|images|annotations|categories|licenses)"\s*:', head):
        return False
    return all(re.search(rb'"' + key + rb'"\s*:\s*(\[|null\b)', text) for key in (b"images", b"annotations"))


def has_annotations(file: Path) -> bool:
    """Whether an annotation file lists an annotation; a competition's test set has none."""
    return re.search(rb'"annotations"\s*:\s*\[\s*\{', read_text(file) or b"") is not None


def read_text(file: Path) -> bytes | mmap.mmap | None:
    """A file's text in UTF-8, mapped into memory where it is in that encoding already; None where it has none."""
    try:
        with file.open("rb") as stream:
            if not json.detect_encoding(stream.read(4)).startswith("utf-8"):
                return to_utf8(file.read_bytes())
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError, AnnotationFileError):
        return None


def sample_names(file: Path) -> list[str]:
    """Some file names of an annotation file, without those that are no JSON text."""
    names = []
    for match in islice(re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', read_text(file) or b""), NUM_SAMPLED):
        with suppress(ValueError):
            names.append(json.loads(match[1]))
    return names
