"""Published figures are read from files, an experiment can name them, and what is no such file is refused by name."""

import re
from pathlib import Path

import pytest

from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.references import read_references, with_references
from orchestrator.experiment.spec import SpecError
from tests.builders.commands import ROOT, run_command

FILES = sorted((ROOT / "references").glob("*.yaml"))


def test_every_file_of_references_names_its_sources_and_no_row_twice():
    rows = [row for file in FILES for row in read_references(file)]
    assert len(rows) > 15 and all(row.source and row.accelerator for row in rows)
    assert len({row.name for row in rows}) == len(rows)
    assert [row.name for row in rows if row.images_per_second is None] == []


def test_mlperfs_minutes_are_those_of_the_source_and_on_mlperfs_clock():
    rows = read_references(ROOT / "references" / "mlperf.yaml")
    minutes = {row.name: float(re.search(r"([\d.]+) min", row.source)[1]) for row in rows}
    assert {row.name: round(row.mlperf_seconds / 60, 2) for row in rows} == minutes
    assert minutes["MLPerf v3.0, 8 x H100"] == 19.18
    assert [row.name for row in rows if row.time_to_train_seconds is not None] == []


def test_an_experiment_shows_the_rows_of_its_files_after_its_own(tmp_path: Path):
    (tmp_path / "more.yaml").write_text("reference_rows:\n- {name: B, world_size: 8, images_per_second: 60}\n")
    values = {
        "name": "x", "data": {"generated": {}}, "reference_files": [str(tmp_path / "more.yaml")],
        "reference_rows": [{"name": "A", "world_size": 1}],
    }  # fmt: skip
    assert [row.name for row in with_references(parse_experiment(values, where="x")).reference_rows] == ["A", "B"]


def test_a_file_that_an_experiment_names_and_that_is_not_there_ends_the_command(tmp_path: Path):
    done = run_command("--dry-run", "--set", "reference_files=[missing.yaml]", cwd=tmp_path)
    assert done.returncode == 2 and "missing.yaml: cannot be read" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: demo\n", "reference_rows: Field required"),
        ("reference_rows: 3\n", "reference_rows: Input should be a valid list"),
        ("reference_rows: []\nmore: 1\n", "more: Extra inputs are not permitted"),
        ("reference_rows: [{name: A}]\n", "reference_rows.0.world_size: Field required"),
        ("reference_rows: [{name: A, world_size: 0}]\n", "reference_rows.0.world_size: Input should be greater"),
        (
            "reference_rows: [{name: A, world_size: 1, box_ap: .nan}]\n",
            "reference_rows.0.box_ap: Input should be a finite",
        ),
        ("reference_rows: [{name: A, world_size: 1, time: 3}]\n", "reference_rows.0.time: Extra inputs"),
        ("reference_rows: [\n", "not valid YAML"),
        ("- a\n", "must hold a mapping"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_file_of_references_is_refused_with_its_place(tmp_path: Path, text: str | None, message: str):
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SpecError, match=re.escape(message)) as raised:
        read_references(file)
    assert str(raised.value).startswith(str(file))
