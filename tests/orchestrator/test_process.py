"""Commands run for a user without a name, a home or a full locale, and go on when nobody reads them any more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from orchestrator.process import lower_priority, restore_priority, session_niceness, user_name
from tests.builders.commands import ROOT, run_command
from tests.builders.experiments import tiny_experiment, write_experiment
from tests.builders.waiting import wait_for

NAMELESS = 54321
"""A user id that no system gives a name."""

PREPARED = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
from orchestrator.process import prepare_process
if sys.argv[1:]:
    os.setuid(int(sys.argv[1]))
prepare_process()
print(json.dumps(dict(os.environ)))
"""


def prepared(*user: int, **environment: str) -> dict[str, str]:
    """The environment of a process that has been prepared, with just these variables before."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARED, *map(str, user)],
        env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    values: dict[str, str] = json.loads(done.stdout)
    return values


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take another user id")
@pytest.mark.parametrize("home", [None, "/", "/no/such/home"])
def test_a_user_id_without_a_name_gets_its_number_and_room_for_caches(home: str | None, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents[:3]:
        folder.chmod(folder.stat().st_mode | 0o011)
    values = prepared(NAMELESS, TMPDIR=str(tmp_path), **({"HOME": home} if home else {}))
    assert values["USER"] == str(NAMELESS) and values["HOME"] == (home or "/")
    room = tmp_path / f"ray-detectron2-benchmark-{NAMELESS}"
    assert Path(values["XDG_CACHE_HOME"]).parent == Path(values["MPLCONFIGDIR"]).parent == room
    assert room.stat().st_mode & 0o777 == 0o700 and room.stat().st_uid == NAMELESS


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take another user id")
def test_a_folder_for_caches_that_somebody_else_made_is_not_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents[:3]:
        folder.chmod(folder.stat().st_mode | 0o011)
    (tmp_path / f"ray-detectron2-benchmark-{NAMELESS}").mkdir(mode=0o777)
    values = prepared(NAMELESS, TMPDIR=str(tmp_path))
    room = Path(values["XDG_CACHE_HOME"]).parent
    assert room.name != f"ray-detectron2-benchmark-{NAMELESS}" and room.stat().st_uid == NAMELESS


def test_what_the_environment_names_stays(tmp_path: Path) -> None:
    given = {"USER": "alice", "HOME": str(tmp_path), "XDG_CACHE_HOME": "/caches"}
    assert prepared(**given).items() >= given.items() and "MPLCONFIGDIR" not in prepared(**given)
    unwritable = {"HOME": "/no/such/home", "XDG_CACHE_HOME": "/caches", "TMPDIR": str(tmp_path)}
    assert prepared(**unwritable)["XDG_CACHE_HOME"] == "/caches"


def test_the_name_of_a_user_is_asked_for_and_missing_ones_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "alice")
    assert user_name() == "alice"
    for error in (KeyError("getpwuid(): uid not found: 12345"), OSError("No username set in the environment")):

        def fail(error: Exception = error) -> str:
            raise error

        monkeypatch.setattr("getpass.getuser", fail)
        assert user_name() == str(os.getuid())


def test_letters_that_the_locale_lacks_are_replaced(tmp_path: Path) -> None:
    config = write_experiment(tmp_path, tiny_experiment(description="größer → besser"))
    done = run_command(config, "--dry-run", cwd=tmp_path, PYTHONIOENCODING="ascii", COLUMNS="20")
    assert done.returncode == 0, done.stderr
    done = run_command(config, "--dry-run", "--set", "name=ö/ö", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and "Traceback" not in done.stderr


SPEAKING = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from orchestrator.process import prepare_process
prepare_process()
assert os.open(os.devnull, os.O_RDONLY) > 2, "a file took the number of a stream"
sys.stdin.readline()
for stream in (sys.stdout, sys.stderr):
    for _ in range(2):
        print("to nobody", file=stream, flush=True)
os._exit(7)
"""


def test_readers_that_go_away_and_terminals_that_are_closed_end_no_run() -> None:
    for ends in (os.pipe, os.openpty):
        read, write = ends()
        speaking = subprocess.Popen(
            [sys.executable, "-c", SPEAKING], stdin=subprocess.PIPE, stdout=write, stderr=write, start_new_session=True
        )
        os.close(read)
        os.close(write)
        speaking.communicate(b"\n")
        assert speaking.returncode == 7


@pytest.mark.parametrize("redirections", [">&- 2>&-", "> /dev/full 2>&1"])
def test_closed_streams_and_a_full_disk_behind_them_end_no_run(redirections: str) -> None:
    shell = ["sh", "-c", f'exec "$0" -c "$1" {redirections}', sys.executable, SPEAKING]
    assert subprocess.run(shell, input=b"\n", check=False).returncode == 7


PAUSED = f"""
import logging, os, sys
sys.path.insert(0, {str(ROOT)!r})
from orchestrator import process
logging.basicConfig()
process.prepare_process()
process.MAX_WAIT_SECONDS = 0.2
process.drop_unread_output(sys.stdout, sys.stderr)
for _ in range(2):
    print("x" * 2_000_000, flush=True)
    logging.error("x" * 2_000_000)
open("written", "w").close()
for _ in sys.stdin:
    print("again", flush=True)
os._exit(7)
"""


@pytest.mark.parametrize("ends", [os.pipe, os.openpty])
def test_a_run_does_not_wait_for_a_reader_that_pauses_and_shows_what_comes_later(
    ends: Callable[[], tuple[int, int]], tmp_path: Path
) -> None:
    read, write = ends()
    os.set_blocking(read, False)
    paused = subprocess.Popen([sys.executable, "-c", PAUSED], cwd=tmp_path, stdin=PIPE, stdout=write, stderr=write)
    os.close(write)
    shown = bytearray()

    def is_shown_again() -> bool:
        assert paused.stdin is not None
        paused.stdin.write(b"\n")
        paused.stdin.flush()
        with suppress(BlockingIOError):
            while True:
                shown.extend(os.read(read, 1 << 20))
        return b"again" in shown

    try:
        wait_for(lambda: (tmp_path / "written").exists() or paused.poll() is not None)
        wait_for(is_shown_again)
        assert len(shown) < 4_000_000, "the pipe held everything"
        paused.communicate()
        assert paused.returncode == 7
    finally:
        paused.kill()
        os.close(read)


@pytest.mark.parametrize("content", [None, "", "\n", "/autogroup-7 nice", b"\xff"])
def test_a_process_in_no_session_of_its_own_gets_the_usual_priority(
    content: str | bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text

    def read_text(file: Path, **options: Any) -> str:
        if file != Path(f"/proc/{os.getpid()}/autogroup"):
            return read(file, **options)
        if content is None:
            raise FileNotFoundError(file)
        return content if isinstance(content, str) else content.decode(**options)

    monkeypatch.setattr(Path, "read_text", read_text)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=PIPE, start_new_session=True) as leader:
        shares_by_session = Path(f"/proc/{leader.pid}/autogroup").exists()
        lower_priority(leader.pid)
        assert session_niceness(leader.pid) == (19 if shares_by_session else 0)
        restore_priority(leader.pid)
        assert session_niceness(leader.pid) == 0
        leader.communicate(b"\n")
