"""Caches a data set's records: the second start maps a file into memory instead of parsing JSON again.

The records are those of detectron2's `load_coco_json` and its filter. Every process of a node shares the file's pages,
and a record is decoded when it is read. The annotations count as unchanged while their size and modification time are;
where the time differs, their hash decides. Nothing is unpickled, so that a cache written by somebody else can be wrong
at worst, not run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, overload

import msgspec
import numpy as np
import orjson
import platformdirs
from detectron2.data import MetadataCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from filelock import FileLock
from numpy.typing import NDArray

from trainers.contract.annotations import MAX_ID, read_annotations
from trainers.contract.plan import DatasetPlan

logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""One image in detectron2's dataset format."""

FORMAT = b"records2"
"""First bytes of a cache file; another number makes old files be rebuilt."""
_HEADER_BYTES = 16  # FORMAT and the length of the JSON that follows
_BOX_MODES = {mode.value: mode for mode in BoxMode}


class CachedRecords(Sequence[Record]):
    """Records in a file that `cached_records` wrote; each access decodes a new copy, which may be changed.

    Raises:
        ValueError: The file has another format, or is incomplete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._map[: len(FORMAT)] != FORMAT:
            raise ValueError(f"{path}: not a cache of records")
        length = int.from_bytes(self._map[len(FORMAT) : _HEADER_BYTES], "little")
        self.header: dict[str, Any] = orjson.loads(self._map[_HEADER_BYTES : _HEADER_BYTES + length])
        count, start = self.header["num_records"], _HEADER_BYTES + length
        self._bounds: NDArray[np.int64] = np.frombuffer(self._map, np.int64, count + 1, start)
        self.sizes: NDArray[np.int32] = np.frombuffer(self._map, np.int32, 2 * count, start + 8 * (count + 1)).reshape(
            -1, 2
        )
        """Height and width of each image, (N, 2)."""
        self._start = start + 8 * (count + 1) + 8 * count
        if self._start + int(self._bounds[-1]) != len(self._map):
            raise ValueError(f"{path}: an incomplete cache of records")

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """One record, or a list of those in a slice."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        start, end = (self._start + int(bound) for bound in self._bounds[position : position + 2])
        return _decode(self._map[start:end])

    def __reduce__(self) -> tuple[type[CachedRecords], tuple[Path]]:
        return CachedRecords, (self.path,)


def cached_records(dataset: DatasetPlan, filter_empty: bool, folder: Path | None = None) -> Sequence[Record]:
    """A COCO data set's records in detectron2's format, from the cache where it is up to date.

    As detectron2's loader does, it sets classes and category ids in the metadata of the data set's name. Where several
    processes start at once, one parses and the others wait for it. Without a cache (none can be written, or it would
    not preserve a value such as NaN) the records are a plain list.

    Args:
        dataset: The data set.
        filter_empty: Whether images without an object, or with crowds only, are left out.
        folder: Folder of the caches; None for this program's folder in the user's cache folder (`~/.cache/…`).

    Raises:
        OSError: The annotations cannot be read.
    """
    folder = folder or platformdirs.user_cache_path("ray-detectron2-benchmark", appauthor=False)
    source = Path(dataset.annotations).absolute()
    identity = [str(source), dataset.images, filter_empty]
    path = folder / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.records"
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock")))
        except (OSError, NotImplementedError) as error:  # a read-only home, or storage without locks
            logger.warning(
                "%s: no cache can be written there, annotations are parsed at every start: %s", folder, error
            )
            return _parse(dataset, filter_empty)
        records: Sequence[Record] | None = _open_current(path, source)
        if records is None:
            records = _build(dataset, filter_empty, path, source)
    if isinstance(records, CachedRecords):
        metadata = MetadataCatalog.get(dataset.name)
        metadata.thing_classes = records.header["classes"]
        metadata.thing_dataset_id_to_contiguous_id = {
            category: index for index, category in enumerate(records.header["category_ids"])
        }
    return records


def image_sizes(records: Sequence[Record]) -> NDArray[np.int32]:
    """Height and width of each record's image, (N, 2), without decoding cached ones."""
    if isinstance(records, CachedRecords):
        return records.sizes
    return np.array([(record["height"], record["width"]) for record in records], dtype=np.int32).reshape(-1, 2)


def _build(dataset: DatasetPlan, filter_empty: bool, path: Path, source: Path) -> Sequence[Record]:
    stamp, digest = _stamp(source), file_sha256(source)  # before it is parsed: it may be rewritten meanwhile
    records = _parse(dataset, filter_empty)
    metadata = MetadataCatalog.get(dataset.name)
    header = {
        **stamp,
        "sha256": digest,
        "num_records": len(records),
        "classes": list(metadata.thing_classes),
        "category_ids": list(metadata.thing_dataset_id_to_contiguous_id),
    }
    try:
        encoded = [_encode(record) for record in records]
        alike = all(_decode(data) == record for data, record in zip(encoded, records, strict=True))
    except (TypeError, ValueError):
        alike = False
    if not alike:
        logger.warning("%s: holds values that cannot be cached (NaN?); it is parsed at every start", source)
        return records
    bounds = np.concatenate([[0], np.cumsum([len(data) for data in encoded], dtype=np.int64)]).astype(np.int64)
    try:
        _write(path, header, bounds.tobytes(), image_sizes(records).tobytes(), *encoded)
    except OSError as error:
        logger.warning("%s: the cache cannot be written, annotations are parsed at every start: %s", path, error)
        return records
    return CachedRecords(path)


Id = Annotated[int, msgspec.Meta(ge=1 - MAX_ID, le=MAX_ID - 1)]


class _Image(msgspec.Struct):
    id: Id
    width: Id
    height: Id


class _Annotation(msgspec.Struct, gc=False):
    id: Id
    image_id: Id
    category_id: Id


class _Category(msgspec.Struct):
    id: Id


class _PlainFile(msgspec.Struct):
    """A file that detectron2 reads as the common reader does: UTF-8 without a byte-order mark, integers for ids."""

    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def load_records(dataset: DatasetPlan) -> list[Record]:
    """A COCO data set's records by detectron2's `load_coco_json`, whatever the encoding of the file and its ids.

    detectron2 opens the file itself. Of one that it would not read as the common reader does, it gets a copy.

    Raises:
        OSError: The annotations cannot be read.
        AnnotationFileError: They are not JSON; found by the checks before a run, unless they have changed since.
    """
    content = Path(dataset.annotations).read_bytes()
    with contextlib.ExitStack() as stack:
        file = dataset.annotations
        try:
            msgspec.json.decode(content, type=_PlainFile)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            document = read_annotations(content, orjson.loads).document
            copy = Path(stack.enter_context(tempfile.TemporaryDirectory()), Path(file).name)
            copy.write_text(json.dumps(document), encoding="utf-8")
            file = str(copy)
        del content
        records: list[Record] = load_coco_json(file, dataset.images, dataset.name)
    return records


def _parse(dataset: DatasetPlan, filter_empty: bool) -> list[Record]:
    records = load_records(dataset)
    return filter_images_with_only_crowd_annotations(records) if filter_empty else records


def _write(path: Path, header: dict[str, Any], *parts: bytes) -> None:
    """Writes a cache file so that it appears complete or not at all; its lock must be held."""
    for part in path.parent.glob(f"{path.stem}*.part"):
        part.unlink(missing_ok=True)  # of a process that was killed while it wrote
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)  # the numbers that follow are read in place
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".part", delete=False) as file:
        try:
            file.write(FORMAT + len(text).to_bytes(_HEADER_BYTES - len(FORMAT), "little") + text)
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _open_current(path: Path, source: Path) -> CachedRecords | None:
    """The cache if it is up to date with its source; else None."""
    try:
        cached = CachedRecords(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    stamp = _stamp(source)
    if all(cached.header.get(key) == value for key, value in stamp.items()):
        return cached
    if cached.header.get("size_bytes") != stamp["size_bytes"] or cached.header.get("sha256") != file_sha256(source):
        return None
    # Copied or touched, but unchanged: the new time saves the next start from hashing.
    body = memoryview(cached._map)[cached._start - 8 * (2 * len(cached) + 1) :]
    try:
        _write(path, {**cached.header, **stamp}, bytes(body))
    except OSError as error:
        logger.warning("%s: the cache cannot be written, annotations are hashed at every start: %s", path, error)
        return cached
    return CachedRecords(path)


def _stamp(source: Path) -> dict[str, int]:
    stat = source.stat()
    return {"size_bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in chunks; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encode(record: Record) -> bytes:
    """A record as JSON; the only values that are no JSON are the bytes of an RLE's counts."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return {"bytes": value.decode("ascii")}
        raise TypeError(type(value))

    return orjson.dumps(record, default=plain, option=orjson.OPT_PASSTHROUGH_SUBCLASS)


def _decode(data: bytes) -> Record:
    record: Record = orjson.loads(data)
    for annotation in record["annotations"]:
        annotation["bbox_mode"] = _BOX_MODES[annotation["bbox_mode"]]
        segmentation = annotation.get("segmentation")
        if type(segmentation) is dict and type(segmentation["counts"]) is dict:
            segmentation["counts"] = segmentation["counts"]["bytes"].encode("ascii")
    return record
