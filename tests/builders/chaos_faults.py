"""The catalogue of faults that `make chaos` draws from, each made from outside, with what must be recorded of it."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from tests.builders.chaos_run import ChaosRun
from trainers.contract.events import Section
from trainers.faults import Fault

LOST, STUCK, UNKNOWN, AGAIN = ("worker_lost",), ("stuck",), ("unknown",), ("resumed",)

OUTAGE_SECONDS = 5.0
"""How long MLflow is away or silent, and the disk full."""


@dataclass(frozen=True)
class Kind:
    """One kind of fault."""

    fire: Callable[[ChaosRun, random.Random], int | None]
    """Makes it happen; returns the rank that it happened to, None where it was not a worker."""
    causes: tuple[str, ...] = ()
    """What it may be recorded as (`TrialRestarted.failure`); empty where it ends no attempt."""
    when: str = "training"
    """`training`: workers train; `saved`: they do, and a checkpoint exists; `working`: a trial has begun, with or
    without workers; `started`: the process that drives the run has; else a `ChaosRun.phase`."""
    share: int = 1
    """How often it is drawn."""
    must: bool = True
    """Whether an attempt ends by it for certain."""


@dataclass(frozen=True)
class Fired:
    """A fault that has happened."""

    name: str
    kind: Kind
    rank: int | None
    events: int
    """How many events the run had then."""
    seconds: float
    """After the start of the run."""
    training: bool
    """Whether workers trained then."""


def _signal(number: signal.Signals) -> Callable[[ChaosRun, random.Random], int]:
    def fire(run: ChaosRun, chance: random.Random) -> int:
        rank = chance.randrange(run.world_size)
        os.kill(run.workers[rank], number)
        return rank

    return fire


def _inject(kind: str) -> Callable[[ChaosRun, random.Random], int]:
    def fire(run: ChaosRun, chance: random.Random) -> int:
        part, rank = chance.choice(["data", "forward", "backward", "optimizer"]), chance.randrange(run.world_size)
        run.inject(Fault(kind, rank, None, run.attempt, part=part))  # type: ignore[arg-type]
        return rank

    return fire


def _kill_all(run: ChaosRun, chance: random.Random) -> None:
    for pid in run.workers.values():
        os.kill(pid, signal.SIGKILL)


def _damage(run: ChaosRun, chance: random.Random) -> int:
    newest = max(run.run_dir.glob("*/checkpoints/iter_*/manifest.json"))
    state = newest.parent / next(iter(json.loads(newest.read_text())["files"]))
    content = bytearray(state.read_bytes())
    content[chance.randrange(len(content))] ^= 0xFF
    state.write_bytes(content)
    return _signal(signal.SIGKILL)(run, chance)


def _end(name: str) -> Callable[[ChaosRun, random.Random], None]:
    def fire(run: ChaosRun, chance: random.Random) -> None:
        chance.choice(run.processes(name)).kill()

    return fire


def _kill_child(run: ChaosRun, chance: random.Random) -> None:
    run.child[0].kill()


def stop(number: signal.Signals, code: int, section: Section | None = None) -> Kind:
    """A signal to the command.

    Args:
        number: The signal.
        code: The command's exit code, unless it was about to end.
        section: Where rank 0 is held until it knows of the stop; None: wherever it is.
    """

    def fire(run: ChaosRun, chance: random.Random) -> None:
        if section:
            run.inject(Fault("hold", 0, None, run.attempt, section=section))
        run.fine.add(code)
        run.process.send_signal(number)
        if section:
            run.let_go()

    return Kind(fire, AGAIN, when="training" if section else "started")


def _server_gone(run: ChaosRun, chance: random.Random) -> None:
    run.fine.add(2)  # whatever starts meanwhile says that MLflow does not answer
    run.server.kill()
    run.for_a_while(OUTAGE_SECONDS, run.server.start)


def _server_silent(run: ChaosRun, chance: random.Random) -> None:
    run.fine.add(2)
    run.server.send(signal.SIGSTOP)
    run.for_a_while(OUTAGE_SECONDS, lambda: run.server.send(signal.SIGCONT))


def _database_locked(run: ChaosRun, chance: random.Random) -> None:
    run.fine.add(2)
    connection = sqlite3.connect(run.server.database, isolation_level=None, timeout=60)
    connection.execute("BEGIN EXCLUSIVE")
    run.for_a_while(OUTAGE_SECONDS, connection.close)


def _fill(run: ChaosRun, chance: random.Random) -> None:
    run.fine |= {1, 2}
    filler = run.disk / "filler"
    run.for_a_while(OUTAGE_SECONDS, filler.unlink)
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def _set_clock(run: ChaosRun, chance: random.Random) -> None:
    new = run.folder / "clock.new"
    new.symlink_to(str(chance.uniform(-7200, 7200)))
    new.rename(run.folder / "clock")


KINDS = {
    "kill": Kind(_signal(signal.SIGKILL), LOST, share=12),
    "kill_all": Kind(_kill_all, LOST, share=4),
    "crash": Kind(_signal(signal.SIGSEGV), LOST, share=4),
    "abort": Kind(_signal(signal.SIGABRT), LOST, share=4),
    "terminate": Kind(_signal(signal.SIGTERM), LOST),
    "interrupt": Kind(_signal(signal.SIGINT)),
    "freeze": Kind(_signal(signal.SIGSTOP), STUCK),
    "raise": Kind(_inject("raise"), UNKNOWN, share=4),
    "raise_async": Kind(_inject("raise_async"), UNKNOWN),
    "exit": Kind(_inject("exit"), UNKNOWN),
    "gpu_error": Kind(_inject("gpu_error"), UNKNOWN, share=6),
    "stall": Kind(_inject("stall"), STUCK),
    "deadlock": Kind(_inject("deadlock"), STUCK),
    "hold_gil": Kind(_inject("hold_gil"), STUCK),
    "damaged_checkpoint": Kind(_damage, LOST, when="saved", share=2),
    "telemetry": Kind(_end("Telemetry"), ("communication",)),
    "controller": Kind(_end("TrainController"), ("communication",), must=False),  # it may be that of a standby
    "tracker": Kind(_end("orchestrator.tracking")),
    "child": Kind(_kill_child, AGAIN, when="started"),
    "raylet": Kind(_end("/raylet/raylet "), AGAIN, when="working"),
    "gcs": Kind(_end("/gcs/gcs_server "), AGAIN, when="working"),
    "command": stop(signal.SIGKILL, -signal.SIGKILL),
    "sigint": stop(signal.SIGINT, 130),
    "sigterm": stop(signal.SIGTERM, 130),
    "sighup": stop(signal.SIGHUP, 130),
    "mlflow_gone": Kind(_server_gone, when="working"),
    "mlflow_silent": Kind(_server_silent, when="working"),
    "mlflow_locked": Kind(_database_locked, when="working"),
    "disk_full": Kind(_fill, ("storage",), must=False),
    "clock": Kind(_set_clock, when="working"),
}
"""The catalogue. What ends a worker is drawn two times in three, as it is what happens most: of the 419 interruptions
of Llama 3's training that nobody had planned, GPUs alone were 58.7 % (table 5 of https://arxiv.org/abs/2407.21783)."""

NEEDS_SMALL_DISK = {"disk_full"}


def fits(run: ChaosRun, kind: Kind) -> bool:
    """Whether a fault can happen now."""
    if kind.when in ("started", "working"):
        return bool(run.child) and (kind.when == "started" or run.working)
    if kind.when == "saved":
        return run.training and any(run.run_dir.glob("*/checkpoints/iter_*/manifest.json"))
    return kind.when == run.phase
