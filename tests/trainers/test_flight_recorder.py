"""Fetching torch's record of collectives; a process that does what torch does takes the place of one with a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from orchestrator.execution import workers
from tests.builders.commands import ROOT
from tests.builders.waiting import DEADLINE_SECONDS
from trainers import flight_recorder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what processes have open is read as Linux shows it")

LIKE_TORCH = """
import os, sys, time
stem = os.environ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"]
os.mkfifo(f"{stem}3.pipe")
pipe = os.open(f"{stem}3.pipe", os.O_RDONLY | os.O_NONBLOCK)
from trainers import flight_recorder
flight_recorder.hide(3)
print("ready", flush=True)
while not os.read(pipe, 128):
    time.sleep(0.01)
if "answers" in sys.argv:
    with open(os.environ["TORCH_FR_DUMP_TEMP_FILE"] + "3", "wb") as file:
        file.write(b"the last collectives")
time.sleep(3600)
"""


@pytest.mark.parametrize(("how", "record"), [("answers", b"the last collectives"), ("hangs", None)])
def test_the_record_of_a_process_is_fetched_and_nothing_is_left(
    how: str, record: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeout = DEADLINE_SECONDS if record else 0.5
    monkeypatch.setattr(flight_recorder, "ANSWER_TIMEOUT_SECONDS", timeout)
    environment = {**os.environ, **flight_recorder.settings(f"{tmp_path}/attempt0-")}
    command = [sys.executable, "-c", LIKE_TORCH, how]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    try:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        assert list(tmp_path.iterdir()) == []
        assert flight_recorder.fetch(process.pid) == record
    finally:
        process.kill()
        process.communicate()
    assert list(tmp_path.iterdir()) == []


def test_a_process_without_a_record_and_one_that_has_ended_have_none() -> None:
    process = subprocess.Popen(["sleep", "3600"])
    assert flight_recorder.fetch(process.pid) is None
    process.kill()
    process.wait()
    assert flight_recorder.fetch(process.pid) is None


def test_the_pipe_lies_where_every_node_has_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the driver's, which another node may not have
    stems = {value for value in workers._nccl_settings().values() if "/" in value}
    assert {Path(stem).parent for stem in stems} == {Path("/tmp")}


def test_torch_listens_on_such_a_pipe_by_such_variables() -> None:
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    source = (include / "ProcessGroupNCCL.hpp").read_text()
    assert 'c10::str(fileStem, rank, ".pipe")' in source and "O_RDONLY | O_NONBLOCK" in source
    assert flight_recorder.STEM_VARIABLE in source
    assert "TORCH_FR_BUFFER_SIZE" in (include / "FlightRecorder.hpp").read_text()
