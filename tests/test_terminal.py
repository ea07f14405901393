"""What a person sees in a terminal of 80 columns, and what a job's log gets: through a real pseudo-terminal."""

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders.experiments import tiny_experiment, write_experiment
from tests.builders.run_folder import make_run

ROOT = Path(__file__).resolve().parent.parent
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SHOW = """
import sys
from pathlib import Path
from rich.console import Console
from orchestrator.runlog.outbox import Outbox
from orchestrator.report.plan_table import plan_table
from orchestrator.report.progress import ProgressDisplay
from orchestrator.runlog.folder import read_run_folder
from orchestrator.report.table import closing_table
folder = Path(sys.argv[1])
console = Console()
run = read_run_folder(folder)
console.print(plan_table([trial.plan for trial in run.trials]))
display = ProgressDisplay(console, quiet="--quiet" in sys.argv)
for event, _ in Outbox(folder / "events.jsonl").read():
    display(event)
display.close()
console.print(closing_table(run.result))
"""


def _in_terminal(command: list[str], interrupt_at: str | None = None, cwd: Path = ROOT) -> tuple[int, str]:
    """Runs a command in a terminal of 80 columns; types Ctrl-C once a text has appeared."""
    master, slave = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "LINES": "30", "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux says so when the other side is closed
            part = b""
        if not part:
            break
        shown += part
        if interrupt_at and interrupt_at.encode() in shown:
            interrupt_at = None
            process.send_signal(signal.SIGINT)
    os.close(master)
    return process.wait(600), shown.decode(errors="replace")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


def _lines(shown: str) -> list[str]:
    return [line.rstrip() for line in ESCAPES.sub("", shown).replace("\r", "\n").split("\n")]


def test_a_terminal_gets_bars_a_line_per_evaluation_and_tables_that_fit(run):
    code, shown = _in_terminal([sys.executable, "-c", SHOW, str(run)])
    lines = _lines(shown)
    assert code == 0 and "\x1b[" in shown and "━" in shown
    evaluations = [line for line in lines if "evaluation at 60:" in line]
    assert len(evaluations) == 3 and all("box AP" in line and "away" in line for line in evaluations)
    closing = max(number for number, line in enumerate(lines) if line == "demo")
    tables = lines[: next(number for number, line in enumerate(lines) if "starting" in line)] + lines[closing:]
    assert max(map(len, tables)) <= 80
    for heading in ("Trial", "Run"):
        assert any(line.startswith(heading) for line in tables)
    assert sum(line.startswith("reference-4xcpu  ") for line in tables) == 2, "a name was broken"


def test_a_job_s_log_gets_plain_lines(run):
    command = [sys.executable, "-c", SHOW, str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True)
    assert "\x1b" not in done.stdout and "━━" not in done.stdout
    assert "evaluation at 60: box AP" in done.stdout and "restarting the workers" in done.stdout


def test_quiet_shows_failures_and_the_table_only(run):
    command = [sys.executable, "-c", SHOW, str(run), "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True)
    assert "evaluation at" not in done.stdout
    assert "restarting the workers" in done.stdout and "reference-4xcpu" in done.stdout


@pytest.mark.train
def test_ctrl_c_says_what_it_keeps_and_how_to_go_on(tmp_path):
    config = write_experiment(tmp_path, tiny_experiment(protocol={"kind": "throughput", "iterations": 5000}))
    command = [sys.executable, "-m", "orchestrator.run", str(config), "--output", str(tmp_path / "run")]
    code, shown = _in_terminal(command, interrupt_at="training on", cwd=tmp_path)
    text = " ".join(_lines(shown))
    assert code == 130
    assert "stopping: the workers take a last checkpoint" in text
    assert "keeps results, events and checkpoints" in text and f"--resume {tmp_path}/run" in text
    for noise in ("INFO mlflow", "alembic", "Token authentication"):
        assert noise not in text
