"""What the command prints where."""

import subprocess
import sys

from tests.builders.commands import ROOT

CHECKING = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from orchestrator import drive, run

def check(request):
    print("(raylet) A worker died or was killed")
    request.print_json('{{"ok": true}}')
    return drive.DONE

drive.check = check
run.app()
"""


def test_what_ray_prints_to_stdout_does_not_spoil_the_json() -> None:
    command = [sys.executable, "-c", CHECKING, "--preflight", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, '{"ok": true}\n')
    assert "(raylet)" in done.stderr
