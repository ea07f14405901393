"""Paths of the data command: `~` is the home folder, and what no run could use is refused in plain words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.gpu_plans import Settings, dataset
from orchestrator.data import fetch
from orchestrator.data.__main__ import app
from orchestrator.data.generate import generate
from orchestrator.experiment.paths import absolute
from orchestrator.experiment.spec import SpecError
from tests.builders import layouts

NOT_UTF_8 = "caf\udce9"
"""A name that is not UTF-8, as Python has it."""

TO = {
    "split": ("split", "{source}/annotations/instances_train2017.json", "--to={to}"),
    "fix-names": ("fix-names", "{source}/annotations/instances_val2017.json", "--images={source}/val2017", "--to={to}"),
    "generate": ("generate", "{to}", "--num-train=1", "--num-val=1", "--size=32"),
    "fetch": ("fetch", "coco2017", "--to={to}"),
    "excerpt": ("excerpt", "1", "--from={source}", "--to={to}"),
}
"""Commands that write, by their names."""


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("paths") / "set"
    generate(root, num_train=6, num_val=4, size=48, seed=5)
    return root


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """COCO is not fetched; only its folder is made."""

    def make_folder(to: Path, **_: object) -> Path:
        (to / "coco").mkdir(parents=True)
        return to / "coco"

    monkeypatch.setattr(fetch, "fetch", make_folder)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and another one to work in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def arguments(name: str, source: Path, to: str) -> list[str]:
    return [part.format(source=source, to=to) for part in TO[name]]


@pytest.mark.parametrize("is_below", [False, True])
def test_a_data_set_under_a_name_that_is_not_utf_8_is_refused(is_below: bool, source: Path, tmp_path: Path) -> None:
    layouts.cvat(source, tmp_path / "data" / NOT_UTF_8)
    folder = tmp_path / "data" if is_below else tmp_path / "data" / NOT_UTF_8
    done = CliRunner().invoke(app, ["check", str(folder), "--json"])
    assert done.exit_code == 2, done.exception
    findings = [finding for finding in json.loads(done.stdout)["findings"] if finding["level"] == "error"]
    assert {finding["code"] for finding in findings} == {"path_invalid"}
    assert r"caf\udce9" in findings[0]["file"] and "is not UTF-8" in findings[0]["what"]
    done = CliRunner().invoke(app, ["init", str(folder)])
    assert (done.exit_code, done.stdout) == (2, "") and "is not UTF-8" in done.stderr
    file = tmp_path / "data" / NOT_UTF_8 / "annotations/instances_train.json"
    done = CliRunner().invoke(app, ["check", str(file), "--json"])
    assert done.exit_code == 2 and "is not UTF-8" in done.stdout


@pytest.mark.parametrize("name", TO)
def test_nothing_is_written_under_a_name_that_is_not_utf_8(name: str, source: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, arguments(name, source, f"{tmp_path}/{NOT_UTF_8}"))
    assert done.exit_code == 2 and done.stderr.startswith(f"error: {tmp_path}/caf")
    assert r"caf\udce9: a name in it is not UTF-8; rename it, or give another path" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TO)
def test_a_tilde_is_the_home_folder_also_after_an_equals_sign(name: str, source: Path, home: Path) -> None:
    done = CliRunner().invoke(app, arguments(name, source, "~/new"))
    assert done.exit_code == 0, done.stderr
    assert list(Path.cwd().iterdir()) == [] and (home / "new").exists()
    done = CliRunner().invoke(app, arguments(name, source, "~nobody-of-this-name/new"))
    assert done.exit_code == 2 and "~nobody-of-this-name is no user's home folder here" in done.stderr


def test_a_tilde_in_the_place_of_a_data_set_is_the_home_folder(
    source: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "coco").symlink_to(source)
    monkeypatch.setenv("DETECTRON2_DATASETS", "~")
    done = CliRunner().invoke(app, ["excerpt", "1", "--to=part"])
    assert done.exit_code == 0, done.stderr
    assert str(home) in dataset(Settings())[0]
    file = ["check", "~/coco/annotations/instances_val2017.json", "--images=~/coco/val2017"]
    for command in (["check", "~/coco"], file, ["init", "~/coco"]):
        assert CliRunner().invoke(app, command).exit_code == 0


@pytest.mark.parametrize("command", ["check", "init", *TO])
def test_a_removed_working_directory_is_named(
    command: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    done = CliRunner().invoke(app, arguments(command, source, "new") if command in TO else [command, "data"])
    assert done.exit_code == 2, done.exception
    assert "new: " in done.stderr or "data: " in done.stderr
    assert "the working directory was removed; change to another, or give the whole path" in done.stderr
    with pytest.raises(SpecError, match=r"experiment file: my\.yaml: the working directory was removed"):
        absolute("my.yaml", "experiment file")
