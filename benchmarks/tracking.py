"""Measures what tracking costs training, with a real MLflow server behind a proxy that delays every request."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import psutil

from benchmarks import turns
from benchmarks.measure import Row, by_blocks
from benchmarks.training import demo_experiment, experiment_command
from benchmarks.turns import Side

DELAY_SECONDS = 0.28
"""Delay of a request: that of a server in another part of the world."""

STEPS = 3000
"""Steps of the training."""

WARMUP_STEPS = 200
"""First steps, which are not measured: the tracker imports MLflow and creates the run meanwhile."""

BLOCKS = 15
"""Blocks of the measured steps; each gives one figure of the row."""


class SlowProxy(BaseHTTPRequestHandler):
    """Forwards each request to the server after a delay."""

    protocol_version = "HTTP/1.1"
    port = 0

    def _forward(self) -> None:
        time.sleep(DELAY_SECONDS)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with closing(connection):
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.getheader("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward  # noqa: N815 - http.server's names

    def log_message(self, format: str, *values: object) -> None:
        """Logs nothing."""


@contextmanager
def slow_server() -> Iterator[str]:
    """The address of an MLflow server with a temporary database that answers after `DELAY_SECONDS`."""
    with TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        arguments = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", folder]
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *arguments, "--port", str(port), "--workers", "1"],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("Proxy", (SlowProxy,), {"port": port}))
        Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            _wait_for(f"http://127.0.0.1:{port}/health")
            yield f"http://127.0.0.1:{proxy.server_port}"
        finally:
            proxy.shutdown()
            server.terminate()
            server.wait()


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(address, timeout=2)  # noqa: S310 - our own server
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def tracking() -> Row:
    """Images per second with a slow server and a point of every metric each 25 steps, and without tracking.

    Both come from one training, whose tracker is suspended for every second step: of two identical processes, one is a
    hundredth faster than the other from its start to its end, and the target leaves half a hundredth.
    """
    protocol = {"kind": "throughput", "iterations": STEPS, "warmup_iterations": 10, "evaluate_at_end": False}
    with slow_server() as address, TemporaryDirectory() as name:
        folder = Path(name)
        where = {"uri": address}
        values = demo_experiment("fast", 1, 1, folder, protocol=protocol, tracking=where, log_period_iterations=25)
        # Short steps on one image: the closer and the more alike the two of a pair, the less is between them.
        values["data"]["generated"] |= {"num_train": 1}
        values["model"]["overrides"] |= {"SOLVER.IMS_PER_BATCH": 1, "SOLVER.BASE_LR": 0.001}
        values["storage"] = {"checkpoint_period_iterations": 0}
        command = experiment_command(values, folder)
        with turns.started(command, num_ranks=1, folder=folder, name="ours", threads=1) as side:
            side.wait_until_ready()
            side.turn(WARMUP_STEPS)
            running, suspended = with_and_without(side, _tracker(side))
    # The tracker's work for both steps of a pair falls into one: its cost is that of the two together.
    pairs = [(one + other) / 2 for one, other in zip(running, suspended, strict=True)]
    tracked, bare = by_blocks(pairs, suspended, 1, BLOCKS)
    against = f"the same training with its tracker suspended; MLflow answers after {DELAY_SECONDS} s"
    return Row("tracking", against, "images/s", tracked, bare, 0.995, higher_is_better=True)


def with_and_without(side: Side, process: psutil.Process) -> tuple[list[float], list[float]]:
    """Takes the steps of a training to its end, with a process running and with it suspended.

    Args:
        side: The training.
        process: The process; it runs at the end.

    Returns:
        Seconds of the steps of each kind, equally many, each next to the one of the other kind.
    """
    running: list[float] = []
    suspended: list[float] = []
    while True:
        for found in (running, suspended, suspended, running):  # a machine that slows down favours neither
            if found is suspended:
                process.suspend()
            try:
                step = side.turn(1)
            finally:
                process.resume()
            if step is None:
                pairs = min(len(running), len(suspended))
                return running[:pairs], suspended[:pairs]
            found += step


def _tracker(side: Side) -> psutil.Process:
    for process in psutil.Process(side.process.pid).children(recursive=True):
        if "orchestrator.tracking" in process.cmdline():
            return process
    raise RuntimeError(f"there is no tracking process:\n{side.log.read_text(errors='replace')[-3000:]}")
