"""A file name cannot lead out of the image folder, and what cannot be read for a moment is no lasting verdict."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data import checks
from orchestrator.data.checks import check_split
from orchestrator.data.generate import generate
from orchestrator.data.image_names import check_name, list_files


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("/etc/passwd", "path_absolute"),
        ("C:\\x.jpg", "path_absolute"),
        ("a/../../x.jpg", "path_parent"),
        ("..\\x.jpg", "path_parent"),
        ("a\0b", "path_invalid"),
        ("\udc80.jpg", "path_invalid"),
        ("x" * 5000, "path_invalid"),
        ("a..b/c...jpg", None),
        ("deep/er/x.jpg", None),
    ],
)
def test_a_name_stays_inside_the_image_folder(name: str, code: str | None) -> None:
    problem = check_name(name)
    assert (problem and problem.code) == code


def test_a_folder_that_others_may_not_enter_is_left_out_and_the_image_folder_itself_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a disk's `lost+found`; root, who runs these tests, may enter everything."""
    for name in ("a.jpg", "lost+found/b.jpg", "more/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    scandir, closed = os.scandir, {str(tmp_path / "lost+found")}

    def entered(folder: str) -> Any:
        if folder in closed:
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", entered)
    assert sorted(list_files(tmp_path)) == ["a.jpg", "more/c.jpg"]
    closed.add(str(tmp_path))
    with pytest.raises(PermissionError):
        list_files(tmp_path)


def test_what_is_wrong_is_looked_at_again_as_it_may_have_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checks, "CACHED_FROM", 2)
    split = generate(tmp_path / "set", num_train=2, num_val=1, size=48).train
    opened = Path.open

    def failed(path: Path, *options: Any, **more: Any) -> Any:
        if path.suffix == ".jpg":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path, *options, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failed)
        (finding,) = check_split(split).findings
    assert (finding.code, finding.count) == ("image_unreadable", 2) and "Input/output error" in finding.what
    fit = check_split(split)
    assert fit.findings == [] and not fit.from_cache and check_split(split).from_cache
