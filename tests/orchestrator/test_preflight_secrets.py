"""Secrets of the environment are in nothing that a run leaves behind: no file, no report, no tracking database."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.data.generate import generate
from tests.builders.bad_input import Project, base_experiment

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
