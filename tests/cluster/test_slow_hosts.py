"""One of three hosts is slowed, from outside: the command finds it by name; of three healthy ones, it names none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.builders.hosts import SHARED, Network, why_not
from tests.builders.slow_hosts import MeasuredHosts

pytestmark = [pytest.mark.cluster, pytest.mark.soak]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeasuredHosts]:
    if reason := why_not():
        pytest.skip(reason)
    with Network() as network:
        yield MeasuredHosts(network, tmp_path_factory.mktemp("measured"))


def behind(document: dict[str, Any]) -> set[tuple[str, ...]]:
    return {tuple(each["hosts"]) for each in document["verdicts"] if each["level"] == "behind"}


def test_healthy_hosts_raise_no_alarm(hosts: MeasuredHosts) -> None:
    code, document, output = hosts.accept("--output", f"{SHARED}/healthy")
    assert (code, behind(document)) == (0, set()), output
    assert {node["host"] for node in document["nodes"]} == {"one", "two", "three"}, "the head takes no worker"
    assert {len(link["hosts"]) for link in document["links"]} == {2} and len(document["links"]) == 3
    assert "All are as good as their peers" in output


def test_a_quota_of_cpu_time_and_a_slow_disk_are_found(hosts: MeasuredHosts) -> None:
    with ExitStack() as slowed:
        try:
            slowed.enter_context(hosts.few_cpus("three"))
            slowed.enter_context(hosts.slow_disk("one"))
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        code, document, output = hosts.accept("--against", f"{SHARED}/healthy")
    assert (code, behind(document)) == (1, {("one",), ("three",)}), output
    assert "host three: CPUs 0.25 CPUs; its 2 peers have 2 (median)" in output
    assert "host one: writing checkpoints 2" in output and "host one: reading data" in output
    assert "ratio" in output


def test_preflight_finds_a_slow_cable_and_leaves_its_host_out_where_it_is_asked_to(hosts: MeasuredHosts) -> None:
    hosts.slow_cable("one")
    try:
        run = f"cd {hosts.root} && python -m orchestrator.run {SHARED}/measured.yaml --output {SHARED}/left-out"
        offline = "--set tracking.uri=http://10.77.0.10:5999 --set tracking.offline=true"
        done = hosts.head.run(f"{run} --set resources.exclude_slow_nodes=true {offline}", timeout=1500)
    finally:
        hosts.repair_cable("one")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "[slow_node] all_reduce: host one: falls behind" in done.stdout and "left out of this run" in done.stdout
    events = (hosts.shared / "left-out" / "events.jsonl").read_text()
    assert '"excluded_hosts":["10.77.0.11"]' in events
    assert '"host":"10.77.0.12"' in events and '"host":"10.77.0.11"' not in events
