"""Scenes on several hosts: what a real cluster does to a run, each seen from outside it."""

import re

import pytest

from tests.cluster.conftest import JOB_SERVER, ClusterOfHosts
from tests.conftest import ROOT

pytestmark = pytest.mark.cluster

LONG = {"protocol": {"kind": "throughput", "iterations": 60, "warmup_iterations": 2}}
"""Long enough for something to happen in the middle."""


def test_a_job_from_a_laptop_trains_on_two_hosts_and_is_tracked(cluster: ClusterOfHosts) -> None:
    job = cluster.submit("two_hosts")
    assert job.wait() == 0, job.output[-4000:]
    assert "succeeded" in job.output
    assert "\x1b[2K" not in job.output and "it/s" not in job.output  # plain lines, no bars
    (trial,) = job.trials()
    assert (trial["status"], trial["world_size"], trial["num_nodes"]) == ("FINISHED", 4, 2)
    started = sorted(job.events("worker_started"), key=lambda event: event["rank"])
    hosts = [event["host"] for event in started]
    assert hosts[0] == hosts[1] != hosts[2] == hosts[3], "ranks of a host are neighbours"
    assert [event["local_rank"] for event in started] == [0, 1, 0, 1]
    # Evaluation has gathered from both hosts.
    assert [each["iteration"] for each in trial["evaluations"]] == [4, 8]
    runs = cluster.tracked("two_hosts")
    parent = next(run for run in runs if run["tags"]["kind"] == "experiment")
    child = next(run for run in runs if run["tags"]["kind"] == "trial")
    assert {run["status"] for run in runs} == {"FINISHED"}
    assert (parent["tags"]["run.ray_job_id"], parent["tags"]["run.git_commit"]) == ("two_hosts", "c0ffee")
    assert parent["tags"]["run.ray_job.submitted_by"] == "tests"
    assert (child["tags"]["num_nodes"], child["params"]["plan.num_nodes"]) == ("2", "2")
    assert {"result.json", "config.yaml", "log.txt"} <= set(child["artifacts"]) and all(child["artifacts"].values())
    assert "report.md" in parent["artifacts"]
    for host in set(hosts):
        assert f"system/{host}/cpu_utilization_percentage" in child["metrics"], "system metrics of every host"


def test_no_worker_holds_credentials(cluster: ClusterOfHosts) -> None:
    job = cluster.submit("secrets", **LONG)
    job.wait_for_iteration(2)
    (password,) = re.findall(r"password = (\S+)", cluster.credentials)
    looked = 0
    for host in cluster.workers:
        everything = host.check("cat /proc/[0-9]*/environ | tr '\\0' '\\n'; ls ~/.mlflow 2>&1 || true")
        assert "RAY_JOB_ID" in everything or "ray" in everything
        assert password not in everything and "MLFLOW_TRACKING_PASSWORD" not in everything
        looked += 1
    assert looked == 2
    assert password not in "".join(path.read_text() for path in job.run_dir.glob("*.json*"))
    cluster.laptop.check(f"ray job stop --address {JOB_SERVER} secrets")
    # The next scene is this job's end.


def test_a_stopped_job_ends_cleanly(cluster: ClusterOfHosts) -> None:
    """`ray job stop`, of the job before: a last checkpoint, a run marked KILLED, nothing left behind."""
    status = cluster.laptop.check(f"ray job status --address {JOB_SERVER} secrets")
    assert "STOPPED" in status
    run_dir = cluster.shared / "runs" / "secrets"
    (trial_dir,) = [path for path in run_dir.iterdir() if (path / "checkpoints").is_dir()]
    assert list((trial_dir / "checkpoints").iterdir())
    assert '"status": "KILLED"' in (run_dir / "results.json").read_text()
    assert {run["status"] for run in cluster.tracked("secrets")} == {"KILLED"}
    for host in cluster.workers:
        assert "RayTrainWorker" not in host.check("ps axww")


def test_a_link_that_is_cut_for_seconds_is_survived(cluster: ClusterOfHosts) -> None:
    job = cluster.submit("cut", **LONG)
    job.wait_for_iteration(6)
    cluster.network.cut(cluster.workers[0], 5)
    assert job.wait() == 0, job.output[-4000:]
    (trial,) = job.trials()
    assert (trial["status"], trial["iterations"], trial["num_nodes"]) == ("FINISHED", 60, 2)


def test_a_host_that_dies_is_replaced(cluster: ClusterOfHosts) -> None:
    job = cluster.submit("lost", **LONG)
    job.wait_for_iteration(10)
    cluster.workers.pop().kill()
    cluster.add_worker("three", 13)
    assert job.wait(300) == 0, job.output[-4000:]
    (trial,) = job.trials()
    assert (trial["status"], trial["iterations"], trial["num_nodes"]) == ("FINISHED", 60, 2)
    assert trial["num_restarts"] >= 1 and trial["downtime_seconds"] > 0
    hosts = {event["host"] for event in job.events("worker_started") if event["attempt"] == trial["num_restarts"]}
    assert hosts == {"10.77.0.11", "10.77.0.13"}


def test_a_host_without_the_storage_mount_is_named_before_anything_starts(cluster: ClusterOfHosts) -> None:
    host = cluster.add_worker("bare", 14, mounted=False)
    job = cluster.submit("unmounted")
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
    assert wrong.returncode != 0 and "secrets" not in wrong.stdout
    run = f"cd {ROOT} && timeout 60 python -m orchestrator.run --preflight --set resources.address=10.77.0.10:6379"
    refused = stranger.run(run, RAY_AUTH_TOKEN="0" * 64)
    assert refused.returncode == 2, refused.stdout
    assert "cannot be joined" in refused.stdout and "Traceback" not in refused.stdout
    stranger.kill()


@pytest.mark.parametrize(
    ("address", "home", "told"),
    [
        ("http://10.77.0.5:5000", "/tmp/nobody", "asks for user and password"),  # noqa: S108
        ("http://admin:wrong@10.77.0.5:5000", "/tmp/home", "refuses the user admin"),  # noqa: S108
        ("http://other.internal:5000", "/tmp/home", "does not answer to the name other.internal"),  # noqa: S108
        ("http://10.77.0.5:5999", "/tmp/home", "no MLflow server answers"),  # noqa: S108
    ],
)
def test_a_tracking_server_that_cannot_be_used_is_said_to_be_so(
    cluster: ClusterOfHosts, address: str, home: str, told: str
) -> None:
    run = f"cd {ROOT} && python -m orchestrator.run --preflight --set tracking.uri={address} --set storage.path=/tmp/r"
    done = cluster.head.run(run, HOME=home)
    assert done.returncode == 2, done.stdout
    assert told in " ".join(done.stdout.split()), done.stdout
    assert "wrong" not in done.stdout.replace("wrong@", "") or address.count("wrong") == 0
    assert ":wrong@" not in done.stdout


def test_a_name_that_is_allowed_is_answered(cluster: ClusterOfHosts) -> None:
    user, password = re.findall(r"= (\S+)", cluster.credentials)
    url = "http://mlflow.internal:5000/api/2.0/mlflow/experiments/search?max_results=1"
    assert "experiments" in cluster.laptop.check(f"curl --silent --fail --user '{user}:{password}' '{url}'")
