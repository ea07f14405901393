"""The one reader of COCO annotation files, for the driver's checks, the loaders and the scorer: text encodings and ids.

Standard library only; whoever has a faster JSON parser passes it in.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

MAX_ID = 2**63
"""Ids from it on are numbered in order: neither NumPy nor JSON readers other than Python's hold such integers."""

_INTEGER_TEXT = re.compile(r"\s*([+-]?[0-9]{1,16})(?:\.0*)?\s*")
_REFERENCES = {"image_id": "images", "category_id": "categories"}
_COPY_AGAIN = "Copy or download it again"


class AnnotationFileError(ValueError):
    """A file is not JSON text; its arguments are a code, what is wrong, and how to fix it."""

    def __init__(self, code: str, what: str, hint: str) -> None:
        super().__init__(code, what, hint)
        self.code, self.what, self.hint = code, what, hint

    def __str__(self) -> str:
        return f"{self.what}. {self.hint}."


class AnnotationFile(NamedTuple):
    """What an annotation file holds."""

    document: Any
    """The JSON value; a dict in COCO's format. Its ids are integers wherever they can be read as such."""
    num_converted: int
    """Ids, widths and heights that were another kind of number or text in the file."""
    example: str
    """The first of them as it is in the file, such as `image_id '000012'`; "" for none."""


def read_annotations(content: bytes, loads: Callable[[bytes], Any] = json.loads) -> AnnotationFile:
    """Reads an annotation file as pycocotools does, and more: any Unicode encoding, ids as text or decimals.

    Ids such as `"12"`, `12.0` or `"2.0"` become integers. Where all ids of a list are text and some of it is no number
    (`"img_0001"`), or all are numbers and some is huge (a UUID's), they are numbered from 1 in their order, which is
    the order in which detectron2 takes them; references to them follow. Ids of annotations may be mixed.

    Args:
        content: The bytes of the file: UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.
        loads: A faster parser of UTF-8. What it refuses with a ValueError is read by Python's, which knows NaN and
            names the place of a mistake.

    Raises:
        AnnotationFileError: The content is not JSON.
    """
    text = to_utf8(content)
    try:
        document = loads(text)
        ids = (entry.get("id") for key in ("images", "categories", "annotations") for entry in _objects(document, key))
        if any(type(value) is float and abs(value) >= MAX_ID for value in ids):
            document = json.loads(text)  # other parsers round integers of more than 64 bits
    except (ValueError, RecursionError):
        document = _read_with_python(text)
    return AnnotationFile(document, *_convert_ids(document))


def to_utf8(content: bytes) -> bytes:
    """A file's text as UTF-8 without a byte-order mark.

    Raises:
        AnnotationFileError: The file is empty, no text, or in another encoding.
    """
    if (problem := placeholder(content[:512])) is not None:
        raise AnnotationFileError("json_placeholder", *problem)
    encoding = json.detect_encoding(content)
    text = content.removeprefix(codecs.BOM_UTF8)
    if not encoding.startswith("utf-8"):
        try:
            text = content.decode(encoding).encode()
        except UnicodeError as error:
            raise _undecodable(content, encoding, error) from None
    if not text.strip():
        raise AnnotationFileError("json_invalid", "the file is empty", _COPY_AGAIN)
    return text


def placeholder(head: bytes) -> tuple[str, str] | None:
    """Recognises, by its first bytes, what lies in a file's place: what it is and how to fix it; None for neither."""
    start = head.lstrip(codecs.BOM_UTF8 + b" \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself", "Run `git lfs pull` in its repository"
    if start.startswith((b"/annex/objects/", b"../.git/annex/", b".git/annex/")):
        return "a git-annex pointer, not the file itself", "Run `git annex get` in its repository"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        hint = "Download it again: the server answered with a page, such as a login or an error, instead of the file"
        return "a web page (HTML), not the file itself", hint
    if start.startswith((b"<?xml", b"<error>")) and b"<error>" in start:
        return "a server's error message (XML), not the file itself", "Download it again, with access to the storage"
    return None


def _read_with_python(text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise _undecodable(text, "utf-8", error) from None
    except RecursionError:
        hint = "Name another file"
        raise AnnotationFileError("json_invalid", "nested too deeply to be annotations", hint) from None
    except ValueError as error:
        raise _not_json(text, error) from None


def _undecodable(content: bytes, encoding: str, error: UnicodeError) -> AnnotationFileError:
    for mark, name in ((b"\x1f\x8b", "gzip"), (b"PK\x03\x04", "zip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz")):
        if content.startswith(mark):
            return AnnotationFileError("json_invalid", f"the file is compressed ({name})", "Unpack it")
    place = f": byte {error.start:,} of {len(content):,}" if isinstance(error, UnicodeDecodeError) else ""
    what = f"not {'UTF-8' if encoding == 'utf-8' else encoding.upper()} text{place}"
    return AnnotationFileError("json_invalid", what, "Save it as UTF-8, or copy or download it again")


def _not_json(text: bytes, error: ValueError) -> AnnotationFileError:
    position, reason = getattr(error, "pos", 0), getattr(error, "msg", str(error))
    characters = text.decode()
    place = f"{reason} at byte {len(characters[:position].encode()):,} of {len(text):,}"
    if reason == "Extra data":
        hint = "Take the text after the document out; several documents, or one in each line, are not COCO's format"
        return AnnotationFileError("json_invalid", f"not one JSON document: {place}", hint)
    # Cut in the middle of a text, or with no more than the beginning of a number or a word left.
    rest = characters[position:].strip()
    if reason.startswith("Unterminated string") or (len(rest) <= 8 and not rest.endswith(("}", "]"))):
        what = f"the file ends in the middle: {place}"
        return AnnotationFileError("json_truncated", what, f"{_COPY_AGAIN}: the end is missing")
    return AnnotationFileError("json_invalid", f"not JSON: {place}", "Correct that place")


def _convert_ids(document: Any) -> tuple[int, str]:
    """Makes the ids of a document integers, in place; returns how many were none, and the first of them."""
    parts = {key: _objects(document, key) for key in ("images", "categories", "annotations")}
    numbers = {
        # Nothing depends on the order of annotations' ids.
        key: _number_ids((entry.get("id") for entry in entries), may_mix=key == "annotations")
        for key, entries in parts.items()
    }
    count, example = 0, ""
    for key, entries in parts.items():
        fields = {"images": ("id", "width", "height"), "annotations": ("id", *_REFERENCES)}.get(key, ("id",))
        for entry in entries:
            for name in fields:
                value = entry.get(name)
                known = numbers.get(key if name == "id" else _REFERENCES.get(name, ""), {})
                if type(value) not in (str, float) and not (type(value) is int and known):
                    continue
                entry[name] = _integer(value, known)
                if type(entry[name]) is int:
                    count, example = count + 1, example or f"{name} {value!r}"
    return count, example


def _objects(document: Any, key: str) -> list[dict[str, Any]]:
    entries = document.get(key) if isinstance(document, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _number_ids(ids: Iterable[Any], may_mix: bool) -> dict[Any, int]:
    """Numbers from 1 for ids in their order; {} where they are integers as such, or mixed with what has no order."""
    values = set()
    for value in ids:
        if type(value) not in (str, int, float):
            return {}
        values.add(value)
    read = {_integer(value, {}) for value in values}
    if len(read) == len(values) and all(type(value) is int and abs(value) < MAX_ID for value in read):
        return {}
    are_alike = {type(value) for value in values} == {str} or all(
        type(value) is not str and value // 1 == value for value in values
    )
    if not (are_alike or may_mix):
        return {}
    return {value: number for number, value in enumerate(sorted(values, key=None if are_alike else str), 1)}


def _integer(value: Any, numbers: Mapping[Any, int]) -> Any:
    """An id as an integer; where it cannot be read as one, the value itself, or its text where ids are numbered."""
    if numbers:
        return numbers.get(value, numbers.get(str(value), str(value)))
    if type(value) is int:
        return value
    if type(value) is float:
        return int(value) if value.is_integer() and abs(value) < MAX_ID else value
    match = _INTEGER_TEXT.fullmatch(value)
    return int(match[1]) if match else value
