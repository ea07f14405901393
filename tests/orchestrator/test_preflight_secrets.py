"""Secrets of the environment are in nothing that a run leaves behind: no file, no report, no tracking database."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.data.generate import generate
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import load_experiment, parse_experiment
from orchestrator.experiment.references import read_references
from orchestrator.experiment.spec import SpecError
from orchestrator.preflight.settings import check_settings
from orchestrator.publish import Publication
from orchestrator.runlog.outbox import Outbox
from orchestrator.tracking.driver import Tracker
from tests.builders.bad_input import Project, base_experiment
from tests.builders.commands import run_command
from tests.builders.experiments import tiny_experiment, write_experiment

REPOSITORY = Path(__file__).resolve().parents[2]

PLANTED = {
    "PLANTED_API_KEY": "planted-api-key-7f3a",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret-81cc",
    "HF_TOKEN": "planted-hf-token-2b9d",
    "DATABASE_PASSWORD": "planted-password-c0de",
    "DATABASE_URL": "postgres://planted-user:planted-url-password-4e4e@127.0.0.1/x",
    # No name that gives it away: what is not on the list of what is logged stays out whatever it is called.
    "HARMLESS": "planted-without-a-name-55aa",
}

SMALL_MODEL = {
    "MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64, "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "BN", "MODEL.FPN.OUT_CHANNELS": 16, "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1, "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16, "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 40, "INPUT.MIN_SIZE_TEST": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "address"),
    [
        ("storage.checkpoints", "s3://PLANTED1:PLANTED2@bucket/prefix"),
        ("storage.checkpoints", "s3://PLANTED1:PLANT/ED2@bucket/prefix"),
        ("model.weights", "https://PLANTED1:PLANTED2@host/w.pkl"),
        ("model.weights", "https://host/w.pkl?X-Amz-Signature=PLANTED1"),
        ("model.overrides.MODEL.WEIGHTS", "https://PLANTED1@host/w.pkl"),
        ("description", "see https://ada:PLANTED1@host/page"),
        ("reference_files", "[https://PLANTED1:PLANTED2@host/rows.yaml]"),
        ("model.weigths", "https://PLANTED1:PLANTED2@host/w.pkl"),
        ("name.x", "https://PLANTED1:PLANTED2@host/w.pkl"),
        ("name", "[https://PLANTED1:PLANTED2@host"),
    ],
)
def test_an_experiment_with_a_password_or_key_in_an_address_is_refused_without_it(
    tmp_path: Path, place: str, address: str
) -> None:
    path = write_experiment(tmp_path, tiny_experiment())
    with pytest.raises(SpecError, match=re.escape(place)) as refused:
        load_experiment(path, [f"{place}={address}"])
    assert "PLANT" not in str(refused.value) and "ED2" not in str(refused.value)


@pytest.mark.parametrize("key", ["WEIGHTS", "KEYPOINT_ON"])
def test_a_models_yaml_file_with_a_password_in_an_address_is_refused_without_it(tmp_path: Path, key: str) -> None:
    (tmp_path / "model.yaml").write_text(f"MODEL:\n  {key}: https://ada:PLANTED@host/w.pkl\n")
    experiment = parse_experiment(tiny_experiment(model={"config": str(tmp_path / "model.yaml")}), "test")
    for read in (check_settings, lambda given: expand(given, Hardware(), "/runs/x", tmp_path)):
        with pytest.raises(SpecError, match=rf"model.yaml: MODEL.{key}: the address") as refused:
            read(experiment)
        assert "PLANTED" not in str(refused.value)


def test_a_file_of_published_figures_with_a_password_in_an_address_is_refused_without_it(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text("reference_rows: [{name: a, world_size: 1, source: 'https://u:PLANTED@host'}]")
    with pytest.raises(SpecError, match=r"rows.yaml: reference_rows.0.source: the address") as refused:
        read_references(tmp_path / "rows.yaml")
    assert "PLANTED" not in str(refused.value)


def test_a_dry_run_refuses_an_address_with_a_key_and_prints_none_of_it(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, tiny_experiment())
    options = ("--set", "storage.checkpoints=s3://KEY:PLANTED@bucket/x", "--dry-run", "--json")
    done = run_command(path, *options, cwd=tmp_path)
    assert done.returncode == 2 and "storage.checkpoints" in done.stderr
    assert "PLANTED" not in done.stdout + done.stderr


def test_the_address_of_the_tracking_server_is_recorded_without_its_password(tmp_path: Path) -> None:
    for uri in ("http://ada:PLANTED@host:5000", "postgresql://host/x?password=PLANTED"):
        experiment = parse_experiment(tiny_experiment(tracking={"uri": uri}), "test")
        tracker, outbox = Tracker(tmp_path, "sqlite:///x.db"), Outbox(tmp_path / "events.jsonl")
        assert "PLANTED" not in str(Publication(experiment, tmp_path, tracker, None, outbox).run_started({}))


@pytest.mark.train
def test_planted_secrets_are_nowhere_in_what_a_run_leaves(tmp_path: Path) -> None:
    generate(tmp_path / "data", num_train=4, num_val=2, size=64)
    project = Project(tmp_path, base_experiment(tmp_path / "data"))
    project.experiment["model"]["overrides"] |= SMALL_MODEL
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    environment |= PLANTED | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.run", str(project.write()), "--output", str(tmp_path / "out")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    left = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(tmp_path / "data")]
    names = {path.name for path in left}
    # The run really ran, and left what could betray something.
    assert {"results.json", "mlflow.db", "log.txt"} <= names, names
    secrets = [*PLANTED.values(), "planted-url-password-4e4e", "planted-user"]
    for path in left:
        content = path.read_bytes()
        found = [secret for secret in secrets if secret.encode() in content]
        assert not found, f"{path} holds {found}"
    assert not [secret for secret in secrets if secret in done.stdout + done.stderr]
