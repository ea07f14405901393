"""Finds the file of each annotated image, and says where the files are whose names do not lead to them."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from shlex import quote

from orchestrator.data.entries import ImageEntry, Problem
from orchestrator.data.name_matching import NameMatch, match_names, part_of
from orchestrator.files import is_file, is_utf8
from orchestrator.findings import Finding, FindingList

MAX_SEARCHED = 200_000
"""Files and folders looked at in a search outside the image folder: a second on a local disk."""

RELATIVE = "Write it relative to the image folder"
SETTING = "data.coco.train_images or val_images of an experiment, `--images` of `data check`"

FoundFile = tuple[int, int, bool]
"""What a folder's listing says of a file: size in bytes, time of change in ns, whether a link leads to it."""


def list_files(root: Path) -> dict[str, FoundFile]:
    """Lists all files below `root` by relative name; links are followed, broken ones left out.

    So are folders in it that cannot be read, such as a disk's `lost+found`.

    Raises:
        OSError: `root` is unreadable.
    """
    found: dict[str, FoundFile] = {}
    real_root = os.path.realpath(root)
    folders, linked = [(str(root), "", False)], {real_root}
    while folders:
        folder, prefix, is_linked = folders.pop()
        try:
            listed = os.scandir(folder)
        except OSError:
            if not prefix:
                raise
            continue
        with listed as entries:
            for entry in entries:
                is_link = entry.is_symlink()
                if is_link and not os.path.exists(entry.path):  # noqa: PTH110 - also leads to nothing: to itself
                    continue
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
    lost: list[tuple[ImageEntry, Problem | None]] = []
    real_root, plain_root = os.path.realpath(root), os.path.abspath(root)  # noqa: PTH100 - no link is resolved
    for image in images:
        name, place = image.file_name, f"image {image.id}"
        problem = check_name(name)
        if problem and problem.code == "path_absolute" and _is_inside(name, plain_root, real_root) and is_file(name):
            findings.warning(problem.code, file, place, problem.what, f"{RELATIVE}: it is another on other machines")
            problem = None
        found, path = listing.get(name), os.path.join(root, name)  # noqa: PTH118 - as detectron2 does, 118,000 times
        if problem or (found is None and not is_file(path)):
            lost.append((image, problem))
            continue
        located.append((image, path))
        if (found is None or found[2]) and not _is_inside(real := os.path.realpath(path), real_root):
            what = f"file_name {name!r} is a link out of {root}, to {real}"
            findings.warning("path_link", file, place, what, "Nothing, where every node of a run has that file")
    if lost:
        _report(lost, located, file, root, listing, findings)
    return located


def _is_inside(path: str, *roots: str) -> bool:
    normal = os.path.normpath(path)
    return any(normal.startswith(f"{root.rstrip('/')}/") for root in roots)


def _report(
    lost: list[tuple[ImageEntry, Problem | None]],
    located: list[tuple[ImageEntry, str]],
    file: str,
    root: Path,
    listing: dict[str, FoundFile],
    findings: FindingList,
) -> None:
    """Reports the images without a file: by where their files are, else by what is wrong with their names."""
    names = [image.file_name for image, problem in lost if problem is None or problem.code != "path_invalid"]
    matches = _search(names, file, root, listing, located)
    groups: defaultdict[tuple[str, ...], list[tuple[ImageEntry, NameMatch]]] = defaultdict(list)
    missing = []
    for image, problem in lost:
        if match := matches.get(image.file_name):
            groups[match.base, *match.differences].append((image, match))
        elif problem:
            findings.error(problem.code, file, f"image {image.id}", problem.what, problem.hint)
        else:
            missing.append(image)
    num_images = len(located) + len(lost)
    for group in groups.values():
        _report_group(group, file, root, findings, are_all=len(group) == num_images)
    _report_missing(missing, root, listing, findings, are_all=len(missing) == num_images)


def _search(
    names: list[str], file: str, root: Path, listing: dict[str, FoundFile], located: list[tuple[ImageEntry, str]]
) -> dict[str, NameMatch]:
    """Looks for files below the image folder; where most names have none there, also around it and the annotations."""
    used = {image.file_name for image, _ in located}
    most_are_lost = len(names) > len(located)
    spare = (name for name in listing if name not in used)
    part = part_of("/".join(Path(file).parts[-2:]))
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
    folders = [str(Path(path).parent) for path in outside if is_file(path)]
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
    group: list[tuple[ImageEntry, NameMatch]], file: str, root: Path, findings: FindingList, *, are_all: bool
) -> None:
    """Reports images whose files are elsewhere, under names that differ in the same way."""
    first = group[0][1]
    if are_all and not first.differences and all(match.folder == first.folder for _, match in group):
        folder = os.path.join(first.base, first.folder).rstrip("/")  # noqa: PTH118 - a text, no path object
        what = f"none of the {len(group):,} images is in this folder, {first.name!r} for one: they are in {folder}"
        hint = f"Set the image folder to {folder} ({SETTING})"
        findings.add(Finding("error", "image_missing", str(root), "all images", what, hint, count=len(group)))
        return
    new = Path(file).with_suffix(".fixed.json")
    command = f"python -m orchestrator.data fix-names {quote(file)} --images {quote(first.base)} --to {quote(str(new))}"
    hint = f"`{command}` writes the names as the files have them; use that file and the image folder {first.base}"
    if not is_utf8(first.path):
        hint = "Rename the files, or unpack the archive again, with names in UTF-8 (`unzip -O cp1252` or `-O cp437`)"
    by = f"differs from the file's by {' and '.join(first.differences)}" if first.differences else "is another folder's"
    for image, match in group:
        what = f"its file_name {match.name!r} {by}; there is {match.path!r}"
        what += f" in {match.base}" if match.base != str(root) else ""
        findings.error("image_missing", file, f"image {image.id}", what, hint, group=f"{file} {match.base} {by}")


def _report_missing(
    missing: list[ImageEntry], root: Path, listing: dict[str, FoundFile], findings: FindingList, *, are_all: bool
) -> None:
    """Reports images whose file is nowhere."""
    for image in missing:
        name = image.file_name
        if name.startswith(("http://", "https://")):
            what = f"its file_name {name!r} is an address; images are read from files"
            hint = "Download the images, and write their names relative to the image folder"
        elif os.path.islink(root / name):  # noqa: PTH114 - Path's raises for a name that is too long
            what = f"its file is a link to {os.path.realpath(root / name)}, where nothing is"
            hint = "Fetch or mount what it leads to (`dvc pull`, `git annex get` …)"
        elif are_all and len(missing) > 1:
            content = f"it holds {len(listing):,} other files, such as {min(listing)!r}" if listing else "it is empty"
            what = f"none of the {len(missing):,} images is in this folder, {name!r} for one; {content}"
            hint = f"Name the folder that the file_name entries are relative to ({SETTING})"
            findings.add(Finding("error", "image_missing", str(root), "all images", what, hint, count=len(missing)))
            return
        else:
            what, hint = "the file does not exist", "Copy or download it again, or remove it from the annotation file"
        findings.error("image_missing", f"{root}/{name}", f"image {image.id}", what, hint, group=f"{root} {hint}")
