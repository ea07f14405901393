"""Runs the part of a command that uses Ray in a child process: signals, exit code and clean-up are its parent's.

Ray ends a process that is connected to a cluster when that cluster is lost, whatever the process is doing. So the
command forks before it starts Ray. The child drives the run; the parent outlives it, and ends every process that was
started for it, Ray's daemons and their agents included.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

import psutil

from orchestrator.execution.stop import AT_ONCE, INTERRUPTED, STOP_SIGNALS, handle_stop_signals
from trainers.contract.memory import oom_kills, oom_kills_text

MAX_PATIENCE = 2
"""Signals that are passed on; with the next one, the child is killed."""

END_TIMEOUT_SECONDS = 5.0
"""Longest wait for killed processes to be gone."""

LOST_CLUSTER_SECONDS = 2.0
"""How long a child may take to end by itself once its cluster is lost; it may wait in a call of Ray's for a minute."""

POLL_INTERVAL_SECONDS = 1.0
"""How often the child looks whether there still is a cluster."""

SET_PARENT_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36
"""Options of Linux's `prctl`."""

STARTING, WORKING, ENDED = range(3)
"""Phases of the child."""

PARENT_DIED = signal.SIGVTALRM
"""Sent by the kernel; nothing else here uses it, and every system has it."""


class ClusterLostError(Exception):
    """The cluster is gone, and with it everything that only Ray's calls could do."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a child ended."""

    code: int | None
    """Its exit code; None where it was cut off."""
    reason: str
    """How it was cut off; "" where it was not."""
    worked: bool
    """Whether it had begun with what a signal must not simply cut off."""


class Supervisor:
    """Handles the signals of a command from its beginning on, and runs its work in child processes, one at a time."""

    def __init__(self) -> None:
        self._signals = 0
        self._child: int | None = None
        self._forked = False
        self._others: set[psutil.Process] = set()
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)  # the child's phase, then why it gave up
        # Some job launchers ignore it, which is inherited: then no process here would learn how its children ended.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        handle_stop_signals(self._on_signal)

    @property
    def stopped(self) -> bool:
        """Whether a signal has come."""
        return self._signals > 0

    def working(self, lost_daemon: Callable[[], str | None] = lambda: None) -> None:
        """Called by the child once it handles `STOP_SIGNALS` itself; until then, a signal cuts it off.

        Args:
            lost_daemon: Returns the name of a daemon of its cluster that has ended, if one has. Then the child is ended
                where it does not end by itself.
        """
        self._shared[0] = WORKING
        threading.Thread(target=self._end_without_cluster, args=[lost_daemon], daemon=True).start()

    def _end_without_cluster(self, lost_daemon: Callable[[], str | None]) -> None:
        while (daemon := lost_daemon()) is None:
            time.sleep(POLL_INTERVAL_SECONDS)
        time.sleep(LOST_CLUSTER_SECONDS)
        self._give_reason(f"the Ray cluster was lost: its {daemon} has ended")
        os._exit(1)

    def _give_reason(self, reason: str) -> None:
        """Writes down why this child gives up, for its parent."""
        self._shared[1:] = reason.encode()[: mmap.PAGESIZE - 1].ljust(mmap.PAGESIZE - 1, b"\0")

    def run(self, work: Callable[[], int]) -> Ending:
        """Runs work in a child process and waits for it; afterwards, no process that it started is alive.

        Args:
            work: Returns the exit code; is given this process's open files, terminal and environment.
        """
        self._shared[:] = bytes(len(self._shared))
        self._others = set(psutil.Process().children(recursive=True))
        self._forked = True
        _prctl(SET_CHILD_SUBREAPER, 1)  # processes whose parent has ended become this one's children
        parent, killed = os.getpid(), oom_kills()
        _flush_output()
        # No signal may come between the fork and when the child is known.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        if self.stopped:  # while this looked around, or before
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            return Ending(None, "", worked=False)
        self._child = os.fork()
        if self._child == 0:
            self._be_child(parent, work)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        code = self._wait()
        end_descendants(self._others)
        phase, reason = self._shared[0], bytes(self._shared[1:]).rstrip(b"\0").decode(errors="replace")
        if phase == ENDED:
            return Ending(code, "", worked=True)
        if -code in STOP_SIGNALS:  # sent to the child alone
            self._signals += 1
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL and (text := oom_kills_text(killed, oom_kills())):
            how += f"; {text}"
        return Ending(None, reason or f"the process that drives the run was lost ({how})", phase == WORKING)

    def _wait(self) -> int:
        while True:
            pid, status = os.waitpid(-1, 0)  # what others have left is reaped, too
            if pid == self._child:
                self._child = None
                return os.waitstatus_to_exitcode(status)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # A closed terminal may send SIGHUP several times: from the kernel and from the shell.
        if number == signal.SIGHUP and self._signals:
            return
        self._signals += 1
        if self._child is None:
            if not self._forked or self._signals > MAX_PATIENCE:
                end_descendants(self._others)
                os._exit(INTERRUPTED)
            return
        passed_on = signal.SIGTERM if self._signals == 1 else AT_ONCE
        if self._shared[0] == STARTING or self._signals > MAX_PATIENCE:
            passed_on = signal.SIGKILL
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(self._child, passed_on)

    def _be_child(self, parent: int, work: Callable[[], int]) -> None:
        # Ctrl-C in a terminal is sent to its foreground group: to the parent, who passes it on, and not to Ray as well.
        os.setpgid(0, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        signal.signal(PARENT_DIED, _end_family)
        _prctl(SET_PARENT_DEATH_SIGNAL, PARENT_DIED)
        code = 1
        try:
            if os.getppid() == parent:
                code = work()
                self._shared[0] = ENDED
        except (ClusterLostError, OSError) as error:
            self._give_reason(str(error))
        except BaseException:  # noqa: BLE001 - nothing may go up a stack that is the parent's
            traceback.print_exc()
        finally:
            _flush_output()
            os._exit(code)


def _flush_output() -> None:
    """Writes what the standard streams hold, and those that were put in their place."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            if stream is not None:
                stream.flush()


def end_descendants(others: set[psutil.Process]) -> None:
    """Kills all descendants of this process but some, until there is none or the time is up; at least once."""
    deadline = time.monotonic() + END_TIMEOUT_SECONDS
    while left := set(psutil.Process().children(recursive=True)) - others:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(left), timeout=0.1)
        if time.monotonic() > deadline:
            return


def _end_family(*_: object) -> None:
    """Ends a child that has lost its parent, which would have cleaned up."""
    end_descendants(set())
    os._exit(1)


def _prctl(option: int, value: int) -> None:
    """Asks Linux for something that Python has no function for; elsewhere, orphans are left to their own devices."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
