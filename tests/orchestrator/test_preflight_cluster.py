"""What is wrong with a cluster is reported per node, and compared with what the trials need, before they start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from orchestrator.data.generate import generate
from orchestrator.execution import nodes
from orchestrator.execution.nodes import Node
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from orchestrator.preflight import cluster as preflight
from orchestrator.preflight.cluster import (
    check_communication,
    check_exclusion,
    check_standby,
    check_token,
)
from orchestrator.preflight.fit import check_fit, needs_several_hosts
from tests.builders.bad_input import base_experiment

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 2**30


def trials(*world_sizes: int, device: str = "cuda", cpus: int = 4, num_nodes: int | None = None) -> list[Any]:
    values = base_experiment(Path("/data"))
    values["trials"]["world_sizes"] = list(world_sizes)
    values["model"]["overrides"]["SOLVER.IMS_PER_BATCH"] = 48
    values["resources"] = {"device": device, "cpus_per_worker": cpus, "num_nodes": num_nodes, "loader_workers": 0}
    return expand(parse_experiment(values, "test"), Hardware(), "/runs/x", Path("/data"))


def node(host: str, gpus: int, cpus: int, address: str = "127.0.0.1") -> Node:
    return Node(id=host, host=host, address=address, num_gpus=gpus, num_cpus=cpus)


def test_workers_that_fit_are_no_finding() -> None:
    assert check_fit([node("a", 8, 32)], trials(1, 8)) == []
    assert check_fit([node("a", 4, 16), node("b", 4, 16)], trials(8, num_nodes=2)) == []


@pytest.mark.parametrize(("device", "standby", "refused"), [("cuda", True, 1), ("cuda", "auto", 0), ("cpu", True, 0)])
def test_workers_that_wait_for_a_failure_are_refused_on_gpus(device: str, standby: bool | str, refused: int) -> None:
    values = base_experiment(Path("/data")) | {"faults": {"standby": standby}, "protocol": {"iterations": 4}}
    findings = check_standby(parse_experiment(values, "test"), trials(2, device=device))
    assert [finding.code for finding in findings] == ["standby_on_gpus"] * refused


def test_leaving_out_slow_nodes_is_without_effect_where_there_is_one() -> None:
    values = base_experiment(Path("/data")) | {"resources": {"exclude_slow_nodes": True}}
    experiment = parse_experiment(values, "test")
    (finding,) = check_exclusion(experiment, trials(2), [node("a", 4, 16)])
    assert (finding.level, finding.code) == ("warning", "config_unused")
    assert not check_exclusion(experiment, trials(2), [node("a", 4, 16), node("b", 4, 16)])


def test_too_few_gpus_are_compared_with_what_each_host_has() -> None:
    (finding,) = check_fit([node("a", 2, 32), node("b", 1, 32)], trials(2, 8))
    assert (finding.level, finding.code, finding.id) == ("error", "too_few_gpus", "trial reference-8xcuda")
    assert "8 workers of 1 GPU and 4 CPUs" in finding.what and "takes 3" in finding.what
    assert "a (2 GPUs, 32 CPUs) takes 2; b (1 GPUs, 32 CPUs) takes 1" in finding.what


def test_gpus_that_the_cpus_cannot_feed_do_not_count() -> None:
    (finding,) = check_fit([node("a", 8, 8)], trials(8))
    assert "a (8 GPUs, 8 CPUs) takes 2" in finding.what and "cpus_per_worker" in finding.hint


def test_workers_must_pack_evenly_onto_the_hosts_asked_for() -> None:
    (finding,) = check_fit([node("a", 6, 64), node("b", 2, 64)], trials(8, num_nodes=2))
    assert "2 hosts with 4 workers" in finding.what and "1 have room" in finding.what


def test_cpu_trials_are_counted_by_cpus() -> None:
    assert check_fit([node("a", 0, 4)], trials(4, device="cpu", cpus=1)) == []
    (finding,) = check_fit([node("a", 0, 4)], trials(6, device="cpu", cpus=1))
    assert finding.code == "too_few_cpus"


def evaluated_on(number: int, kind: str, *given: Any, **options: Any) -> list[Any]:
    return [replace(trial, **{f"evaluation_{kind}": number}) for trial in trials(*given, **options)]


def test_what_evaluations_reserve_must_fit_next_to_the_workers() -> None:
    assert check_fit([node("a", 8, 32)], evaluated_on(2, "gpus", 6)) == []
    assert check_fit([node("a", 4, 16), node("b", 1, 4)], evaluated_on(1, "gpus", 4)) == []
    (finding,) = check_fit([node("a", 8, 32)], evaluated_on(1, "gpus", 8))
    assert (finding.code, finding.file) == ("too_few_gpus", "resources.evaluation")
    assert "leave too little for evaluations on 1 GPUs: a (8 GPUs, 32 CPUs)" in finding.what
    assert check_fit([node("a", 0, 4)], evaluated_on(2, "cpus", 2, device="cpu", cpus=1)) == []
    (finding,) = check_fit([node("a", 0, 4), node("b", 0, 1)], evaluated_on(2, "cpus", 3, device="cpu", cpus=1))
    assert finding.code == "too_few_cpus"  # one is left on each


def test_a_trial_needs_several_hosts_where_none_holds_all_its_workers() -> None:
    (trial,) = trials(4, device="cpu", cpus=1)
    assert needs_several_hosts(trial, [node("a", 0, 2), node("b", 0, 2)])
    assert not needs_several_hosts(trial, [node("a", 0, 4), node("b", 0, 4)])


class Group:
    """A stand-in for Ray's placement groups; `busy` are the hosts that another job keeps."""

    busy: ClassVar[set[str]] = set()
    kept: ClassVar[list[Group]] = []

    def __init__(self, bundles: list[dict[str, float]], *, bundle_label_selector: list[dict[str, str]]) -> None:
        assert bundles == [{"GPU": 1.0}]
        (selector,) = bundle_label_selector
        self.host = selector["ray.io/node-id"]
        self.kept.append(self)

    def state(self) -> dict[str, str]:
        return {"state": "PENDING" if self.host in self.busy else "CREATED"}


@pytest.mark.parametrize(
    ("busy", "num_nodes", "met"),
    [("", None, "abcd"), ("a", None, "bcd"), ("a", 2, "bc"), ("abc", None, ""), ("abcd", 2, "")],
)
def test_hosts_whose_gpus_another_job_uses_need_not_answer(
    monkeypatch: pytest.MonkeyPatch, busy: str, num_nodes: int | None, met: str
) -> None:
    def all_reduce(hosts: list[Node], device: str, timeout: float) -> None:
        assert not Group.kept and device == "cuda"
        asked.extend(host.host for host in hosts)

    asked: list[str] = []
    monkeypatch.setattr(Group, "busy", set(busy))
    monkeypatch.setattr(nodes, "placement_group", Group)
    monkeypatch.setattr(nodes, "placement_group_table", Group.state)
    monkeypatch.setattr(nodes, "remove_placement_group", Group.kept.remove)
    monkeypatch.setattr(nodes, "RESERVE_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(preflight, "all_reduce_failure", all_reduce)
    hosts = [node(name, 8, 64) for name in "abcd"]
    findings = check_communication(trials(16, num_nodes=num_nodes), hosts)
    assert asked == list(met)
    assert [(finding.level, finding.code) for finding in findings] == [("warning", "canary_left_out")] * (not met)
    assert all("their GPUs are in use" in finding.what for finding in findings)


def test_an_open_cluster_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reachable = [node("a", 1, 1, "10.0.0.1"), node("b", 1, 1, "10.0.0.2")]
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    (finding,) = check_token(reachable)
    assert finding.level == "error" and "10.0.0.1, 10.0.0.2" in finding.what
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert [found.level for found in check_token(reachable)] == ["warning"]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert check_token(reachable) == []


def test_a_cluster_on_loopback_needs_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert check_token([node("a", 1, 1, "127.0.0.2"), node("b", 1, 1, "127.0.0.3")]) == []


SCRIPT = """
import dataclasses, json, os, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from orchestrator.acceptance import cluster as acceptance
from orchestrator.execution.nodes import list_nodes
from orchestrator.preflight import cluster as preflight
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment

values, folder = json.loads(sys.argv[1]), sys.argv[2]
cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 1, "node_ip_address": "127.0.0.2", "include_dashboard": False}
)
cluster.add_node(num_cpus=1, node_ip_address="127.0.0.3")
ray.init(address=cluster.address, log_to_driver=False)
os.environ["RAY_ADDRESS"] = cluster.address
found = {}
# Each answer and the all-reduce start a process that imports torch, which takes a busy machine long.
preflight.NODE_TIMEOUT_SECONDS = preflight.CANARY_TIMEOUT_SECONDS = acceptance.START_TIMEOUT_SECONDS = 600.0

def check(name, **changes):
    experiment = parse_experiment({**values, **changes}, "test")
    plans = expand(experiment, Hardware(num_cpus=2), folder + "/runs/x", Path(folder))
    found[name] = [[f.level, f.code, f.id, f.what] for f in preflight.preflight_cluster(experiment, plans)]
    return plans

two = {"world_sizes": [2], "scaling": "strong"}
plans = check("fits", trials=two, resources={"device": "cpu", "cpus_per_worker": 1, "num_nodes": 2})
check("too many", trials={**two, "world_sizes": [8]})
nodes = list_nodes()
found["hosts"] = sorted(node.address for node in nodes)
preflight.CANARY_TIMEOUT_SECONDS = 8.0
cut_off = [dataclasses.replace(nodes[0], address="192.0.2.1"), nodes[1]]
found["cut off"] = [[f.level, f.code, f.id, f.what] for f in preflight.check_communication(plans, cut_off)]
values["storage"] = {"keep_checkpoints": 10**7}
check("no room")
print(json.dumps(found))
ray.shutdown()
cluster.shutdown()
"""


def test_two_real_nodes_are_asked_and_made_to_talk(tmp_path: Path) -> None:
    generate(tmp_path / "data", num_train=4, num_val=2, size=32)
    values = base_experiment(tmp_path / "data")
    values["model"]["overrides"]["SOLVER.IMS_PER_BATCH"] = 8
    before = sorted(path.name for path in tmp_path.iterdir())
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    # Ray's sockets need a short path; the token belongs to whoever runs the tests, not to this cluster on loopback.
    environment |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(values), str(tmp_path)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=840, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["hosts"] == ["127.0.0.2", "127.0.0.3"]
    assert found["fits"] == []
    assert [finding[:2] for finding in found["too many"]] == [["error", "too_few_cpus"]]
    assert [finding[:2] for finding in found["cut off"]] == [["error", "canary_failed"]]
    assert {(code, place.split()[0]) for _, code, place, _ in found["no room"]} == {("storage_small", "host")}
    assert "and 1 more like this: host" in found["no room"][0][3]
    assert sorted(path.name for path in tmp_path.iterdir()) == before
