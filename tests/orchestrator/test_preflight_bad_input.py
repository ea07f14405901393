"""Every kind of bad input ends the real command with exit code 2, named with its place and how to fix it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.generate import generate
from tests.builders.bad_input import CASES, Case, Project, base_experiment

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def good_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good") / "data"
    generate(root, num_train=4, num_val=3, size=64, seed=7)
    return root


@pytest.fixture
def project(tmp_path: Path, good_data: Path) -> Project:
    shutil.copytree(good_data, tmp_path / "data")
    return Project(tmp_path, base_experiment(tmp_path / "data"))


def run(project: Project, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "RAY_"))}
    environment |= {
        "PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(project.root / "cache"),
    }  # fmt: skip
    command = [sys.executable, "-m", "orchestrator.run", str(project.write()), *options]
    # Where Ray looks for a running cluster: it finds none here, whatever else runs on this machine. Its sockets need a
    # short path.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment |= {"RAY_TMPDIR": folder} | project.environment
        return subprocess.run(
            command, cwd=project.root, env=environment, capture_output=True, text=True, timeout=600, check=False
        )


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")} - {"experiment.yaml"}


@pytest.mark.parametrize("case", CASES.values(), ids=[name.replace(" ", "_") for name in CASES])
def test_bad_input_is_named_with_its_place_and_hint(project: Project, case: Case) -> None:
    case.spoil(project)
    before = files(project.root)
    done = run(project, "--preflight", "--json", *case.options)
    assert done.returncode == 2, done.stderr
    report = json.loads(done.stdout)
    found = [finding for finding in report["findings"] if finding["code"].startswith(case.code)]
    assert found, report["findings"]
    place = f"{found[0]['file']} {found[0]['id']}"
    assert case.place in place and case.words in found[0]["what"] and found[0]["hint"]
    assert report["errors"] >= 1 and not report["ok"]
    assert "secret" not in done.stdout + done.stderr
    # Nothing was started, and nothing is left behind.
    assert files(project.root) == before


def test_every_kind_of_bad_input_has_a_case() -> None:
    assert len(CASES) >= 40


def test_a_good_project_has_no_findings_on_the_driver(project: Project) -> None:
    from orchestrator.experiment.plan import Hardware, expand
    from orchestrator.experiment.reading import load_experiment
    from orchestrator.preflight.local import preflight

    experiment = load_experiment(project.write())
    plans = expand(experiment, Hardware(0, 2), str(project.root / "runs"), project.root)
    assert preflight(experiment, plans, verify_images=True) == []


def test_all_findings_come_at_once_and_in_words_on_stderr(project: Project) -> None:
    for name in ("a truncated JPEG", "an absolute file name", "an annotation of no image", "no tracking server"):
        CASES[name].spoil(project)
    project.edit(lambda document: document["images"][0].update(file_name=project.image().name))
    project.edit(lambda document: document["images"][1].update(file_name="/etc/passwd"))
    done = run(project, "--preflight")
    assert done.returncode == 2
    for code in ("image_truncated", "path_absolute", "annotation_orphan", "tracking_unreachable"):
        assert done.stderr.count(f"[{code}]") == 1, done.stderr
    assert "3 errors, 1 warning" in done.stderr


def test_a_misspelt_field_of_the_experiment_is_corrected(project: Project) -> None:
    project.experiment["trails"] = project.experiment.pop("trials")
    done = run(project, "--preflight")
    assert done.returncode == 2 and "did you mean 'trials'" in done.stderr


def test_a_batch_that_does_not_divide_is_refused(project: Project) -> None:
    project.experiment["trials"]["world_sizes"] = [1, 3]
    done = run(project, "--preflight")
    assert done.returncode == 2 and "does not divide among 3 workers" in done.stderr


def test_a_model_config_that_would_run_code_is_refused(project: Project) -> None:
    project.experiment["model"]["config"] = "my_config.py"
    done = run(project, "--preflight")
    assert done.returncode == 2 and "would run code" in done.stderr


def test_yaml_that_would_run_code_is_refused(project: Project) -> None:
    (project.root / "evil.yaml").write_text(f"name: !!python/object/apply:os.mkdir ['{project.root}/pwned']\n")
    command = [sys.executable, "-m", "orchestrator.run", str(project.root / "evil.yaml"), "--dry-run"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2 and "not valid YAML" in done.stderr
    assert not (project.root / "pwned").exists()


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("postgresql://user:secret@127.0.0.1:9/mlflow", "refused"),
        ("mysql+nodriver://user:secret@127.0.0.1:9/mlflow", "nodriver"),
    ],
)
def test_a_database_that_runs_cannot_be_tracked_in_is_reported(project: Project, uri: str, reason: str) -> None:
    from orchestrator.experiment.reading import parse_experiment
    from orchestrator.preflight.tracking import check_tracking

    (finding,) = check_tracking(parse_experiment({**project.experiment, "tracking": {"uri": uri}}, "test"))
    assert (finding.level, finding.code) == ("error", "tracking_unreachable") and reason in finding.what
    assert "secret" not in finding.to_line()


def test_a_server_that_never_answers_is_given_up(project: Project) -> None:
    import socket

    from orchestrator.experiment.reading import parse_experiment
    from orchestrator.preflight.tracking import check_tracking

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}"
        values: dict[str, Any] = {**project.experiment, "tracking": {"uri": address}}
        (finding,) = check_tracking(parse_experiment(values, "test"))
    assert finding.level == "error" and "within 3 s" in finding.what and "secret" not in finding.to_line()
    values["tracking"]["offline"] = True
    values["tracking"]["uri"] = "http://127.0.0.1:9"
    assert [finding.level for finding in check_tracking(parse_experiment(values, "test"))] == ["warning"]
