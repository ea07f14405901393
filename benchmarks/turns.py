"""Lets two trainings take their steps in turns: one waits while the other one computes.

A machine's speed may change by a tenth and more from one minute to the next. Runs that follow each other differ by
that; neighbouring steps do not.

Each rank requests its turn over a socket before every step (`waiting`). A step lasts from the answer to the next
request: with hooks and logging, and by the same clock on both sides.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from trainers.worker import BEFORE_STEP_VARIABLE

VARIABLE = "BENCHMARK_TURNS"
"""Names the socket at which a process requests its turn; without it, nothing waits."""

START_SECONDS = 300
"""Longest wait for a side to reach its first step."""

WARMUP_STEPS = 5
"""Steps of each side that are not measured."""


def waiting() -> Callable[[], None]:
    """A function that returns when it is this process's turn; one that does nothing outside a benchmark.

    Ray Train's workers find it by `$BENCHMARK_BEFORE_STEP`, which `started` sets.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return lambda: None
    line = socket.socket(socket.AF_UNIX)
    line.connect(path)

    def wait() -> None:
        line.sendall(b".")
        if not line.recv(1):
            raise ConnectionError("the benchmark is gone")

    return wait


@dataclass
class Side:
    """A training that takes a step whenever `turn` is called."""

    process: subprocess.Popen[bytes]
    """Its process."""
    listener: socket.socket
    """Socket at which its ranks connect."""
    log: Path
    """Its output."""
    num_ranks: int
    """Number of processes that request turns."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of each measured step."""
    others_seconds: float = 0.0
    """CPU time of its processes other than the ranks while steps were measured."""
    _lines: list[socket.socket] = field(default_factory=list)
    _ranks: list[int] = field(default_factory=list)

    def wait_until_ready(self) -> bool:
        """Waits until every rank requests its turn; False when training is over."""
        deadline = time.monotonic() + START_SECONDS
        while len(self._lines) < self.num_ranks:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no step was taken:\n{self.log.read_text(errors='replace')[-3000:]}")
            try:
                line, _ = self.listener.accept()
            except TimeoutError:
                continue
            line.settimeout(START_SECONDS)
            self._lines.append(line)
            credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            self._ranks.append(int.from_bytes(credentials[:4], sys.byteorder))
        answers = [line.recv(1) for line in self._lines]
        return all(answers)

    def turn(self, steps: int) -> list[float] | None:
        """Lets it take some steps; returns their seconds, None when training ended in one of them."""
        found = []
        for _ in range(steps):
            began = time.perf_counter()
            for line in self._lines:
                line.sendall(b".")
            if not self.wait_until_ready():
                return None
            found.append(time.perf_counter() - began)
        return found

    def others(self) -> float:
        """CPU seconds so far of all its processes but the ranks."""
        total = 0.0
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if process.pid not in self._ranks:
                    times = process.cpu_times()
                    total += times.user + times.system
            except psutil.Error:
                continue
        return total


@contextmanager
def started(command: list[str], num_ranks: int, folder: Path, name: str, threads: int) -> Iterator[Side]:
    """Starts a command that takes turns; its socket and its log are in a folder, by a name."""
    path, log = folder / f"{name}.socket", folder / f"{name}.log"
    with socket.socket(socket.AF_UNIX) as listener, log.open("wb") as output:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(1)
        environment = {
            **os.environ,
            VARIABLE: str(path),
            BEFORE_STEP_VARIABLE: "benchmarks.turns:waiting",
            "OMP_NUM_THREADS": str(threads),
            "PYTHONWARNINGS": "ignore",
        }
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        side = Side(process, listener, log, num_ranks)
        try:
            yield side
        finally:
            for line in side._lines:
                line.close()
            try:
                process.wait(60 if sys.exc_info()[0] is None else 5)
            except subprocess.TimeoutExpired:
                process.terminate()  # Ray's driver ends its cluster
                process.wait()
    if process.returncode:
        last = log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{command!r} ended with {process.returncode}:\n{last}")


def in_turns(ours: list[str], peer: list[str], num_ranks: int = 1, threads: int = 1) -> tuple[Side, Side]:
    """Runs two commands of equally many steps to their end, a turn of one and a turn of the other, then the reverse.

    Args:
        ours: Command of this program.
        peer: Command of the peer.
        num_ranks: Processes of each that train.
        threads: Of each rank.

    Returns:
        Both sides with the seconds of their steps after the first.
    """
    with (
        tempfile.TemporaryDirectory() as name,
        started(ours, num_ranks, Path(name), "ours", threads) as first,
        started(peer, num_ranks, Path(name), "peer", threads) as second,
    ):
        sides = (first, second)
        for side in sides:
            side.wait_until_ready()
            side.turn(WARMUP_STEPS)
        before = [side.others() for side in sides]
        order = [0, 1]
        while True:
            latest = [side.others() for side in sides]  # during the last step its processes begin to end
            turns: list[list[float] | None] = [None, None]
            for i in order:
                turns[i] = sides[i].turn(1)
            if None in turns:
                break
            for side, turn in zip(sides, turns, strict=True):
                side.seconds += turn or []
            order.reverse()  # ours, peer, peer, ours: a machine that slows down favours neither
        for side, since, to in zip(sides, before, latest, strict=True):
            side.others_seconds = to - since
        for side, turn in zip(sides, turns, strict=True):
            while turn is not None:
                turn = side.turn(1)
    return sides
