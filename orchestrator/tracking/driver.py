"""Keeps MLflow at the state of a run's outbox, from a separate process.

A tracking server that is slow, down or back again costs training nothing, and tracking after the fact is the same code
from offset 0. Importing MLflow and creating a database take seconds of CPU: the process has the lowest priority, and
starts with the first steps.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from orchestrator.files import without_credentials, write_atomically
from orchestrator.findings import root_cause
from orchestrator.process import lower_priority, restore_priority
from orchestrator.runlog.outbox import FILE_NAME, Outbox, RunFolderError
from orchestrator.tracking.new_store import make_store
from orchestrator.tracking.text import own_runs
from trainers.contract.events import Event, RunEnded, StepsDone, TrialEnded, TrialRestarted

if TYPE_CHECKING:
    from orchestrator.tracking.mlflow_runs import MlflowRuns

logger = logging.getLogger(__name__)

POLL_INTERVAL_SECONDS = 1.0
"""How often the outbox is read."""

RETRY_SECONDS = 30.0
"""Longest wait before the next attempt at a store that refused or did not answer."""

NOTE_INTERVAL_SECONDS = 5.0
"""How often is noted on disk what has been tracked, where there is much."""


def tracking_uri(configured: str | None) -> str:
    """The store runs go to: the experiment's, else `$MLFLOW_TRACKING_URI`, else SQLite in the working directory."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def restore_command(what: Literal["experiment", "run"], id: str, uri: str) -> str:
    """The command that restores something deleted in a store."""
    call = f"experiments restore -x {id}" if what == "experiment" else f"runs restore --run-id {id}"
    return f"MLFLOW_TRACKING_URI={shlex.quote(without_credentials(uri))} mlflow {call}"


class TrackingError(Exception):
    """The store refused, did not answer, or cannot be used; the text is one line, without credentials."""


class Tracker:
    """Keeps the MLflow store at an address at the state of a run folder's outbox."""

    def __init__(self, run_dir: Path, uri: str) -> None:
        # MLflow's retries would block a call for minutes; the process that follows the outbox retries instead.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        # What the process prints is taken for a failure.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        self._run_dir, self._uri = run_dir, uri
        self.place = without_credentials(uri)
        """The store without credentials, for messages."""
        self.failure = ""
        """What the process that follows the outbox said last about events that were not taken; "" for nothing."""
        self._outbox = Outbox(run_dir / FILE_NAME)
        self._state_file = run_dir / "tracking.json"
        self._temporary = run_dir / "tracking.tmp"
        self._state: dict[str, Any] | None = None
        self._runs: MlflowRuns | None = None
        self._finished = False
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, event: Event) -> None:
        """Starts to follow the outbox at the first steps, or at the end of a trial without any; again once killed."""
        following = self._process is not None and (self._process.poll() or 0) >= 0
        if not following and isinstance(event, StepsDone | TrialRestarted | TrialEnded):
            self.start()

    def start(self) -> subprocess.Popen[str]:
        """Starts the process that follows the outbox, behind all that trains."""
        # Not multiprocessing: it brings a helper process that outlives the driver, and a job server that stops a job
        # waits for all of them.
        command = [sys.executable, "-m", "orchestrator.tracking"]
        # MLflow writes pictures to temporary files, which a killed process leaves.
        self._remove_temporary_files()
        with suppress(OSError):  # no room: it takes the machine's folder
            self._temporary.mkdir()
        process = self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(self._temporary)},
        )
        lower_priority(process.pid)
        assert process.stdin is not None
        # Not as an argument, which every user of this machine can read: the address may hold a password.
        process.stdin.write(json.dumps([str(self._run_dir), self._uri]) + "\n")
        process.stdin.flush()
        self._reader = threading.Thread(target=self._log_output, args=[process], daemon=True)
        self._reader.start()
        return process

    def run_ids(self) -> dict[str, str]:
        """MLflow's run ids so far, by trial; the parent's under ""."""
        return own_runs(self._known_state()["runs"])

    def experiment_id(self) -> str | None:
        """MLflow's id of the experiment; None until it is known."""
        return cast("str | None", self._known_state()["experiment_id"])

    def sync(self) -> bool:
        """Tracks the events of the outbox that are not tracked yet; returns whether the run's end has been tracked.

        Raises:
            TrackingError: The store refused or did not answer; nothing is lost, the next call continues.
        """
        try:
            return self._sync()
        except RunFolderError as error:
            raise TrackingError(str(error)) from error
        except KeyboardInterrupt:
            self._runs = None  # it has taken in events that are not known to be tracked
            raise
        except Exception as error:  # whatever the store, its client and its driver raise
            runs, self._runs = self._runs, None  # rebuilt from what is known to be tracked
            reason = " ".join(without_credentials(root_cause(error)).split())[:300]
            if runs and "state is deleted" in reason and (deleted := runs.find_deleted()):
                reason = f"the {deleted[0]} {deleted[1]} was deleted there; `{restore_command(*deleted, self._uri)}`"
            elif getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                reason += f" It was deleted for good: remove {self._state_file} to track the run again from its start"
            elif runs is None and re.search("already exists|duplicate column", reason):
                reason += ". MLflow was cut off while it made the tables: if they hold no run yet, remove them"
            raise TrackingError(f"MLflow at {self.place} does not take events: {reason}") from error

    def fail(self, reason: str) -> None:
        """Marks the runs as failed that are not at their end, with what can be tracked of them.

        Raises:
            TrackingError: The store refused or did not answer.
        """
        with suppress(TrackingError):
            self.sync()
        try:
            (self._runs or self._open_runs(self._known_state())).fail(reason)
        except Exception as error:
            what = f"MLflow at {self.place} still shows the run as running"
            raise TrackingError(f"{what}: {without_credentials(root_cause(error))}") from error

    def _open_runs(self, state: dict[str, Any]) -> MlflowRuns:
        from orchestrator.tracking.mlflow_runs import MlflowRuns

        with suppress(Exception):  # MLflow then says why it cannot be
            make_store(self._uri, lambda address: MlflowRuns(address, self._run_dir, state))
        return MlflowRuns(self._uri, self._run_dir, state)

    def _sync(self) -> bool:
        state = self._state = self._known_state()
        if self._runs is None:
            self._runs = self._open_runs(state)
            for event, offset in self._outbox.read():
                if offset > state["offset"]:
                    break
                self._runs.recall(event)
                self._finished = isinstance(event, RunEnded)
        offset, noted = state["offset"], time.monotonic()
        for event, after in self._outbox.read(offset):
            offset = after
            self._runs.track(event)
            self._finished = isinstance(event, RunEnded)
            if time.monotonic() - noted > NOTE_INTERVAL_SECONDS:
                self._note(self._runs, offset)
                noted = time.monotonic()
        self._note(self._runs, offset)
        return self._finished

    def _note(self, runs: MlflowRuns, offset: int) -> None:
        """Sends what is collected, and notes on disk up to where the events are tracked."""
        runs.flush()
        state = self._known_state()
        if offset != state["offset"]:
            tail = _digest(self._outbox.before(offset))
            self._state = {**state, **runs.known, "offset": offset, "tail": tail}
            # Where there is no room for it, what was tracked is tracked again, which changes nothing.
            with suppress(RunFolderError), self._outbox.guarded():
                write_atomically(self._state_file, json.dumps(self._state))

    def finish(self, timeout: float, limit: float = math.inf) -> bool:
        """Waits until the end of the run is tracked; returns whether it is.

        Args:
            timeout: Seconds in which something must have been tracked.
            limit: Seconds in all.
        """
        return self._end("", timeout, limit)

    def abandon(self, reason: str, timeout: float) -> bool:
        """Has the runs marked as failed, since their events cannot be written any more; returns whether they are."""
        return self._end(" ".join(reason.split()), timeout, math.inf)

    def _end(self, reason: str, timeout: float, limit: float) -> bool:
        deadline, code = time.monotonic() + limit, 0
        for _ in range(2):
            process = self._process
            if process is None or process.poll():  # not started, or killed
                process = self.start()
            restore_priority(process.pid)  # now the run waits for it
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has just been killed
                process.stdin.write(reason)
                process.stdin.close()
            try:
                code = self._wait(process, timeout, deadline)
            except subprocess.TimeoutExpired:
                self.failure = self.failure or f"MLflow at {self.place} takes longer than {min(timeout, limit):.0f} s"
                process.kill()
                process.wait()
                return False
            finally:
                self._reader.join()
                self._remove_temporary_files()
            if code >= 0:
                return code == 0
        self.failure = self.failure or f"the process that tracks was killed twice ({signal.Signals(-code).name})"
        return False

    def _wait(self, process: subprocess.Popen[str], timeout: float, deadline: float) -> int:
        noted, since = self._noted(), time.monotonic()
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(0.5)
            now = time.monotonic()
            if (last := self._noted()) != noted:
                noted, since = last, now
            if now > min(since + timeout, deadline):
                raise subprocess.TimeoutExpired(process.args, timeout)

    def _noted(self) -> int:
        """When what is tracked was last noted on disk, in nanoseconds; 0 for never."""
        with suppress(OSError):
            return self._state_file.stat().st_mtime_ns
        return 0

    def _remove_temporary_files(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _known_state(self) -> dict[str, Any]:
        """What is tracked so far: what this process has tracked, else what the file says."""
        return self._state or self._read_state()

    def _read_state(self) -> dict[str, Any]:
        with suppress(OSError, ValueError, KeyError, TypeError):  # not there yet, or damaged
            state: dict[str, Any] = json.loads(self._state_file.read_text(encoding="utf-8"))
            if state["place"] == self.place:
                return state if self._is_tracked(state) else {**state, "offset": 0}
        return {"place": self.place, "offset": 0, "runs": {}, "experiment_id": None}

    def _is_tracked(self, state: dict[str, Any]) -> bool:
        """Whether the outbox still begins with what was tracked of it; else, all of it is tracked again."""
        offset: int = state["offset"]
        before = self._outbox.before(offset)
        same = before.endswith(b"\n") and state.get("tail", _digest(before)) == _digest(before)
        return same or offset == 0

    def _log_output(self, process: subprocess.Popen[str]) -> None:
        """Logs the process's output in the driver, which owns the terminal."""
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self.failure = line.rstrip()
                logger.warning("%s", self.failure)
