"""Finds the file of each annotated image, and says where the files are whose names do not lead to them."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict, deque
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from orchestrator.data.entries import Problem
from orchestrator.data.name_matching import NameMatch, match_names, part_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from orchestrator.data.entries import ImageEntry
    from orchestrator.findings import FindingList

MAX_SEARCHED = 200_000
"""Files and folders looked at in a search outside the image folder: a second on a local disk."""

MAX_GROUPS = 5
"""Kinds of differences between names and files that are reported of one annotation file."""

RELATIVE = "Write it relative to the image folder"
SETTING = "data.coco.train_images or val_images of an experiment, `--images` of `data check`"

FoundFile = tuple[int, int, bool]
"""What a folder's listing says of a file: size in bytes, time of change in ns, whether a link leads to it."""


def list_files(root: Path) -> dict[str, FoundFile]:
    """Lists all files below `root` by relative name; links are followed, broken ones left out.

    Raises:
        OSError: A folder is unreadable.
    """
    found: dict[str, FoundFile] = {}
    real_root = os.path.realpath(root)
    folders, linked = [(str(root), "", False)], {real_root}
    while folders:
        folder, prefix, is_linked = folders.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                is_link = entry.is_symlink()
                if entry.is_dir():
                    if is_link:
                        real = os.path.realpath(entry.path)
                        if real in linked or f"{real_root}/".startswith(f"{real}/"):
                            continue  # a loop, or what is listed already
                        linked.add(real)
                    folders.append((entry.path, f"{prefix}{entry.name}/", is_linked or is_link))
                elif entry.is_file():
                    status = entry.stat()
                    found[prefix + entry.name] = (status.st_size, status.st_mtime_ns, is_linked or is_link)
    return found


def check_name(name: str) -> Problem | None:
    """Refuses a `file_name` that is not a path inside the image folder: absolute, with `..`, or not a path at all."""
    if "\0" in name or len(name) > 4000 or any("\ud800" <= character <= "\udfff" for character in name):
        return Problem("path_invalid", f"file_name {name[:80]!r} cannot be a path", RELATIVE)
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        return Problem("path_absolute", f"file_name {name!r} is absolute", RELATIVE)
    if ".." in name and posixpath.normpath(name.replace("\\", "/")).split("/")[0] == "..":
        return Problem("path_parent", f"file_name {name!r} leaves the image folder with '..'", RELATIVE)
    return None


def locate_images(
    images: Sequence[ImageEntry], file: str, root: Path, listing: dict[str, FoundFile], findings: FindingList
) -> list[tuple[ImageEntry, str]]:
    """Finds the file of each image, and reports the names that lead to none, once for each reason.

    Args:
        images: The entries of an annotation file.
        file: The annotation file.
        root: The image folder.
        listing: What `list_files` found in it.
        findings: Added to.

    Returns:
        The images whose file exists, each with the path of the file.
    """
    located: list[tuple[ImageEntry, str]] = []
    missing: list[ImageEntry] = []
    refused: defaultdict[str, list[tuple[ImageEntry, Problem]]] = defaultdict(list)
    linked: list[tuple[ImageEntry, str]] = []
    absolute: list[ImageEntry] = []
    real_root, plain_root = os.path.realpath(root), os.path.abspath(root)  # noqa: PTH100 - no link is resolved
    for image in images:
        name = image.file_name
        if problem := check_name(name):
            inside = _is_inside(name, plain_root, real_root) and Path(name).is_file()
            if problem.code != "path_absolute" or not inside:
                refused[problem.code].append((image, problem))
                continue
            absolute.append(image)
        found = listing.get(name)
        path = os.path.join(root, name)  # noqa: PTH118 - as detectron2 does, 118,000 times
        if found is None and not Path(path).is_file():
            missing.append(image)
            continue
        located.append((image, path))
        if (found is None or found[2]) and not _is_inside(real := os.path.realpath(path), real_root):
            linked.append((image, real))
    if absolute:
        what = f"{_count(absolute, len(images))} an absolute file_name, such as {absolute[0].file_name!r}"
        findings.warning("path_absolute", file, _place(absolute), what, f"{RELATIVE}: another machine has another path")
    if linked:
        image, real = linked[0]
        what = f"{len(linked):,} of {len(images):,} images are links out of {root}: {image.file_name!r} to {real}"
        hint = "Nothing, where every node of a run has the files that they lead to"
        findings.warning("path_link", file, _place([image for image, _ in linked]), what, hint)
    _report(missing, refused, file, root, listing, findings, located=located)
    return located


def _is_inside(path: str, *roots: str) -> bool:
    normal = os.path.normpath(path)
    return any(normal.startswith(f"{root.rstrip('/')}/") for root in roots)


def _count(images: Sequence[ImageEntry], total: int) -> str:
    return f"{len(images):,} of {total:,} images {'has' if len(images) == 1 else 'have'}"


def _place(images: Sequence[ImageEntry]) -> str:
    return f"image {images[0].id}" if len(images) == 1 else f"{len(images):,} images"


def _report(
    missing: list[ImageEntry],
    refused: dict[str, list[tuple[ImageEntry, Problem]]],
    file: str,
    root: Path,
    listing: dict[str, FoundFile],
    findings: FindingList,
    *,
    located: list[tuple[ImageEntry, str]],
) -> None:
    """Reports the images without a file: by where their files are, else by what is wrong with their names."""
    lost = missing + [image for pairs in refused.values() for image, problem in pairs if problem.code != "path_invalid"]
    if lost:
        total = len(located) + len(lost)
        matches = _search([image.file_name for image in lost], file, root, listing, located)
        groups: defaultdict[tuple[object, ...], list[tuple[ImageEntry, NameMatch]]] = defaultdict(list)
        for image in lost:
            if match := matches.get(image.file_name):
                groups[match.base, match.folder, match.differences].append((image, match))
        biggest = sorted(groups.values(), key=len, reverse=True)
        for group in biggest[:MAX_GROUPS]:
            _report_group(group, total, file, root, findings)
        rest = [pair for group in biggest[MAX_GROUPS:] for pair in group]
        if rest:
            what = f"the files of {len(rest):,} more are elsewhere, in {len(biggest) - MAX_GROUPS:,} other ways"
            hint = _fix(file, rest[0][1].base)
            findings.error("image_missing", file, _place([image for image, _ in rest]), what, hint)
        _report_missing([image for image in missing if image.file_name not in matches], total, root, listing, findings)
        refused = {
            code: [pair for pair in pairs if pair[0].file_name not in matches] for code, pairs in refused.items()
        }
    for code, pairs in refused.items():
        if pairs:
            what = pairs[0][1].what + (f", and {len(pairs) - 1:,} more like this" if len(pairs) > 1 else "")
            findings.error(code, file, _place([image for image, _ in pairs]), what, pairs[0][1].hint)


def _search(
    names: list[str], file: str, root: Path, listing: dict[str, FoundFile], located: list[tuple[ImageEntry, str]]
) -> dict[str, NameMatch]:
    """Looks for files below the image folder; where most names have none there, also around it and the annotations."""
    used = {image.file_name for image, _ in located}
    most_are_lost = len(names) > len(located)
    spare = (name for name in listing if name not in used)
    part = part_of(file)
    matches = match_names(names, str(root), spare, whole_paths=not most_are_lost, part=part)
    if not most_are_lost:
        return matches
    parent = Path(file).absolute().parent
    for base in dict.fromkeys([*_named_folders(names, root), root.absolute().parent, parent, parent.parent]):
        if 2 * len(matches) > len(names):
            break
        if base == Path(base.anchor) or base == root.absolute():
            continue
        lost = [name for name in names if name not in matches]
        matches |= match_names(lost, str(base), walk_files(base, MAX_SEARCHED), whole_paths=False, part=part)
    return matches


def _named_folders(names: list[str], root: Path) -> Iterator[Path]:
    """The folder that all names lead to which lead out of the image folder to a file."""
    outside = [
        os.path.normpath(root.absolute() / name) for name in names if ".." in name or PurePosixPath(name).is_absolute()
    ]
    folders = [str(Path(path).parent) for path in outside if "\0" not in path and Path(path).is_file()]
    if folders:
        yield Path(os.path.commonpath(folders))


def walk_files(base: Path, max_entries: int) -> Iterator[str]:
    """Names of the files below a folder, relative to it, the near ones first; without hidden and unreadable folders."""
    folders, seen = deque([(str(base), "")]), 0
    while folders and seen < max_entries:
        folder, prefix = folders.popleft()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    seen += 1
                    if entry.name.startswith(".") or seen > max_entries:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append((entry.path, f"{prefix}{entry.name}/"))
                    else:
                        yield prefix + entry.name
        except OSError:
            continue


def _report_group(
    group: list[tuple[ImageEntry, NameMatch]], total: int, file: str, root: Path, findings: FindingList
) -> None:
    images, (_, match) = [image for image, _ in group], group[0]
    folder = os.path.join(match.base, match.folder).rstrip("/")  # noqa: PTH118 - a text, no path object
    if not match.differences:
        is_all = len(images) == total
        count = f"none of the {total:,} images is" if is_all else f"{len(images):,} of {total:,} images are not"
        what = f"{count} in this folder, {match.name!r} for one: the files are in {folder}"
        hint = f"Set the image folder to {folder} ({SETTING})" if is_all else _fix(file, match.base)
        findings.error("image_missing", str(root), _place(images), what, hint)
        return
    place = "" if match.base == str(root) else f" in {match.base}"
    what = (
        f"{len(images):,} of {total:,} file names differ from the files{place} by {' and '.join(match.differences)}: "
        f"{match.name!r} is there as {match.path!r}"
    )
    findings.error("image_missing", file, _place(images), what, _fix(file, match.base))


def _fix(file: str, base: str) -> str:
    new = Path(file).with_suffix(".fixed.json")
    command = f"python -m orchestrator.data fix-names {file} --images {base} --to {new}"
    return f"Write the names as the files have them: `{command}`, then use that file, with the image folder {base}"


def _report_missing(
    missing: list[ImageEntry], total: int, root: Path, listing: dict[str, FoundFile], findings: FindingList
) -> None:
    if not missing:
        return
    names = [image.file_name for image in missing]
    again = "Copy or download them again, or remove them from the annotation file"
    if addresses := [name for name in names if name.startswith(("http://", "https://"))]:
        what = f"{len(addresses):,} of {total:,} file names are addresses, such as {addresses[0]!r}"
        hint = "Download the images, and write their names relative to the image folder: images are read from files"
        findings.error("image_missing", str(root), f"{len(addresses):,} images", what, hint)
        missing = [image for image in missing if image.file_name not in set(addresses)]
    broken = [image for image in missing if (root / image.file_name).is_symlink()]
    if broken:
        target = os.path.realpath(root / broken[0].file_name)
        what = f"{len(broken):,} of {total:,} files are links to nothing, {broken[0].file_name!r} to {target} for one"
        hint = "Fetch or mount what they lead to (`dvc pull`, `git annex get` …)"
        findings.error("image_missing", str(root), _place(broken), what, hint)
        missing = [image for image in missing if not (root / image.file_name).is_symlink()]
    if len(missing) == total > 1:
        content = f"it holds {len(listing):,} other files, such as {min(listing)!r}" if listing else "it is empty"
        what = f"none of the {total:,} images is in this folder, {missing[0].file_name!r} for one; {content}"
        hint = f"Name the folder that the file_name entries are relative to ({SETTING})"
        findings.error("image_missing", str(root), "all images", what, hint)
    elif len(missing) == 1:
        path, hint = f"{root}/{missing[0].file_name}", again.replace("them", "it")
        findings.error("image_missing", path, f"image {missing[0].id}", "the file does not exist", hint)
    elif missing:
        examples = ", ".join(repr(image.file_name) for image in missing[:3])
        what = f"{len(missing):,} of {total:,} files do not exist, such as {examples}"
        findings.error("image_missing", str(root), _place(missing), what, again)
