"""A bundle's file: a zip whose bytes depend on its contents alone, and reading one that a stranger made."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.findings import FindingList, printable

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
"""A signature of the manifest's bytes; the one file that the manifest cannot list."""

MAX_FILES = 10_000
MAX_BYTES = 2**30
"""Unpacked: ninety thousand iterations of eight workers leave a tenth of it."""

MAX_RATIO = 200
"""Most bytes that a packed byte may become; logs and events become some ten."""

MAX_DEPTH = 8
MAX_NAME = 200
CHUNK_BYTES = 2**20

EARLIEST = (1980, 1, 1, 0, 0, 0)
"""Date of every file in the zip, the first that the format can hold."""


class BundleError(ValueError):
    """A file is no bundle, or a folder cannot become one; the text is one line."""


class FileEntry(BaseModel):
    """What the manifest says of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """`manifest.json`: every file of the bundle but itself and its signature."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    format: Literal["detection-benchmark bundle"] = "detection-benchmark bundle"
    version: Literal[1] = 1
    """Version of this format; a reader refuses one it does not know."""
    files: dict[str, FileEntry] = {}


@dataclass(frozen=True, slots=True)
class Bundle:
    """An unpacked bundle."""

    folder: Path
    manifest: Manifest
    manifest_sha256: str
    found: dict[str, FileEntry]
    """The files that it really holds, without manifest and signature."""

    @property
    def is_signed(self) -> bool:
        """Whether it holds a signature, good or bad."""
        return (self.folder / SIGNATURE).is_file()


def write_archive(path: Path, files: Iterable[tuple[str, bytes]], sign: Callable[[bytes], bytes] | None = None) -> str:
    """Writes a bundle: the same files make the same bytes. Returns the SHA-256 of its manifest.

    Args:
        path: The file; one that exists is replaced when the new one is complete.
        files: Name in the bundle (`runs/NAME/…`) and content of each file, by name.
        sign: Makes the signature of the manifest's bytes; None for none.

    Raises:
        BundleError: There is too much for one bundle.
        OSError: It cannot be written.
    """
    manifest, size = Manifest(), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as partial:
        try:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
                for name, content in files:
                    size += len(content)
                    manifest.files[name] = _entry(content)
                    _check_room(path, len(manifest.files), size)
                    _add(archive, name, content)
                text = (manifest.model_dump_json(indent=1) + "\n").encode()
                _add(archive, MANIFEST, text)
                if sign is not None:
                    _add(archive, SIGNATURE, sign(text))
            partial.flush()
            os.fchmod(partial.fileno(), 0o644)
            Path(partial.name).replace(path)
        except BaseException:
            Path(partial.name).unlink(missing_ok=True)
            raise
    return hashlib.sha256(text).hexdigest()


def unpack(path: Path, to: Path) -> Bundle:
    """Unpacks a bundle, which may be anybody's, into an empty folder; nothing is written outside of it.

    Raises:
        BundleError: It is no bundle, is damaged, or holds what no bundle holds: a name that leads out of the folder, a
            link, a folder, two files of one name, more than the limits of this module.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            _check_entries(path, infos)
            found = {info.filename: _extract(archive, info, to) for info in infos}
    except FileNotFoundError as error:
        raise BundleError(f"{path}: there is no such file") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeError) as error:
        raise BundleError(f"{path}: not a bundle, or a damaged one: {printable(str(error))}") from error
    if MANIFEST not in found:
        raise BundleError(f"{path}: not a bundle: it holds no {MANIFEST}")
    content = (to / MANIFEST).read_bytes()
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        what = printable(f"{where[:MAX_NAME]}: {problem['msg']}")
        raise BundleError(f"{path}: its {MANIFEST} is none that this version reads: {what}") from error
    files = {name: entry for name, entry in found.items() if name not in (MANIFEST, SIGNATURE)}
    return Bundle(to, manifest, hashlib.sha256(content).hexdigest(), files)


def check_files(bundle: Bundle, findings: FindingList) -> None:
    """Compares the files with the manifest."""
    hint = "Ask for the bundle as it was made"
    for name in sorted({*bundle.manifest.files, *bundle.found}):
        listed, found = bundle.manifest.files.get(name), bundle.found.get(name)
        if listed is None:
            findings.error("file_added", name, "", "the manifest does not list it", hint)
        elif found is None:
            findings.error("file_missing", name, "", "the manifest lists it, and it is not there", hint)
        elif listed != found:
            findings.error("file_changed", name, "", "its content is not that of the manifest", hint)


def _check_room(path: Path, num_files: int, size: int) -> None:
    if num_files > MAX_FILES or size > MAX_BYTES:
        limit = f"{MAX_FILES:,} files and {MAX_BYTES // 2**20:,} MiB"
        raise BundleError(f"{path}: too much for one bundle, which holds {limit}; bundle fewer runs")


def _check_entries(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    """Refuses a zip by its table of contents, before anything is unpacked."""
    unpacked, packed = sum(info.file_size for info in infos), sum(info.compress_size for info in infos)
    if len(infos) > MAX_FILES + 2 or unpacked > MAX_BYTES + 2**20:
        raise BundleError(f"{path}: not a bundle: it would unpack to {len(infos):,} files of {unpacked:,} bytes")
    if unpacked > MAX_RATIO * packed + 2**20:
        raise BundleError(f"{path}: not a bundle: {packed:,} bytes would unpack to {unpacked:,}")
    names: set[str] = set()
    for info in infos:
        shown, mode = repr(info.filename)[:MAX_NAME], info.external_attr >> 16
        if not _is_safe(info.filename) or info.orig_filename != info.filename:
            raise BundleError(f"{path}: not a bundle: {shown} is no name of a file in it")
        if info.is_dir() or stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise BundleError(f"{path}: not a bundle: {shown} is no plain file")
        if info.filename.casefold() in names:
            raise BundleError(f"{path}: not a bundle: it holds {shown} twice")
        names.add(info.filename.casefold())


def _is_safe(name: str) -> bool:
    """Whether a name is a relative path that stays in its folder on every system."""
    parts = name.split("/")
    return (
        len(parts) <= MAX_DEPTH
        and len(name) <= MAX_NAME
        and name.isprintable()
        and not set(name) & set('\\:*?"<>|')
        and all(part.strip(" .") == part.strip(" ") == part and part for part in parts)
        and str(PurePosixPath(name)) == name
    )


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, to: Path) -> FileEntry:
    target, digest, size = to / info.filename, hashlib.sha256(), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(info) as source, target.open("xb") as file:
        while chunk := source.read(CHUNK_BYTES):
            size += len(chunk)
            if size > info.file_size:
                raise zipfile.BadZipFile(f"{info.filename} is longer than it says")
            digest.update(chunk)
            file.write(chunk)
    return FileEntry(bytes=size, sha256=digest.hexdigest())


def _entry(content: bytes) -> FileEntry:
    return FileEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    if not _is_safe(name):
        raise BundleError(f"{name!r} cannot be the name of a file in a bundle")
    info = zipfile.ZipInfo(name, EARLIEST)
    info.compress_type, info.create_system = zipfile.ZIP_DEFLATED, 3
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    archive.writestr(info, content, compresslevel=9)
