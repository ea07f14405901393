"""Three worker hosts and a head, of which one is slowed: its CPUs by a quota, its cable by a token bucket, its disk."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.builders.commands import ROOT
from tests.builders.experiments import tiny_experiment, write_experiment
from tests.builders.hosts import SHARED, Host, Network

NAMES = ("one", "two", "three")
CGROUPS = Path("/sys/fs/cgroup")
QUOTA_PERCENT = 25
"""Of one CPU, for a host that Ray takes to have two."""
LINK_MEGABITS = 100
DISK_BYTES_PER_SECOND = 20 * 2**20


class MeasuredHosts:
    """A Ray cluster of three hosts with two CPUs each; the head has none."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.folder, self.shared, self.root = folder, folder / "shared", ROOT
        self.shared.mkdir()
        token = secrets.token_hex(32)
        self.head = network.add("head", 10, self.shared, token)
        self.head.check(
            "ray start --head --port 6379 --node-ip-address 10.77.0.10 --num-cpus 0 --include-dashboard false"
        )
        self.hosts: dict[str, Host] = {}
        for number, name in enumerate(NAMES, 11):
            host = self.hosts[name] = network.add(name, number, self.shared, token)
            host.check(f"ray start --address 10.77.0.10:6379 --node-ip-address {host.address} --num-cpus 2")
        values = tiny_experiment(
            name="measured",
            trials={"world_sizes": [2], "scaling": "strong"},
            resources={"device": "cpu", "cpus_per_worker": 1, "num_nodes": 2, "address": "10.77.0.10:6379"},
            storage={"path": f"{SHARED}/runs"},
            tracking={"uri": f"sqlite:///{SHARED}/mlflow.db"},
        )
        write_experiment(self.shared, values)

    def accept(self, *options: str) -> tuple[int, dict[str, Any], str]:
        """Runs the command on the head; returns its exit code, its document, and what else it printed."""
        words = " ".join(options)
        command = f"cd {ROOT} && python -m orchestrator.accept {SHARED}/measured.yaml --short --json {words}"
        done = self.head.run(f"{command} > /tmp/out.json", timeout=900)
        text = self.head.check("cat /tmp/out.json")
        return done.returncode, json.loads(text) if text.strip() else {}, done.stdout

    def slow_cable(self, name: str) -> None:
        """What the host sends goes through a token bucket."""
        limit = f"rate {LINK_MEGABITS}mbit burst 64kb latency 500ms"
        self.hosts[name].namespace.run(f"tc qdisc add dev eth0 root tbf {limit}")

    def repair_cable(self, name: str) -> None:
        self.hosts[name].namespace.run("tc qdisc del dev eth0 root")

    @contextmanager
    def few_cpus(self, name: str) -> Iterator[None]:
        """All processes of a host share a quota of CPU time."""
        if (CGROUPS / "cpu").is_dir():
            group, files = (
                CGROUPS / "cpu" / f"slow-{name}-{os.getpid()}",
                {"cpu.cfs_quota_us": f"{QUOTA_PERCENT * 1000}"},
            )
        else:
            group, files = CGROUPS / f"slow-{name}-{os.getpid()}", {"cpu.max": f"{QUOTA_PERCENT * 1000} 100000"}
        with self._limited(name, group, files):
            yield

    @contextmanager
    def slow_disk(self, name: str) -> Iterator[None]:
        """What a host reads from the disk of the shared folder and writes to it is limited."""
        device = self.shared.stat().st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        rate = DISK_BYTES_PER_SECOND
        if (CGROUPS / "blkio").is_dir():
            group = CGROUPS / "blkio" / f"slow-{name}-{os.getpid()}"
            files = {f"blkio.throttle.{way}_bps_device": f"{number} {rate}" for way in ("read", "write")}
        else:
            group, files = CGROUPS / f"slow-{name}-{os.getpid()}", {"io.max": f"{number} rbps={rate} wbps={rate}"}
        with self._limited(name, group, files):
            yield

    @contextmanager
    def _limited(self, name: str, group: Path, files: dict[str, str]) -> Iterator[None]:
        """Puts all processes of a host into a control group with limits; OSError where none can be made here."""
        group.mkdir()
        try:
            for file, text in files.items():
                (group / file).write_text(text)
            for pid in _processes_of(self.hosts[name]):
                with suppress(ProcessLookupError):  # it has just ended
                    (group / "cgroup.procs").write_text(str(pid))
            yield
        finally:
            for left in (group / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    (group.parent / "cgroup.procs").write_text(left)
            group.rmdir()


def _processes_of(host: Host) -> list[int]:
    """All processes in a host's namespace of processes; those they start later are in their control groups."""
    namespace = Path(f"/proc/{host.pid}/ns/pid").readlink()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "ns/pid").readlink() == namespace:
                found.append(int(folder.name))
        except OSError:
            continue  # it has just ended
    return found
