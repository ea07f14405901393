"""A trial of four workers runs with two, with four once a host has come, and with two once it is gone."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.builders import trained_images
from tests.builders.commands import ROOT
from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment
from tests.builders.hosts import SHARED, Host, Network, why_not
from tests.builders.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.soak]

HEAD = "--head --port 6379 --node-ip-address 10.77.0.10 --num-cpus 0"
NUM_IMAGES, BATCH = 32, 8
EXPERIMENT = tiny_experiment(
    data={"generated": {"num_train": NUM_IMAGES, "num_val": 4, "size": 64}},
    model={"weights": "", "overrides": TINY_OVERRIDES | {"SOLVER.IMS_PER_BATCH": BATCH}},
    trials={"world_sizes": [4], "scaling": "strong"},
    # So long that more workers are worth a start on any machine: the test ends it.
    protocol={"kind": "throughput", "iterations": 100_000, "warmup_iterations": 2},
    resources={
        # What ended workers used is free in far less than these seconds: none of them starts again with fewer for that.
        "device": "cpu", "cpus_per_worker": 1, "num_nodes": 2, "min_workers": 2, "resize_after_seconds": 10,
        "address": "10.77.0.10:6379",
    },
    tracking={"uri": "http://10.77.0.10:5999", "offline": True},  # where nothing listens, which is known at once
    storage={"path": f"{SHARED}/runs", "checkpoint_period_iterations": 10},
    log_period_iterations=5,
)  # fmt: skip


@dataclass
class Run:
    """A run that is driven on the head, and the hosts it may use."""

    network: Network
    shared: Path
    token: str
    head: Host
    driver: subprocess.Popen[str]

    def add_host(self, name: str, number: int) -> Host:
        """A further host of two CPUs, whose workers note what they train on."""
        return add_host(self.network, self.shared, self.token, name, number)

    def events(self, kind: str) -> list[dict[str, Any]]:
        file = self.shared / "run" / "events.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [event for line in lines if line.endswith("}") and (event := json.loads(line))["kind"] == kind]

    def train_further(self, workers: int, iterations: int) -> None:
        """Waits until so many workers have trained so many iterations in the newest attempt."""

        def done() -> bool:
            assert self.driver.poll() is None, self.output()
            started = self.events("worker_started")
            last = max((event["attempt"] for event in started), default=0)
            sizes = {event["world_size"] for event in started if event["attempt"] == last}
            own = [event for event in self.events("steps_done") if (event["attempt"], event["rank"]) == (last, 0)]
            return sizes == {workers} and sum(e["iteration"] - e["first_iteration"] for e in own) >= iterations

        wait_for(done, self.output)

    def output(self) -> str:
        return (self.shared / "driver.log").read_text(errors="replace")[-4000:]


def add_host(network: Network, shared: Path, token: str, name: str, number: int) -> Host:
    host = network.add(name, number, shared, token)
    noting = {
        "PYTHONPATH": f"{SHARED}/hooks",
        "BENCHMARK_BEFORE_STEP": "trained_images:recording",
        trained_images.FOLDER_VARIABLE: f"{SHARED}/trained",
    }
    join = f"ray start --address 10.77.0.10:6379 --node-ip-address {host.address} --num-cpus 2"
    host.check(join, **noting)
    return host


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    if reason := why_not():
        pytest.skip(reason)
    shared, token = tmp_path / "shared", secrets.token_hex(32)
    for folder in ("hooks", "trained"):
        (shared / folder).mkdir(parents=True)
    shutil.copy(trained_images.__file__, shared / "hooks")
    (shared / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    with Network() as network:
        head = network.add("head", 10, shared, token)
        head.check(f"ray start {HEAD}")
        add_host(network, shared, token, "one", 11)
        command = f"python -m orchestrator.run {SHARED}/experiment.yaml --output {SHARED}/run"
        driver = head.start(f"echo $$ > {SHARED}/pid; cd {ROOT}; exec {command}", shared / "driver.log")
        yield Run(network, shared, token, head, driver)


def trained(run: Run) -> dict[int, dict[int, list[int]]]:
    """Ids of the images that workers trained on, by iteration and attempt."""
    attempts = {(event["host"], event["pid"]): event["attempt"] for event in run.events("worker_started")}
    found: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for file in (run.shared / "trained").iterdir():
        for line in file.read_text().splitlines():
            note = json.loads(line)
            found[note["iteration"]][attempts[note["host"], note["pid"]]] += note["ids"]
    return found


def test_two_then_four_then_two_workers_train_on_every_image_once_in_every_epoch(run: Run) -> None:
    run.train_further(2, 10)
    host = run.add_host("two", 12)
    run.train_further(4, 15)
    host.kill()
    run.train_further(2, 10)
    run.head.check(f"kill -TERM $(cat {SHARED}/pid)")
    assert run.driver.wait(timeout=300) == 130, run.output()

    causes = [event["failure"] for event in run.events("trial_restarted")]
    assert causes[0] == "resized" and "resized" not in causes[1:] and causes[1:], "one growth, one loss"
    (trial,) = json.loads((run.shared / "run" / "results.json").read_text())["trials"]
    segments = trial["segments"]
    assert [segment["world_size"] for segment in segments] == [2, 4, 2]
    assert [segment["first_iteration"] for segment in segments[1:]] == [s["iteration"] for s in segments[:-1]]
    assert {segment["global_batch_size"] for segment in segments} == {BATCH}
    assert trial["images_per_second"] == segments[1]["images_per_second"], "the rate of all workers alone"
    assert trial["restarts"][0]["lost_iterations"] == 0, "it took a checkpoint to grow"

    last = segments[-1]["iteration"]
    steps = {iteration: attempts for iteration, attempts in trained(run).items() if iteration < last}
    assert sorted(steps) == list(range(last)) and last >= 35
    final = [attempts[max(attempts)] for _, attempts in sorted(steps.items())]
    assert {len(step) for step in final} == {BATCH}
    for attempts in steps.values():  # what was trained again was the same
        assert all(set(ids) <= set(attempts[max(attempts)]) for ids in attempts.values())
    ids = [number for step in final for number in step]
    epochs = [Counter(ids[first : first + NUM_IMAGES]) for first in range(0, len(ids) - NUM_IMAGES + 1, NUM_IMAGES)]
    assert len(epochs) >= 8 and len(set(ids)) == NUM_IMAGES
    assert all(epoch == Counter(set(ids)) for epoch in epochs)
