"""Finds images that a training and a validation set have in common: the same file, or another with the same content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from orchestrator.files import file_sha256
from orchestrator.findings import FindingList

SAMPLE_BYTES = 4096
"""Bytes from the middle of files of one size that are compared first; few different images agree in them."""


def find_overlap(train: Mapping[str, int], val: Mapping[str, int], file: str, findings: FindingList) -> None:
    """Reports validation images that are training images, too.

    Files are read only where their sizes agree, and hashed only where a part of them does, so that the time is linear
    in the number of files.

    Args:
        train: Size in bytes of each training image, by its path.
        val: The same of the validation images.
        file: The validation annotations, for the findings.
        findings: Added to.
    """
    hint = "Remove them from one of the two sets: figures on images that were trained on are too good"
    same = [path for path in val if path in train]
    if same:
        what = f"{len(same):,} of {len(val):,} validation images are training images, too, such as {same[0]!r}"
        findings.warning("split_overlap", file, f"{len(same):,} images", what, hint)
    copies = _find_copies(train, {path: size for path, size in val.items() if path not in train})
    if copies:
        copy, original = next(iter(copies.items()))
        what = f"{len(copies):,} of {len(val):,} validation images are copies of training images: {copy} of {original}"
        findings.warning("split_overlap", file, f"{len(copies):,} copies", what, hint)


def _find_copies(train: Mapping[str, int], val: Mapping[str, int]) -> dict[str, str]:
    """For each validation image with the bytes of a training image, that image."""
    sizes = set(train.values()) & set(val.values()) - {0}
    train_samples, val_samples = (
        {path: (size, _digest(path, size)) for path, size in files.items() if size in sizes} for files in (train, val)
    )
    samples = set(train_samples.values()) & set(val_samples.values())
    originals: dict[str, str] = {}
    for path, sample in train_samples.items():
        if sample in samples:
            originals.setdefault(_digest(path), path)
    copies = {path: originals.get(_digest(path)) for path, sample in val_samples.items() if sample in samples}
    return {path: original for path, original in copies.items() if original is not None}


def _digest(path: str, size: int | None = None) -> str:
    """SHA-256 of a file, or of the middle of one of the size given; of nothing where it cannot be read any more."""
    try:
        if size is None:
            return file_sha256(Path(path))
        file = os.open(path, os.O_RDONLY)  # a tenth of the time of a stream, for 100,000 files
        try:
            return hashlib.sha256(os.pread(file, SAMPLE_BYTES, max(0, (size - SAMPLE_BYTES) // 2))).hexdigest()
        finally:
            os.close(file)
    except OSError:
        return ""
