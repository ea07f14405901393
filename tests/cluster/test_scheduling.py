"""Where the workers of 1 to 32 GPUs go on four hosts of eight: equally many on each, ranks of a host together."""

import dataclasses
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from subprocess import PIPE
from typing import Any

import pytest

from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment
from tests.builders.waiting import wait_for

OTHER_JOB = """
import sys, ray
from ray.util.placement_group import placement_group, placement_group_table
ray.init(address=sys.argv[1], log_to_driver=False)
elsewhere = "!in(" + ray.get_runtime_context().get_node_id() + ")"
group = placement_group([{"CPU": 1}], bundle_label_selector=[{"ray.io/node-id": elsewhere}])
group.wait(300)
print(*placement_group_table(group)["bundles_to_node_id"].values(), flush=True)
sys.stdin.read()
"""

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]


def plans(tmp: Any, *world_sizes: int, num_nodes: int | None = None) -> list[Any]:
    values = tiny_experiment(
        trials={"world_sizes": list(world_sizes), "scaling": "weak", "reference_world_size": 1},
        resources={"device": "cuda", "num_nodes": num_nodes},
        # Iterations are divided by the world size: 32 workers have 8 left.
        model={"weights": "", "overrides": {**TINY_OVERRIDES, "SOLVER.MAX_ITER": 256, "SOLVER.STEPS": [192]}},
    )
    hardware = Hardware(num_gpus=32, num_cpus=384)
    return expand(parse_experiment(values, "test"), hardware, str(tmp), tmp)


@pytest.fixture
def four_hosts_of_eight(cluster_of_eights: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The cluster, when what the test before took has been given back: that takes a moment."""
    monkeypatch.setattr("orchestrator.execution.nodes._held", {})
    wait_for(lambda: cluster_of_eights.available_resources().get("GPU") == 32)
    return cluster_of_eights


@pytest.fixture(scope="module")
def cluster_of_eights() -> Iterator[Any]:
    """A CPU head and four nodes that say they have 8 GPUs, with addresses of their own."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setattr("orchestrator.execution.nodes.RESERVE_TIMEOUT_SECONDS", 600.0)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for number in range(2, 6):
                cluster.add_node(num_cpus=96, num_gpus=8, node_ip_address=f"127.0.0.{number}", wait=False)
            ray.init(address=cluster.address, log_to_driver=False)
            cluster.wait_for_nodes(timeout=300)
            yield ray
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.mark.parametrize(
    ("world_size", "num_nodes", "shares"),
    [(1, None, [1]), (8, None, [8]), (16, None, [8, 8]), (32, None, [8, 8, 8, 8]), (8, 4, [2, 2, 2, 2])],
)
def test_the_scheduler_puts_workers_where_the_plan_does(
    four_hosts_of_eight: Any, tmp_path: Any, world_size: int, num_nodes: int | None, shares: list[int]
) -> None:
    """By Ray's own placement of the same bundles: what Ray Train asks for its workers."""
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    from orchestrator.execution.nodes import choose_nodes, list_nodes
    from orchestrator.preflight.cluster import check_fit

    ray = four_hosts_of_eight
    (plan,) = plans(tmp_path, world_size, num_nodes=num_nodes)
    assert plan.cpus_per_worker == 10
    assert check_fit(list_nodes(), [plan]) == []
    nodes = choose_nodes(plan)
    assert nodes is not None
    bundle = {"CPU": plan.cpus_per_worker, "GPU": 1}
    group = placement_group([bundle] * world_size, strategy="PACK", bundle_label_selector=nodes)
    try:
        ray.get(group.ready(), timeout=300)
        placed = placement_group_table(group)["bundles_to_node_id"]
        assert [placed[index] for index in range(world_size)] == [node["ray.io/node-id"] for node in nodes]
        assert sorted(Counter(placed.values()).values()) == shares
    finally:
        remove_placement_group(group)


def test_what_does_not_spread_equally_is_refused(four_hosts_of_eight: Any, tmp_path: Any) -> None:
    from orchestrator.execution.nodes import choose_nodes, list_nodes, release_nodes
    from orchestrator.preflight.cluster import check_fit

    for world_size, code in ((9, None), (20, None), (28, None), (31, "uneven_nodes"), (33, "too_few_gpus")):
        (plan,) = plans(tmp_path, world_size)
        findings = check_fit(list_nodes(), [plan])
        assert [finding.code for finding in findings] == ([code] if code else []), world_size
        assert (choose_nodes(plan) is None) == bool(code)
        release_nodes(plan.name)


def test_hosts_that_another_job_has_taken_are_not_chosen(four_hosts_of_eight: Any, tmp_path: Any) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    from orchestrator.execution.nodes import choose_nodes

    ray = four_hosts_of_eight
    (plan,) = plans(tmp_path, 16)
    nodes = choose_nodes(plan)
    assert nodes is not None
    taken = placement_group([{"GPU": 8}], bundle_label_selector=[nodes[0]])
    try:
        ray.get(taken.ready(), timeout=300)
        others = choose_nodes(plan)
        assert others is not None and nodes[0] not in others and len(others) == 16
    finally:
        remove_placement_group(taken)


def test_trials_side_by_side_get_hosts_of_their_own(four_hosts_of_eight: Any, tmp_path: Any) -> None:
    from orchestrator.execution import nodes

    seeds = [dataclasses.replace(plan, name=name) for name in "abcde" for plan in plans(tmp_path, 8)]
    own = [dataclasses.replace(plan, own_nodes=True) for plan in seeds]
    assert nodes.choose_nodes(own[0]) is not None
    assert all(nodes.fits_next_to(plan, "abcd"[:number]) for number, plan in enumerate(own[1:4], start=1))
    found = [nodes.choose_nodes(plan) for plan in own[:4]]  # as after a restart: each has its room still
    assert len({str(selectors) for selectors in found}) == 4
    assert not nodes.fits_next_to(own[4], "abcd")
    nodes.release_nodes("b")
    assert nodes.fits_next_to(own[4], "acd")

    for name in "abcde":
        nodes.release_nodes(name)
    halves = [dataclasses.replace(plan, name=name) for name in "abc" for plan in plans(tmp_path, 4)]
    shared = [nodes.choose_nodes(plan) for plan in halves]
    # Two at most get the same host, although none of them runs yet and Ray has it free.
    counts = Counter(str(selectors[0]) for selectors in shared if selectors)
    assert sum(counts.values()) == 3 and max(counts.values()) <= 2
    assert nodes.choose_nodes(dataclasses.replace(own[4], name="e")) is not None


def test_a_trial_with_hosts_of_its_own_takes_none_that_another_job_uses(
    four_hosts_of_eight: Any, tmp_path: Any, request: Any
) -> None:
    from orchestrator.execution import nodes

    address = four_hosts_of_eight.get_runtime_context().gcs_address
    other = subprocess.Popen([sys.executable, "-c", OTHER_JOB, address], stdin=PIPE, stdout=PIPE, text=True)
    request.addfinalizer(other.communicate)
    assert other.stdout is not None
    taken = other.stdout.readline().strip()
    smaller, whole = (dataclasses.replace(each, name=f"t{each.world_size}") for each in plans(tmp_path, 24, 32))
    chosen = nodes.choose_nodes(dataclasses.replace(smaller, own_nodes=True))
    assert chosen is not None and taken not in str(chosen)
    nodes.release_nodes(smaller.name)
    assert nodes.choose_nodes(dataclasses.replace(whole, own_nodes=True)) is None
    assert nodes.choose_nodes(whole) is not None, "Ray has room enough there"
