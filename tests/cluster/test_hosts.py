"""Scenes on several hosts: what a real cluster does to a run, each seen from outside it.

The tests of the demo share one job and follow it from its start to its end, in the order of this file: a cluster and a
job cost a minute each to start on two cores.
"""

from __future__ import annotations

import re
import time

import pytest
import yaml

from tests.builders.cluster import JOB_SERVER, ClusterOfHosts, Job
from tests.builders.commands import ROOT
from tests.builders.experiments import tiny_experiment
from tests.builders.waiting import wait_for

pytestmark = pytest.mark.cluster

TARGET = 5
EVALUATION_PERIOD = 20


@pytest.fixture(scope="module")
def demo(cluster: ClusterOfHosts) -> Job:
    """The demo, sent from the laptop: 2 x 2 workers, to a box and mask AP of 5 instead of 50.

    Model, data and batch are those of configs/demo.yaml; four workers on two cores would need long for its own target.
    """
    values = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    values["trials"]["world_sizes"] = [4]
    values["protocol"] |= {"target_box_ap": TARGET, "target_mask_ap": TARGET}
    values["protocol"]["eval_period_iterations"] = EVALUATION_PERIOD
    values["storage"]["checkpoint_period_iterations"] = 10
    values["log_period_iterations"] = 5
    return cluster.submit("demo", values)


def test_a_job_from_a_laptop_trains_on_two_hosts(cluster: ClusterOfHosts, demo: Job) -> None:
    demo.wait_for_iteration(10)
    started = sorted(demo.events("worker_started"), key=lambda event: event["rank"])
    hosts = [event["host"] for event in started]
    assert {hosts[0], hosts[2]} == {"10.77.0.11", "10.77.0.12"}
    assert hosts[0] == hosts[1] and hosts[2] == hosts[3], "ranks of a host are neighbours"
    assert [event["local_rank"] for event in started] == [0, 1, 0, 1]


def test_no_worker_holds_credentials(cluster: ClusterOfHosts, demo: Job) -> None:
    (password,) = re.findall(r"password = (\S+)", cluster.credentials)
    for host in cluster.workers:
        everything = host.check("cat /proc/[0-9]*/environ | tr '\\0' '\\n'; ls -A ~")
        assert everything.count("RAY_JOB_ID") >= 2, "the environments of its workers were not read"
        assert (
            password not in everything and "MLFLOW_TRACKING_PASSWORD" not in everything and ".mlflow" not in everything
        )
    assert password not in "".join(path.read_text() for path in demo.run_dir.glob("*.json*"))


def test_a_link_that_is_cut_for_seconds_is_survived(cluster: ClusterOfHosts, demo: Job) -> None:
    # Within the steps between two evaluations, which would hide the wait.
    wait_for(lambda: demo.iterations() % EVALUATION_PERIOD in (5, 10))
    before, cut_at = demo.iterations(), time.time()
    cluster.network.cut(cluster.workers[1], 5)
    demo.wait_for_iteration(before + 20)
    after = [event for event in demo.events("steps_done") if event["time"] > cut_at]
    waited = max(seconds for event in after for seconds in event["step_seconds"])
    assert waited > 4 or {event["attempt"] for event in after} == {0, 1}, "nothing felt the cut"


def test_a_host_that_dies_is_replaced(cluster: ClusterOfHosts, demo: Job) -> None:
    cluster.workers.pop().kill()
    attempts = {event["attempt"] for event in demo.events("worker_started")}
    before = demo.iterations()
    cluster.add_worker("three", 13)
    demo.wait_for_iteration(before + 10)
    new = [event for event in demo.events("worker_started") if event["attempt"] not in attempts]
    assert {event["host"] for event in new} == {"10.77.0.11", "10.77.0.13"}


def test_it_comes_to_its_target_and_its_log_says_so(demo: Job) -> None:
    assert demo.wait() == 0, demo.output[-4000:]
    assert "succeeded" in demo.output
    assert "\x1b[2K" not in demo.output and "it/s" not in demo.output  # plain lines, no bars
    (trial,) = demo.trials()
    assert (trial["status"], trial["world_size"], trial["num_nodes"]) == ("FINISHED", 4, 2)
    assert trial["scored_box_ap"] >= TARGET and trial["scored_mask_ap"] >= TARGET
    assert trial["num_restarts"] >= 1 and trial["downtime_seconds"] > 0


def test_a_stopped_job_ends_cleanly(cluster: ClusterOfHosts) -> None:
    """`ray job stop`: a last checkpoint, no worker left behind."""
    long = {"kind": "throughput", "iterations": 2000, "warmup_iterations": 2}
    job = cluster.submit("stopped", tiny_experiment(trials={"world_sizes": [4], "scaling": "strong"}, protocol=long))
    job.wait_for_iteration(10)
    cluster.laptop.check(f"ray job stop --address {JOB_SERVER} stopped")
    assert "was stopped" in cluster.laptop.check(f"ray job status --address {JOB_SERVER} stopped")
    job.wait()
    assert "keeps results, events and checkpoints" in job.output, "it was killed at the end of its grace time"
    (trial,) = job.trials()
    assert trial["status"] == "KILLED" and 10 <= trial["iterations"] < 2000
    last = max(event["iteration"] for event in job.events("checkpoint_saved"))
    assert last == trial["iterations"]
    for host in cluster.workers:
        wait_for(lambda host=host: "RayTrainWorker" not in host.check("ps axww"))  # type: ignore[misc]


def test_their_runs_are_in_the_database_and_their_artifacts_on_the_server(cluster: ClusterOfHosts, demo: Job) -> None:
    runs, stopped = cluster.tracked("demo", "stopped")
    parent = next(run for run in runs if run["tags"]["kind"] == "experiment")
    child = next(run for run in runs if run["tags"]["kind"] == "trial")
    assert {run["status"] for run in runs} == {"FINISHED"}
    assert {run["status"] for run in stopped} == {"KILLED"} and len(stopped) == 2
    assert (parent["tags"]["run.ray_job_id"], parent["tags"]["run.git_commit"]) == ("demo", "c0ffee")
    assert parent["tags"]["run.ray_job.submitted_by"] == "tests"
    assert (child["tags"]["num_nodes"], child["params"]["plan.num_nodes"]) == ("2", "2")
    assert {"result.json", "config.yaml", "log.txt"} <= set(child["artifacts"]) and all(child["artifacts"].values())
    assert "report.md" in parent["artifacts"]
    for number in (11, 12, 13):
        assert f"system/10.77.0.{number}/cpu_utilization_percentage" in child["metrics"], "system metrics of every host"


def test_a_host_without_the_storage_mount_is_named_before_anything_starts(cluster: ClusterOfHosts) -> None:
    host = cluster.add_worker("bare", 14, mounted=False)
    job = cluster.submit("unmounted", tiny_experiment(trials={"world_sizes": [4], "scaling": "strong"}))
    assert job.wait() != 0
    assert "storage_not_shared" in job.output or "not shared" in job.output, job.output[-4000:]
    assert "bare" in job.output and not job.events("trial_started")
    assert "exit code 2" in job.output, job.output[-1500:]
    cluster.workers.remove(host)
    host.kill()


def test_nobody_gets_in_without_the_token(cluster: ClusterOfHosts) -> None:
    stranger = cluster.network.add("stranger", 30, None, "")
    listed = f"ray job list --address {JOB_SERVER}"
    assert stranger.run(listed).returncode != 0
    wrong = stranger.run(listed, RAY_AUTH_TOKEN="0" * 64)
    assert wrong.returncode != 0 and "stopped" not in wrong.stdout
    assert "stopped" in stranger.check(listed, RAY_AUTH_TOKEN=cluster.token)
    run = f"cd {ROOT} && timeout 500 python -m orchestrator.run --preflight --set resources.address=10.77.0.10:6379"
    run += " --set storage.path=/tmp/r --set tracking.uri=sqlite:////tmp/mlflow.db"
    refused = stranger.run(run, RAY_AUTH_TOKEN="0" * 64)
    assert refused.returncode == 2, refused.stdout
    assert "cannot be joined" in refused.stdout and "Traceback" not in refused.stdout
    stranger.kill()


@pytest.mark.parametrize(
    ("address", "home", "message"),
    [
        ("http://10.77.0.5:5000", "/tmp/nobody", "asks for user and password"),
        ("http://admin:wrong@10.77.0.5:5000", "/tmp/home", "refuses the user admin"),
        ("http://other.internal:5000", "/tmp/home", "does not answer to the name other.internal"),
        ("http://10.77.0.5:5999", "/tmp/home", "no MLflow server answers"),
    ],
)
def test_a_tracking_server_that_cannot_be_used_is_said_to_be_so(
    cluster: ClusterOfHosts, address: str, home: str, message: str
) -> None:
    run = f"cd {ROOT} && python -m orchestrator.run --preflight --set tracking.uri={address} --set storage.path=/tmp/r"
    done = cluster.head.run(run, HOME=home)
    assert done.returncode == 2, done.stdout
    assert message in " ".join(done.stdout.split()), done.stdout
    assert "wrong" not in done.stdout


def test_a_name_that_is_allowed_is_answered(cluster: ClusterOfHosts) -> None:
    user, password = re.findall(r"= (\S+)", cluster.credentials)
    url = "http://mlflow.internal:5000/api/2.0/mlflow/experiments/search?max_results=1"
    assert "experiments" in cluster.laptop.check(f"curl --silent --fail --user '{user}:{password}' '{url}'")
