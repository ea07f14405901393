"""Starts the rehearsal (`trainers.rehearsal`) in a process of its own, and turns its answer into findings."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import IO, TYPE_CHECKING

from orchestrator.findings import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainers.contract.plan import TrialPlan

MODULE = "trainers.rehearsal"

TIMEOUT_SECONDS = 300.0
"""Longest wait for it. It takes some five seconds, and up to a minute with large weights on a slow disk."""

MAX_REASON_LINES = 3
"""Last lines of its error stream that a finding quotes."""


class Rehearsal:
    """A rehearsal of some trials, as a context: leaving it ends the process.

    Args:
        plans: The trials.
        elsewhere: Whether workers run on other machines, so that what ends the process here may not end them there.
    """

    def __init__(self, plans: Sequence[TrialPlan], *, elsewhere: bool) -> None:
        self._plans, self._elsewhere = plans, elsewhere
        self._process: subprocess.Popen[bytes] | None = None
        # Files, not pipes: nobody reads or writes at the other end until it is waited for. Without a name, nothing is
        # left of them however this process ends.
        self._answer = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the context is left
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - likewise

    def __enter__(self) -> Rehearsal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._answer.close()
        self._errors.close()

    def start(self) -> None:
        """Starts it; the start weights are on this machine. Nothing is started without torch and detectron2."""
        if not all(importlib.util.find_spec(package) for package in ("torch", "detectron2")):
            return
        # A GPU's memory belongs to the trials.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", MODULE]
        with tempfile.TemporaryFile() as plans:
            plans.write(json.dumps([dataclasses.asdict(plan) for plan in self._plans]).encode())
            plans.seek(0)
            self._process = subprocess.Popen(
                command, stdin=plans, stdout=self._answer, stderr=self._errors, env=environment
            )

    def findings(self, timeout: float = TIMEOUT_SECONDS) -> list[Finding]:
        """Waits for it, at most so many seconds, and returns what it found."""
        process = self._process
        if process is None:
            what = "model and weights were not tried before the run: torch is not installed on this machine"
            return [_left_out("rehearsal_left_out", what, "Install the driver like the nodes to have them tried")]
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            what = f"model and weights could not be tried within {timeout:g} s"
            return [_left_out("rehearsal_timeout", what, "Nothing needs to be done if this machine is slow")]
        if process.returncode == 0:
            return [Finding(**problem) for problem in json.loads(_content(self._answer))]
        lines = _content(self._errors).decode(errors="replace").strip().splitlines()[-MAX_REASON_LINES:]
        what = f"trying model and weights ended with {_ending(process.returncode)}: {' | '.join(lines) or 'no message'}"
        if process.returncode == -signal.SIGKILL:
            hint = "Take a smaller model or a machine with more memory: that is how a process ends that takes too much"
        else:
            hint = "Try it with model.weights='' and without overrides to find the part that causes it"
        finding = _left_out("rehearsal_crashed", what, hint)
        return [finding if self._elsewhere else dataclasses.replace(finding, level="error")]


def _left_out(code: str, what: str, hint: str) -> Finding:
    return Finding("warning", code, "model", "", what, hint)


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _ending(returncode: int) -> str:
    return f"signal {signal.Signals(-returncode).name}" if returncode < 0 else f"exit code {returncode}"
