"""A cluster of several hosts: head, two worker hosts, a tracking server on PostgreSQL, and a laptop that sends jobs."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.builders.commands import ROOT
from tests.builders.hosts import SHARED, Host, Network
from tests.builders.waiting import wait_for
from trainers.faults import VARIABLE

TRACKING = "http://10.77.0.5:5000"
JOB_SERVER = "http://10.77.0.10:8265"
HEAD = "--head --port 6379 --node-ip-address 10.77.0.10 --dashboard-host 10.77.0.10 --num-cpus 0"


@dataclass
class Job:
    """A job that was sent, from what it left in the shared folder and what its sender saw."""

    name: str
    cluster: ClusterOfHosts
    sender: subprocess.Popen[str]
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def run_dir(self) -> Path:
        return self.cluster.shared / "runs" / self.name

    def events(self, kind: str) -> list[dict[str, Any]]:
        file = self.run_dir / "events.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in whole if event["kind"] == kind]

    def iterations(self) -> int:
        return max((event["iteration"] for event in self.events("steps_done")), default=0)

    def wait(self, seconds: float = 800) -> int:
        """Waits for the end as `ray job submit` sees it; returns its exit code."""
        try:
            return self.sender.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.name} has not ended within {seconds:g} s:\n{self.output[-3000:]}")

    def wait_for_iteration(self, iteration: int) -> None:
        def reached() -> bool:
            assert self.sender.poll() is None, self.output[-3000:]
            return self.iterations() >= iteration

        wait_for(reached, lambda: self.output[-3000:])

    def trials(self) -> list[dict[str, Any]]:
        trials: list[dict[str, Any]] = json.loads((self.run_dir / "results.json").read_text())["trials"]
        return trials


class ClusterOfHosts:
    """Makes the hosts, starts what runs on them, and sends jobs."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder, self.shared = network, folder, folder / "shared"
        self.shared.mkdir()
        self.token = secrets.token_hex(32)
        self.tracking = network.add("tracking", 5, None)
        self.head = network.add("head", 10, self.shared, self.token)
        self.laptop = network.add("laptop", 20, None, self.token)
        self.workers: list[Host] = []
        log = folder / "mlflow.log"
        options = "--home /tmp/mlflow --host 10.77.0.5 --workers 1 --allowed-host mlflow.internal"
        self.tracking.start(f"cd {ROOT} && python -m cluster.mlflow_server {options}", log)
        self.head.check(f"ray start {HEAD}", MLFLOW_TRACKING_URI=TRACKING)
        for name, number in (("one", 11), ("two", 12)):
            self.add_worker(name, number)
        up = "curl --silent --fail --max-time 30 http://10.77.0.5:5000/health"
        wait_for(lambda: self.tracking.run(up).returncode == 0, log.read_text)
        self.credentials = self.tracking.check("cat ~/.mlflow/credentials")
        self.head.check(f"umask 077; mkdir ~/.mlflow && echo '{self.credentials}' > ~/.mlflow/credentials")

    def add_worker(self, name: str, number: int, *, mounted: bool = True) -> Host:
        """A further host of two CPUs, whose workers look for faults in the shared folder."""
        host = self.network.add(name, number, self.shared if mounted else None, self.token)
        join = f"ray start --address 10.77.0.10:6379 --node-ip-address {host.address} --num-cpus 2"
        host.check(join, **{VARIABLE: f"{SHARED}/faults.json"})
        self.workers.append(host)
        return host

    def submit(self, name: str, values: dict[str, Any], options: str = "", *, start: int = 1) -> Job:
        """Sends an experiment from the laptop, as docs/cluster.md says; it runs on two hosts where it names none."""
        values["name"], job = name, f"{name}-{start}" if start > 1 else name  # Ray takes no id twice
        values["resources"] = {"num_nodes": 2, **values["resources"]}
        values["storage"] |= {"path": f"{SHARED}/runs"}
        (self.shared / f"{name}.yaml").write_text(yaml.safe_dump(values))
        log = self.folder / f"{job}.log"
        run = f"exec python -m orchestrator.run {SHARED}/{name}.yaml --output {SHARED}/runs/{name} {options}"
        metadata = json.dumps({"git_commit": "c0ffee", "submitted_by": "tests"})
        sender = self.laptop.start(
            f"cd {ROOT} && ray job submit --address {JOB_SERVER} --submission-id {job} --working-dir . "
            f"--runtime-env cluster/job.yaml --metadata-json '{metadata}' -- {run}",
            log,
        )
        return Job(name, self, sender, log)

    def tracked(self, *names: str) -> list[list[dict[str, Any]]]:
        """The runs of each of some experiments, with the sizes of their artifacts, asked for from the laptop."""
        user, password = re.findall(r"= (\S+)", self.credentials)
        found = self.laptop.check(
            f"python {Path(__file__).with_name('ask_mlflow.py')} {' '.join(names)}",
            MLFLOW_TRACKING_URI=TRACKING,
            MLFLOW_TRACKING_USERNAME=user,
            MLFLOW_TRACKING_PASSWORD=password,
        )
        runs: list[list[dict[str, Any]]] = json.loads(found.splitlines()[-1])
        return runs
