"""Writes an annotation file again with the names that its image files have."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from orchestrator.data.image_names import MAX_SEARCHED, check_name, walk_files
from orchestrator.data.name_matching import match_names, part_of
from orchestrator.data.raw_file import RawFile
from orchestrator.files import is_file, is_folder, is_utf8, write_atomically


class FixedNames(NamedTuple):
    """What became of the images whose name did not lead to a file."""

    changed: dict[str, str]
    """The old name and the new one of those whose file was found."""
    not_utf_8: list[str]
    """Files whose own name is not UTF-8, which no annotation file can hold."""
    missing: list[str]
    """Names of images that have no file; they are as before."""


def fix_names(file: Path, images: Path, to: Path) -> FixedNames:
    """Corrects the `file_name` of images whose file is in the folder under another name; all else stays as it is.

    Raises:
        FileExistsError: `to` exists.
        OSError: A file cannot be read or written.
        ValueError: The file is not in COCO's format, the folder does not exist, or two names would become one.
    """
    if to.exists():
        raise FileExistsError(f"{to} exists: name another file")
    if not is_folder(images):
        raise ValueError(f"{images} is not a folder")
    raw = RawFile(file)
    names = [image["file_name"] for image in raw.images]
    right = {name for name in names if check_name(name) is None and is_file(images / name)}
    wrong = [name for name in dict.fromkeys(names) if name not in right]
    spare = (path for path in walk_files(images, 10 * MAX_SEARCHED) if path not in right)
    part = part_of("/".join(file.absolute().parts[-2:]))
    matches = match_names(wrong, str(images), spare, whole_paths=False, part=part)
    changed = {name: match.path for name, match in matches.items() if is_utf8(match.path)}
    first_name: dict[str, str] = {}
    for name, path in changed.items():
        if (other := first_name.setdefault(path, name)) != name:
            raise ValueError(f"{other!r} and {name!r} would both become {path!r}: name the folder of this set alone")
    entries = raw.entries["images"]
    for index, name in enumerate(names):
        if name in changed:
            entry = {**msgspec.json.decode(entries[index]), "file_name": changed[name]}
            entries[index] = msgspec.Raw(msgspec.json.encode(entry))
    write_atomically(to, raw.encode(entries, raw.entries["annotations"]))
    not_utf_8 = [match.path for match in matches.values() if not is_utf8(match.path)]
    return FixedNames(changed, not_utf_8, [name for name in wrong if name not in matches])
