"""Reads a log's file as text: unpacks gzip, bzip2 and xz by their content, and finds out its encoding."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


class ReplayError(ValueError):
    """A log cannot be read as a training run; the message says which and why."""


_UNPACKERS: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lzma.LZMADecompressor,
}
"""The first bytes of packed files, and what unpacks them."""

_REFUSED = {
    b"PK\x03\x04": "a zip archive (or a checkpoint of PyTorch); unpack it, and name the log.txt in it",
    b"7z\xbc\xaf": "a 7z archive; unpack it, and name the log.txt in it",
    b"Rar!": "a rar archive; unpack it, and name the log.txt in it",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it with `unzstd`",
}

_SAMPLE = 128
"""Bytes at each end of a file that its encoding is found from."""


def read_text(path: Path) -> tuple[str, list[str]]:
    """The text of a file, without byte-order marks, and notes on what of it could not be read.

    Raises:
        ReplayError: The file cannot be read, is empty, or is an archive.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ReplayError(f"{path}: cannot be read: {error.strerror or error}") from error
    notes: list[str] = []
    raw = _unpacked(path, raw, notes)
    if not raw or raw.isspace():
        raise ReplayError(f"{path}: not a detectron2 log: it is empty")
    return _decoded(raw), notes


def _unpacked(path: Path, raw: bytes, notes: list[str]) -> bytes:
    for start, what in _REFUSED.items():
        if raw.startswith(start):
            raise ReplayError(f"{path}: {what}")
    if raw[257:262] == b"ustar":
        raise ReplayError(f"{path}: a tar archive; unpack it, and name the log.txt in it")
    unpacker_type = next((unpacker for start, unpacker in _UNPACKERS.items() if raw.startswith(start)), None)
    if unpacker_type is None:
        return raw
    parts: list[bytes] = []
    while raw:
        # A file that was appended to holds several streams.
        unpacker = unpacker_type()
        try:
            parts.append(unpacker.decompress(raw))
        except (OSError, zlib.error, lzma.LZMAError) as error:
            raise ReplayError(f"{path}: its packed data is damaged: {error}") from error
        if not unpacker.eof:
            notes.append("the packed file is cut off: what follows is not known")
            break
        raw = unpacker.unused_data.lstrip(b"\0")
    return _unpacked(path, b"".join(parts), notes)


def _decoded(raw: bytes) -> str:
    if raw[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return raw.decode("utf-32", errors="replace").replace("\ufeff", "")
    first, last = (_wide_encoding(part) for part in (raw[:_SAMPLE], raw[-_SAMPLE - len(raw) % 2 :]))
    if first == last and first:
        text = raw.decode(first, errors="replace")
    elif b"\0" in raw[: 10 * _SAMPLE] + raw[-_SAMPLE:]:
        # PowerShell's >> appends UTF-16 to any file.
        text = "\n".join(map(_decoded_line, raw.split(b"\n")))
    else:
        text = raw.decode("utf-8", errors="replace")
    return text.replace("\ufeff", "").replace("\0", "")


def _decoded_line(line: bytes) -> str:
    encoding = "utf-16-le" if _wide_encoding(line) else "utf-8"
    return line.removeprefix(b"\0").decode(encoding, errors="replace")  # a zero that belongs to the line's end before


def _wide_encoding(part: bytes) -> str | None:
    """UTF-16 by the zeros that ASCII has in it, whether it begins with a mark or not; None for anything else."""
    even, odd = part[0::2].count(0), part[1::2].count(0)
    if max(even, odd) * 4 < len(part):
        return None
    return "utf-16-le" if odd > even else "utf-16-be"
