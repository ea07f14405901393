"""What a command prints is whole in a file or a pipe, where output is buffered: also what a child process prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.builders.commands import ROOT

PRINTED_BY_CHILD = """
import sys
from contextlib import redirect_stdout
from orchestrator.execution.supervisor import Supervisor
from orchestrator.process import prepare_process

supervisor = Supervisor()
print("before")
prepare_process()

def work():
    with redirect_stdout(sys.stderr):
        print("x" * 10_000, file=sys.__stdout__)
        print("for people")
    return 0

sys.exit(supervisor.run(work).code)
"""


def test_a_child_process_leaves_nothing_unwritten_and_writes_nothing_twice(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTED_BY_CHILD], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "for people\n")
    assert done.stdout == "before\n" + "x" * 10_000 + "\n"
