"""What a process says of its threads when it is asked from outside."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from tests.builders.commands import ROOT
from tests.builders.waiting import DEADLINE_SECONDS, wait_for
from trainers import stacks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files in memory are Linux's")

CODE = """
import ctypes, sys, threading, time
from trainers import stacks

def inner_most():
    print("ready", flush=True)
    ctypes.PyDLL(None).sleep(3600) if "hold_gil" in sys.argv else time.sleep(3600)

def work():
    if "silent" not in sys.argv:
        stacks.answer_requests()
    inner_most()

threading.Thread(target=work).start()
"""


@pytest.fixture
def processes() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    started = {
        kind: subprocess.Popen([sys.executable, "-c", CODE, kind], cwd=ROOT, stdout=subprocess.PIPE)
        for kind in ("hold_gil", "frozen", "silent", "ended")
    }
    for process in started.values():
        assert process.stdout and process.stdout.readline() == b"ready\n"
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


def test_a_process_answers_whatever_it_is_doing_and_none_is_harmed(
    processes: dict[str, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine may take its time over an answer, and stop for a moment in the middle of it.
    monkeypatch.setattr(stacks, "ANSWER_TIMEOUT_SECONDS", DEADLINE_SECONDS)
    monkeypatch.setattr(stacks, "POLL_INTERVAL_SECONDS", 1.0)
    processes["frozen"].send_signal(signal.SIGSTOP)
    wait_for(lambda: psutil.Process(processes["frozen"].pid).status() == psutil.STATUS_STOPPED)
    processes["ended"].kill()
    processes["ended"].wait()
    texts = stacks.request([process.pid for process in processes.values()])
    answers = {kind: texts.get(process.pid) for kind, process in processes.items()}
    assert answers["hold_gil"] and "in inner_most" in answers["hold_gil"]
    assert answers["frozen"] == f"process {processes['frozen'].pid}, stopped\n"
    assert answers["silent"] and "in inner_most" not in answers["silent"]
    assert answers["ended"] is None
    again = stacks.request([processes["hold_gil"].pid, processes["silent"].pid])
    assert len(again) == 2, "a question has ended a process"
