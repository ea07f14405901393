"""A node, a GPU or a link that falls behind is named, and healthy ones are not, whatever the size of the cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations, count
from typing import Any

import pytest

from orchestrator.acceptance.document import LinkRecord, NodeRecord, Verdict
from orchestrator.acceptance.judge import judge
from orchestrator.acceptance.measuring import FULL, SHORT, Scope, measure, rounds
from orchestrator.acceptance.outliers import outliers
from orchestrator.acceptance.quantities import QUANTITIES
from orchestrator.execution.nodes import Node
from tests.builders.simulated_cluster import H100, SimulatedCluster
from trainers.contract.acceptance import Measured

SIZES = (2, 3, 4, 5, 8, 16, 64)
DRAWS = 20


def named(verdicts: list[Verdict], level: str = "behind") -> set[tuple[tuple[str, ...], str]]:
    return {(each.hosts, each.key) for each in verdicts if each.level == level}


def accused(cluster: SimulatedCluster, device: Any = "cpu", scope: Any = SHORT) -> set[tuple[tuple[str, ...], str]]:
    return named(measure(cluster, device, scope)[2])


def test_a_value_is_compared_with_the_median_of_all() -> None:
    row = QUANTITIES["decode"]  # may be worse by 35 %
    (found,) = outliers({"a": 100.0, "b": 110.0, "c": 90.0, "d": 40.0}, row)
    assert (found.name, found.value, found.num_peers) == ("d", 40.0, 3)
    assert found.typical == pytest.approx(math.sqrt(90 * 100))
    assert outliers({"a": 100.0, "b": 110.0, "c": 90.0, "d": 70.0}, row) == []
    assert outliers({"a": 100.0}, row) == []


def test_values_that_are_far_apart_anyway_accuse_nobody() -> None:
    # Deviations of the logarithms 0, 0, 0.41, 0.51, 0.69: their median times 1.48 times 5 is more than all of them.
    values = {"a": 200.0, "b": 120.0, "c": 300.0, "d": 100.0, "e": 200.0}
    assert outliers(values, QUANTITIES["decode"]) == []
    # By more than twice the tolerance, a value falls behind all the same.
    assert [each.name for each in outliers({**values, "d": 80.0}, QUANTITIES["decode"])] == ["d"]


def test_less_can_be_better() -> None:
    (found,) = outliers({"a": 50.0, "b": 60.0, "c": 2000.0}, QUANTITIES["latency"])
    assert (found.name, round(found.typical)) == ("c", 60)
    assert outliers({"a": 50.0, "b": 60.0, "c": 1.0}, QUANTITIES["latency"]) == []


def test_of_two_the_worse_one_is_named_where_it_is_much_worse() -> None:
    row = QUANTITIES["decode"]
    assert outliers({"a": 100.0, "b": 60.0}, row) == []  # worse by more than 35 %, but not by half as much again
    (found,) = outliers({"a": 100.0, "b": 40.0}, row)
    assert (found.name, round(found.typical)) == ("b", 100)


def test_cpu_time_is_judged_where_the_peers_are_idle() -> None:
    row = QUANTITIES["cpu_share"]
    assert outliers({"a": 30.0, "b": 25.0, "c": 5.0}, row) == []
    assert [each.name for each in outliers({"a": 98.0, "b": 95.0, "c": 20.0}, row)] == ["c"]


@pytest.mark.parametrize("size", SIZES)
def test_healthy_clusters_raise_no_alarm(size: int) -> None:
    for seed in range(DRAWS):
        assert accused(SimulatedCluster(size, seed)) == set(), f"cluster {seed}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", ["decode", "data_read"])
def test_a_slowed_host_is_found_by_name(size: int, key: str) -> None:
    factor = math.exp(-3 * QUANTITIES[key].tolerance)
    found = 0
    for seed in range(DRAWS):
        host = f"n{seed % size}"
        found += accused(SimulatedCluster(size, seed, factors={(host, key): factor})) == {((host,), key)}
    assert found >= 19


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_host_with_a_slow_cable_is_found_by_name(size: int) -> None:
    found = 0
    for seed in range(DRAWS):
        host = f"n{seed % size}"
        found += accused(SimulatedCluster(size, seed, factors={(host, "all_reduce"): 0.05})) == {
            ((host,), "all_reduce")
        }
    assert found >= 19


@pytest.mark.parametrize("size", SIZES[1:-1])
def test_a_slow_link_between_two_good_hosts_is_located(size: int) -> None:
    for seed in range(5):
        pair = ("n0", f"n{1 + seed % (size - 1)}")
        factors = {(*pair, "all_reduce"): 0.02, (*pair[::-1], "all_reduce"): 0.02}
        (hosts, key), *others = accused(SimulatedCluster(size, seed, factors=factors), scope=FULL)
        assert (set(hosts), key, others) == (set(pair), "all_reduce", [])


@pytest.mark.parametrize(("device", "num_gpus"), [("cpu", 0), ("cuda", 8)])
@pytest.mark.parametrize("scope", [SHORT, FULL])
def test_of_two_hosts_only_the_link_can_be_slow_and_is_measured_against_gigabit_ethernet(
    device: str, num_gpus: int, scope: Scope
) -> None:
    good = SimulatedCluster(2, 0, num_gpus, {("n1", "all_reduce"): 0.2})
    assert accused(good, device, scope) == set()
    slow = SimulatedCluster(2, 0, num_gpus, {("n1", "all_reduce"): 0.01})
    ((hosts, key),) = accused(slow, device, scope)
    assert (set(hosts), key) == ({"n0", "n1"}, "all_reduce")


@pytest.mark.parametrize(("slow", "found"), [("n0", {"n0"}), ("n1", {"n1"}), ("n2", set())])
def test_a_head_without_workers_is_the_third_that_says_which_of_two_cables_is_slow(slow: str, found: set[str]) -> None:
    cluster = SimulatedCluster(3, 0, factors={(slow, "all_reduce"): 0.02})
    records, links, verdicts = measure(cluster, "cpu", FULL, witnesses=cluster.nodes[2:])
    assert [record.host for record in records] == ["n0", "n1"] and len(links) == 3
    assert {each.hosts for each in verdicts} == {(host,) for host in found}


def test_a_busy_moment_is_measured_again_and_forgotten() -> None:
    numbers = count()

    def busy_at_first(_: object) -> float:
        return 0.1 if next(numbers) == 1 else 1.0  # the second value of the first host

    cluster = SimulatedCluster(4, 0, noise=busy_at_first)
    assert accused(cluster) == set()
    assert cluster.num_calls > 1, "nothing was under suspicion"
    healthy = SimulatedCluster(4, 0, noise=lambda _: 1.0)
    assert accused(healthy) == set() and healthy.num_calls == 1


def test_one_bad_gpu_of_many_is_named_with_its_number_its_peers_and_the_unit() -> None:
    cluster = SimulatedCluster(2, 1, num_gpus=8, factors={("n1", "GPU 5", "gpu_matrix_bf16"): 0.7})
    (verdict,) = (each for each in measure(cluster, "cuda", SHORT)[2] if each.level == "behind")
    assert (verdict.hosts, verdict.part) == (("n1",), "GPU 5")
    assert verdict.what.startswith("GPU 5: matrix product in bf16 4") and "TFLOP/s; its 15 peers have 6" in verdict.what


def test_healthy_gpus_raise_no_alarm() -> None:
    for seed in range(5):
        assert accused(SimulatedCluster(8, seed, num_gpus=8), "cuda", FULL) == set()


def gpu_node(*values: Measured) -> NodeRecord:
    return NodeRecord("a", "10.0.0.1", 8, "EPYC", (H100,), values)


def test_half_of_the_data_sheets_rate_is_a_hint_and_no_alarm() -> None:
    slow = gpu_node(Measured("gpu_matrix_bf16", 300.0, "GPU 0"), Measured("gpu_memory", 2800.0, "GPU 0"))
    (verdict,) = judge([slow], [])
    assert (verdict.level, verdict.key) == ("hint", "gpu_matrix_bf16")
    assert "30 % of the data sheet's 990" in verdict.what


def test_a_defect_that_the_driver_reports_needs_no_peers() -> None:
    (verdict,) = judge([gpu_node(Measured("gpu_fault", 1.0, "GPU 0", "it is too hot: the hardware slows it down"))], [])
    assert (verdict.level, verdict.what) == ("behind", "GPU 0: it is too hot: the hardware slows it down")


def test_gpus_of_different_models_are_no_peers() -> None:
    fast = gpu_node(Measured("gpu_memory", 2900.0, "GPU 0"))
    other = NodeRecord("b", "10.0.0.2", 8, "EPYC", ("Tesla T4",), (Measured("gpu_memory", 250.0, "GPU 0"),))
    assert judge([fast, other], []) == []


def test_a_clock_that_is_off_and_a_quota_are_hints() -> None:
    cluster = SimulatedCluster(3, 0, factors={(f"n{i}", "usable_cpus"): 0.5 for i in range(3)})
    cluster.offsets["n2"] = -7.5
    verdicts = measure(cluster, "cpu", SHORT)[2]
    assert named(verdicts) == set()
    assert named(verdicts, "hint") == {((f"n{i}",), "usable_cpus") for i in range(3)} | {(("n2",), "clock_offset")}
    assert "its clock is 7.5 s behind the others'" in "".join(each.what for each in verdicts)
    assert "Ray offers 8 CPUs there, of which its control group leaves 4" in "".join(each.what for each in verdicts)


def test_a_host_that_reaches_nobody_is_named_alone_and_a_broken_link_with_both_ends() -> None:
    cut = SimulatedCluster(4, 0)
    cut.broken = {("n2",): "connection refused"}
    (verdict,) = measure(cut, "cpu", SHORT)[2]
    assert verdict.hosts == ("n2",) and "none of the 3 nodes" in verdict.what and "refused" in verdict.what
    half = SimulatedCluster(4, 0)
    half.broken = {("n0", "n3"): "no route"}
    ((hosts, key),) = accused(half)
    assert (set(hosts), key) == ({"n0", "n3"}, "link")
    two = SimulatedCluster(2, 0)
    two.broken = {("n0",): "no route"}
    ((hosts, key),) = accused(two)
    assert (set(hosts), key) == ({"n0", "n1"}, "link")


def test_a_node_that_cannot_be_measured_is_left_out_of_what_is_compared() -> None:
    cluster = SimulatedCluster(3, 0)
    cluster.started[cluster.nodes[1]] = TimeoutError("no answer within 120 s")
    records, links, verdicts = measure(cluster, "cpu", SHORT)
    assert [record.reason for record in records] == ["", "no answer within 120 s", ""]
    assert [link.hosts for link in links] == [("n0", "n2")] and verdicts == []


def test_a_node_that_is_lost_while_it_is_measured_again_is_not_waited_for_once_more() -> None:
    class Lost(SimulatedCluster):
        def measure(
            self, keys: Mapping[Node, tuple[str, ...]], timeout: float
        ) -> dict[Node, list[Measured] | Exception]:
            found = super().measure(keys, timeout)
            if self.num_calls > 1 and self.nodes[1] in found:
                found[self.nodes[1]] = TimeoutError("no answer within 120 s")
            return found

    cluster = Lost(4, 0, factors={("n1", "decode"): 0.1})
    records, _, _ = measure(cluster, "cpu", SHORT)
    assert [record.reason for record in records] == ["", "no answer within 120 s", "", ""]
    assert cluster.num_calls == 1 + 4, "all at once, then the slow node and three peers"


@pytest.mark.parametrize("size", range(2, 12))
def test_rounds_of_disjoint_pairs_bring_all_together_once(size: int) -> None:
    nodes = SimulatedCluster(size, 0).nodes
    found = rounds(nodes, most=size)
    for pairs in found:
        members = [node for pair in pairs for node in pair]
        assert len(members) == len(set(members)) == size - size % 2
    met = [frozenset(pair) for pairs in found for pair in pairs]
    assert sorted(map(hash, met)) == sorted(hash(frozenset(pair)) for pair in combinations(nodes, 2))
    assert len(rounds(nodes, most=3)) == min(3, len(found))


def test_a_slow_host_does_not_accuse_its_partners() -> None:
    values = {("a", "b"): 1.0, ("a", "c"): 0.01, ("b", "c"): 0.011}
    links = [LinkRecord(hosts, None, (Measured("all_reduce", value, "4 MiB"),)) for hosts, value in values.items()]
    (verdict,) = judge([], links)
    assert verdict.hosts == ("c",) and "messages of 4 MiB: with its best partner, all-reduce 0.011 GB/s" in verdict.what
