"""The rehearsal's process answers with findings, and its end is one, whatever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.findings import Finding
from orchestrator.preflight import rehearsal
from orchestrator.preflight.rehearsal import Rehearsal
from tests.builders.trials import plan


def findings(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, *, elsewhere: bool = False, **options: Any
) -> list[Finding]:
    """What is found where a module of this code takes the rehearsal's place."""
    (folder / "stand_in.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(rehearsal, "MODULE", "stand_in")
    with Rehearsal([plan(), plan(seed=8)], elsewhere=elsewhere) as started:
        started.start()
        return started.findings(**options)


def test_its_answer_is_read_as_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = '[{"level":"warning","code":"c","file":"model.weights","id":"","what":str(len(plans)),"hint":"h"}]'
    code = f"import json, sys\nplans = json.load(sys.stdin)\nprint(json.dumps({answer}))"
    assert findings(tmp_path, monkeypatch, code) == [Finding("warning", "c", "model.weights", "", "2", "h")]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "signal SIGSEGV"),
        ("raise ImportError('no such library')", "ImportError: no such library"),
    ],
)
def test_a_crash_is_an_error_here_and_a_warning_for_workers_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    (found,) = findings(tmp_path, monkeypatch, code)
    assert (found.level, found.code) == ("error", "rehearsal_crashed") and words in found.what
    assert "Traceback" not in found.what and found.hint
    (found,) = findings(tmp_path, monkeypatch, code, elsewhere=True)
    assert found.level == "warning"


def test_one_that_takes_too_long_is_ended_and_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = findings(tmp_path, monkeypatch, "import time; time.sleep(1000)", timeout=0.2)
    assert (found.level, found.code) == ("warning", "rehearsal_timeout")


def test_without_torch_it_is_left_out_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal.importlib.util, "find_spec", lambda name: None)
    with Rehearsal([plan()], elsewhere=True) as started:
        started.start()
        (found,) = started.findings()
    assert (found.level, found.code) == ("warning", "rehearsal_left_out") and "torch" in found.what


def test_many_plans_and_much_output_block_neither_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys\nsys.stderr.write('x' * 10**6)\nassert len(sys.stdin.read()) > 10**5\nprint('[]')"
    (tmp_path / "stand_in.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(rehearsal, "MODULE", "stand_in")
    with Rehearsal([plan(seed=seed) for seed in range(100)], elsewhere=False) as started:
        started.start()
        assert started.findings() == []
