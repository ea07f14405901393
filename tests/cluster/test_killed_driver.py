"""A job whose driver is killed goes on by itself; one that is killed as a whole goes on when it is sent again."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.builders.cluster import ClusterOfHosts, Job
from tests.builders.experiments import tiny_experiment
from tests.builders.waiting import wait_for
from trainers.faults import Fault, fired

pytestmark = [pytest.mark.cluster, pytest.mark.soak]

EVALUATION_PERIOD = 100


def starts(job: Job) -> int:
    return len(job.events("run_started"))


def driver(cluster: ClusterOfHosts, job: Job) -> tuple[int, int]:
    """Process ids on the head: the command, and its child that drives the run."""
    command = json.loads((job.run_dir / "driver.json").read_text())["pid"]
    (child,) = cluster.head.check(f"pgrep --parent {command} --full orchestrator.run").split()
    return command, int(child)


def train_on(job: Job, start: int) -> None:
    """Waits until the newest start of the run is held in its training."""

    def held() -> bool:
        assert job.sender.poll() is None, job.output[-3000:]
        attempts = {fault["attempt"] for fault in fired(faults_file(job.cluster))}
        return starts(job) == start and start - 1 in attempts

    wait_for(held, lambda: job.output[-3000:])


def faults_file(cluster: ClusterOfHosts) -> Path:
    return cluster.shared / "faults.json"


def exported(cluster: ClusterOfHosts) -> str:
    port = cluster.head.check("cat /tmp/ray/prom_metrics_service_discovery.json")
    (address,) = re.findall(r'"(10\.77\.0\.10:\d+)"', port)[:1]
    return cluster.head.check(f"curl --silent --max-time 60 http://{address}/metrics")


def test_a_killed_driver_goes_on_by_itself_and_a_killed_job_when_it_is_sent_again(
    cluster: ClusterOfHosts, request: pytest.FixtureRequest
) -> None:
    values = tiny_experiment(
        trials={"world_sizes": [2], "scaling": "strong"},
        protocol={
            "kind": "time_to_train", "iterations": 4000, "eval_period_iterations": EVALUATION_PERIOD,
            "warmup_iterations": 2, "target_box_ap": 0.0,
        },
        storage={"checkpoint_period_iterations": 10},
    )  # fmt: skip
    options = "--resume auto --auto-resume 2"
    # Each start is held before the evaluation that ends training, however late somebody looks.
    holds = [dataclasses.asdict(Fault("hold", rank=0, iteration=45, attempt=attempt)) for attempt in range(3)]
    faults_file(cluster).write_text(json.dumps(holds))
    request.addfinalizer(lambda: faults_file(cluster).unlink(missing_ok=True))
    job = cluster.submit("killed", values, options)
    train_on(job, start=1)
    _, child = driver(cluster, job)
    cluster.head.check(f"kill -KILL {child}")
    train_on(job, start=2)
    assert "going on by itself" in job.output, job.output[-3000:]
    command, _ = driver(cluster, job)
    cluster.head.check(f"kill -KILL {command}")
    assert job.wait() != 0
    wait_for(lambda: "orchestrator.run" not in cluster.head.check("ps axww"))

    again = cluster.submit("killed", values, options, start=2)
    train_on(again, start=3)
    wait_for(lambda: "ray_detectron2_iterations{" in exported(cluster))
    faults_file(cluster).unlink()
    assert again.wait() == 0, again.output[-3000:]
    (trial,) = again.trials()
    assert (trial["status"], trial["num_restarts"], trial["iterations"]) == ("FINISHED", 2, EVALUATION_PERIOD)
    assert [restart["cause"] for restart in trial["restarts"]] == ["resumed", "resumed"]
    assert trial["time_to_train_seconds"] is not None, "it came to its target"
    (runs,) = cluster.tracked("killed")
    parent, child_run = sorted(runs, key=lambda run: run["tags"]["kind"])
    assert [run["status"] for run in runs] == ["FINISHED", "FINISHED"]
    assert parent["tags"]["run.ray_job_id"] == "killed-2", "where it ran last"
    assert re.match(r"http://10\.77\.0\.10:8265/#/jobs/\w+$", parent["tags"]["run.ray_dashboard"])
    points = child_run["points"]
    assert {key: steps for key, steps in points.items() if max(Counter(steps).values()) > 1} == {}
    assert sorted(points["loss/total_loss"]) == list(range(2, EVALUATION_PERIOD + 1, 2)), "each window, once"
    state = cluster.head.check("cat /tmp/ray/session_latest/logs/export_events/*EXPORT_TRAIN*")
    assert "EXPORT_TRAIN_RUN" in state
