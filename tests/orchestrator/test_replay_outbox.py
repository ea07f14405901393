"""`--replay-outbox` tracks a run's folder where it is asked to, and does nothing else, nor says that it does."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from orchestrator.figures.records import ExperimentResult
from tests.builders.commands import run_command
from tests.builders.run_folder import made_experiment, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was to be tracked in a store that is not there."""
    folder = tmp_path_factory.mktemp("made")
    return make_run(folder / "run", made_experiment(tracking={"uri": "http://127.0.0.1:9"}))


def test_a_run_is_tracked_in_another_store_than_it_names(run: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'right.db'}"
    done = run_command("--replay-outbox", run, "--set", f"tracking.uri={uri}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = ExperimentResult.model_validate_json((run / "results.json").read_bytes())
    assert (result.tracked, result.mlflow_tracking_uri) == (True, uri)
    assert MlflowClient(uri).get_run(str(result.mlflow_run_id)).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("others", "named"),
    [
        (("tiny.yaml",), "CONFIG"),
        (("--output", "x", "--dry-run"), "--output, --dry-run"),
        (("--resume", "x"), "--resume"),
        (("--predict", "2"), "--predict"),
        (("--preflight",), "--preflight"),
        (("--auto-resume", "1"), "--auto-resume"),
        (("--json",), "--json"),
    ],
)
def test_what_has_no_effect_is_refused(run: Path, tmp_path: Path, others: tuple[str, ...], named: str) -> None:
    done = run_command("--replay-outbox", run, *others, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error --replay-outbox goes with --set tracking.uri=ADDRESS alone, not with {named}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("assignment", "named"),
    [("tracking.offline=true", "tracking.offline"), ("faults.max_failures=9", "faults.max_failures")],
)
def test_settings_that_have_no_effect_are_refused(run: Path, tmp_path: Path, assignment: str, named: str) -> None:
    done = run_command("--replay-outbox", run, "--set", assignment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error --set {named}: --replay-outbox takes tracking.uri alone\n"


def test_a_plan_is_shown_or_checked_and_not_both(tmp_path: Path) -> None:
    done = run_command("--dry-run", "--preflight", cwd=tmp_path)
    assert done.returncode == 2 and "--dry-run" in done.stderr and "--preflight" in done.stderr
