"""What tracking costs training: a real MLflow server behind a proxy that lets every request wait."""

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

from benchmarks import turns
from benchmarks.measure import Row
from benchmarks.training import demo, demo_experiment, experiment_command, rate_row

DELAY_SECONDS = 0.28
"""How long a request waits before it is handed on: a server in another part of the world."""


class SlowProxy(BaseHTTPRequestHandler):
    """Hands each request on to the server after a while."""

    protocol_version = "HTTP/1.1"
    port = 0

    def _hand_on(self) -> None:
        time.sleep(DELAY_SECONDS)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with closing(connection):
            kept = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            connection.request(self.command, self.path, body, kept)
            answer = connection.getresponse()
            content = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.getheader("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _hand_on  # noqa: N815 - http.server's names

    def log_message(self, format: str, *values: object) -> None:
        """Says nothing."""


@contextmanager
def slow_server() -> Iterator[str]:
    """The address of an MLflow server on a database of its own that answers after `DELAY_SECONDS`."""
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
    """Images per second with a slow server and a point of every metric each 5 steps, and with none to be reached."""
    steps = 310
    protocol = {"kind": "throughput", "iterations": steps, "warmup_iterations": 10, "evaluate_at_end": False}

    def side(where: dict[str, object], name: str) -> list[str]:
        folder = Path(name)
        values = demo_experiment("fast", 1, 1, folder, protocol=protocol, tracking=where, log_period_iterations=5)
        return experiment_command(values, folder, "benchmarks.turns")

    with slow_server() as address, TemporaryDirectory() as first, TemporaryDirectory() as second:
        without = {"uri": "http://127.0.0.1:9", "offline": True}
        # What a point sets off goes on beside the next steps, and must meet those of its own side: in ten steps a turn,
        # the first of which is the ninth, points come after the second and the seventh.
        commands = side({"uri": address}, first), side(without, second)
        sides = turns.in_turns(*commands, steps_a_turn=10, warmup_steps=8)
    against = f"the same without a server; MLflow answers after {DELAY_SECONDS} s"
    # A block is two turns of each side, there and back: a machine that slows down is no loss of either.
    return rate_row("tracking", against, 0.995, sides, demo(1).solver.global_batch_size, blocks=15)
