"""Checks a split of a COCO data set, annotations and image files together, and caches the result for large sets.

The cache is keyed by the content of the annotation file and by name, size and time of change of every image file, so
that a second check of COCO reads no image and parses nothing.
"""

from __future__ import annotations

import hashlib
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from orchestrator.data.annotation_file import check_annotations, parse_annotations
from orchestrator.data.entries import SplitSummary
from orchestrator.data.image_files import check_images
from orchestrator.data.image_names import FoundFile, list_files
from orchestrator.data.layout import Split
from orchestrator.data.overlap import find_overlap
from orchestrator.data.progress_bar import show_bar
from orchestrator.files import cache_folder, file_sha256, is_utf8, write_atomically
from orchestrator.findings import Finding, FindingList, has_errors
from trainers.contract.annotations import AnnotationFileError

CHECKS_VERSION = 5
"""Raised with every change of the checks or their messages, so that no older result is taken from the cache."""

CACHED_FROM = 2000
"""Images from which a result is cached; fewer are checked faster than anyone notices."""

OFFICIAL_COUNTS = {"instances_train2017.json": (118_287, 860_001), "instances_val2017.json": (5_000, 36_781)}
"""Images and annotations of COCO 2017 (cocodataset.org)."""

OFFICIAL_CATEGORIES = frozenset(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
"""COCO's 80 category ids."""


@dataclass
class SplitReport:
    """The result of checking one split."""

    findings: list[Finding]
    summary: SplitSummary | None
    """None where the annotation file could not be read."""
    from_cache: bool = False
    """Whether it is the result of an earlier check."""
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes of each image file that exists, by its path."""


class _Cached(msgspec.Struct):
    verified: bool
    report: SplitReport


def check_split(split: Split, *, verify_images: bool = False, use_cache: bool = True) -> SplitReport:
    """Checks an annotation file and the files of its images, with a progress bar.

    With `verify_images`, every image is decoded; otherwise only its head and end are read. With `use_cache`, the result
    of an earlier check is taken where nothing changed.
    """
    file, findings, listing = str(split.annotations), FindingList(), None
    for path in dict.fromkeys((split.annotations, split.images)):
        if not is_utf8(path):
            findings.error("path_invalid", str(path), "", "a name in this path is not UTF-8", "Rename it")
            return SplitReport(findings.to_list(), None)
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(file_sha256, split.annotations)
        try:
            listing = list_files(split.images)
        except OSError as error:
            what = f"the image folder cannot be read: {error.strerror}"
            hint = "Correct the folder's name, or give yourself read access"
            findings.error("images_missing", str(split.images), "", what, hint)
    try:
        digest = hashing.result()
        entry = _cache_entry(split, digest, listing) if use_cache and listing else None
        if entry is not None and (cached := _read_cache(entry, verify_images=verify_images)):
            return cached
        content = split.annotations.read_bytes()
    except OSError as error:
        hint = "Correct the file's name, or give yourself read access"
        findings.error("annotations_missing", file, "", f"cannot be read: {error.strerror}", hint)
        return SplitReport(findings.to_list(), None)
    summary = SplitSummary(file, str(split.images), digest)
    try:
        parsed = parse_annotations(content)
    except AnnotationFileError as error:
        findings.error(error.code, file, "", error.what, error.hint)
        return SplitReport(findings.to_list(), None)
    del content
    images = check_annotations(parsed, summary, findings, for_scoring=split.for_scoring)
    del parsed
    files: dict[str, int] = {}
    if listing is not None:
        with show_bar(f"checking {split.images.name}") as advance:
            files = check_images(
                images, file, split.images, listing, findings, verify=verify_images, on_progress=advance
            )
    summary.num_images_checked = len(files)
    _compare_with_official(split, summary, findings)
    report = SplitReport(findings.to_list(), summary, files=files)
    # What is wrong may pass without a change of the files: no access, a disk that does not answer.
    if entry is not None and summary.num_images >= CACHED_FROM and not has_errors(report.findings):
        _write_cache(entry, report, verify_images=verify_images)
    return report


def compare_splits(train: SplitReport, val: SplitReport) -> list[Finding]:
    """Checks that a training and a validation set have the same categories, by id and name, and no image in common."""
    findings = FindingList()
    if train.summary and val.summary:
        _compare_categories(train.summary, val.summary, findings)
        find_overlap(train.files, val.files, val.summary.annotations, findings)
    return findings.to_list()


def _compare_categories(train: SplitSummary, val: SplitSummary, findings: FindingList) -> None:
    if train.categories == val.categories or not train.categories or not val.categories:
        return
    only_train = {key: name for key, name in train.categories.items() if val.categories.get(key) != name}
    only_val = {key: name for key, name in val.categories.items() if train.categories.get(key) != name}
    what = f"the categories differ from the training set's: {_show(only_train)} there, {_show(only_val)} here"
    hint = "Give both files the same categories: a class number would mean something else in each"
    findings.error("categories_disagree", val.annotations, "categories", what, hint)


def _compare_with_official(split: Split, summary: SplitSummary, findings: FindingList) -> None:
    ids = summary.categories.keys()
    if ids == OFFICIAL_CATEGORIES:
        official = OFFICIAL_COUNTS.get(split.annotations.name)
        images, annotations = summary.num_images, summary.num_annotations
        if official and (images, annotations) != official:
            published = f"COCO 2017 has {official[0]:,} and {official[1]:,}"
            what = f"{images:,} images and {annotations:,} annotations; {published}"
            hint = "Nothing, if a part of COCO is intended; its figures are not comparable with COCO's"
            findings.warning("counts_differ", summary.annotations, "", what, hint)
    elif ids and sorted(ids) != list(range(min(ids), min(ids) + len(ids))):
        mapping = {category_id: index for index, category_id in enumerate(ids)}
        what = f"the category ids have gaps; detectron2 numbers the classes {_show(mapping)}"
        hint = "Nothing, if that is intended: results are written with the original ids"
        findings.warning("category_gaps", summary.annotations, "categories", what, hint)


def _show(mapping: dict[int, Any]) -> str:
    shown = ", ".join(f"{key}: {value}" for key, value in list(mapping.items())[:100])
    return "{" + shown + (", …" if len(mapping) > 100 else "") + "}"


def _cache_entry(split: Split, digest: str, listing: dict[str, FoundFile]) -> Path | None:
    """The file that a result is cached in; None for a small set."""
    if len(listing) < CACHED_FROM:
        return None
    names, key = sorted(listing), hashlib.sha256()
    paths = (split.annotations.absolute(), split.images.absolute())
    for part in (CHECKS_VERSION, *paths, split.for_scoring, digest, *names):
        key.update(f"{part}\0".encode("utf-8", "surrogateescape"))
    key.update(array("q", [number for name in names for number in listing[name][:2]]).tobytes())
    return cache_folder() / "checks" / f"{key.hexdigest()}.json"


def _read_cache(entry: Path, *, verify_images: bool) -> SplitReport | None:
    try:
        cached = msgspec.json.decode(entry.read_bytes(), type=_Cached)
    except (OSError, ValueError):
        return None  # absent or damaged: checked again
    return replace(cached.report, from_cache=True) if cached.verified or not verify_images else None


def _write_cache(entry: Path, report: SplitReport, *, verify_images: bool) -> None:
    # A cache that cannot be written costs time, nothing else.
    with suppress(OSError, ValueError):
        write_atomically(entry, msgspec.json.encode(_Cached(verify_images, report)))
