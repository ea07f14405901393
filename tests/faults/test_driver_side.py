"""What can happen to everything but the workers, each made from outside by process id: the command ends as undisturbed.

The same machinery as `make chaos`, with one fault at one place for each run. Folders that are taken away are in
`test_run_folder.py`, a stop that is not obeyed in `test_supervisor.py`.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import pytest

from tests.builders.chaos_checks import Control, broken, log_tail
from tests.builders.chaos_faults import KINDS, Kind, stop
from tests.builders.chaos_run import soak_experiment
from tests.builders.mlflow_server import MlflowServer
from tests.builders.s3 import free_port
from tests.faults.chaos import Soak, small_disk

pytestmark = [pytest.mark.train, pytest.mark.soak]

ITERATIONS = 60

CASES = {
    "the process that drives the run, in checks": replace(KINDS["child"], when="ray"),
    "the process that drives the run, in training": replace(KINDS["child"], when="training"),
    "the raylet, at set-up": replace(KINDS["raylet"], when="setup"),
    "the raylet, in training": replace(KINDS["raylet"], when="training"),
    "the GCS, at set-up": replace(KINDS["gcs"], when="setup"),
    "the GCS, in training": replace(KINDS["gcs"], when="training"),
    "the telemetry actor": KINDS["telemetry"],
    "Ray Train's controller": KINDS["controller"],
    "the tracker": KINDS["tracker"],
    "the MLflow server killed": replace(KINDS["mlflow_gone"], when="training"),
    "the MLflow server silent": replace(KINDS["mlflow_silent"], when="training"),
    "MLflow's database locked": replace(KINDS["mlflow_locked"], when="training"),
    "the MLflow server killed, at the end": replace(KINDS["mlflow_gone"], when="results"),
    "the disk full": KINDS["disk_full"],
    "the clock set": replace(KINDS["clock"], when="training"),
    "the command killed, at set-up": replace(KINDS["command"], when="setup"),
    "the command killed, in training": replace(KINDS["command"], when="training"),
    "the command killed, while results are written": replace(KINDS["command"], when="results"),
    "SIGINT while Ray starts": replace(KINDS["sigint"], when="ray"),
    "SIGTERM at set-up": replace(KINDS["sigterm"], when="setup"),
    "SIGHUP in training": replace(KINDS["sighup"], when="training"),
    "SIGTERM in an evaluation": stop(signal.SIGTERM, 130, "evaluation"),
    "SIGINT in a checkpoint": stop(signal.SIGINT, 130, "checkpoint"),
    "SIGHUP while results are written": replace(KINDS["sighup"], when="results"),
}
"""What is done, and where."""


@dataclass
class Bench:
    soak: Soak
    control: Control
    small_disk: bool


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("driver")
    server = MlflowServer(folder, free_port())
    with small_disk(folder / "disk") as disk, server:
        values = partial(soak_experiment, uri=server.uri, iterations=ITERATIONS, workers=1, patience=10)
        soak = Soak(folder, disk, server, values, busy=True)
        undisturbed = soak.run("undisturbed", iter(()), random.Random(0)).run  # noqa: S311 - nothing is drawn
        assert undisturbed.codes[-1] == 0 and not undisturbed.problems, log_tail(undisturbed.folder)
        yield Bench(soak, Control.of(undisturbed), disk.is_mount())


@pytest.mark.parametrize("what", CASES)
def test_a_run_ends_as_undisturbed_after(what: str, bench: Bench) -> None:
    kind: Kind = CASES[what]
    if kind is KINDS["disk_full"] and not bench.small_disk:
        pytest.skip("a file system cannot be mounted here (root is needed)")
    name = f"run{list(CASES).index(what)}"
    ended = bench.soak.run(name, iter([(0.0, what, kind)]), random.Random(name))  # noqa: S311 - repeatable
    assert [fault.name for fault in ended.faults] == [what], "the fault did not happen"
    assert not broken(ended.run, ended.faults, bench.control), log_tail(ended.run.folder)
    bench.soak.remove(ended.run)  # the disk is small
