"""Four trials on two hosts, two at a time, each on a host of its own: they finish in the time of two."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from tests.builders.cluster import ClusterOfHosts, Job
from tests.builders.experiments import tiny_experiment

pytestmark = [pytest.mark.cluster, pytest.mark.soak]

Span = tuple[float, float]


@pytest.fixture(scope="module")
def job(cluster: ClusterOfHosts) -> Job:
    """Twice as many seeds as there are hosts for workers; each has one worker, and a host has room for two."""
    seeds = list(range(2 * len(cluster.workers)))
    values = tiny_experiment(
        trials={"world_sizes": [1], "scaling": "strong", "seeds": seeds, "concurrent": "auto"},
        resources={"device": "cpu", "cpus_per_worker": 1, "num_nodes": 1},
    )
    sent = cluster.submit("side-by-side", values)
    assert sent.wait() == 0, sent.output[-4000:]
    return sent


def spans(job: Job) -> dict[str, Span]:
    """When each trial began and ended."""
    ends = {event["trial"]: event["time"] for event in job.events("trial_ended")}
    return {event["trial"]: (event["time"], ends[event["trial"]]) for event in job.events("trial_started")}


def overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def longest_chain(times: list[Span]) -> int:
    """The most trials of which each begins after the one before has ended."""
    chains: list[int] = []
    ordered = sorted(times)
    for number, (begin, _) in enumerate(ordered):
        before = [chains[other] for other in range(number) if ordered[other][1] <= begin]
        chains.append(1 + max(before, default=0))
    return max(chains)


def test_twice_as_many_trials_as_hosts_finish_in_the_time_of_two(cluster: ClusterOfHosts, job: Job) -> None:
    times, at_once = spans(job), len(cluster.workers)
    assert len(times) == 2 * at_once
    begins = [begin for begin, _ in times.values()]
    most = max(sum(begin <= at < end for begin, end in times.values()) for at in begins)
    assert most == at_once, "as many at a time as there are hosts, and never more"
    assert longest_chain(list(times.values())) == 2
    alone = sum(end - begin for begin, end in times.values())
    whole = max(end for _, end in times.values()) - min(begins)
    print(f"\n{len(times)} trials of {alone / len(times):.1f} s on {at_once} hosts: {whole:.1f} s in all")


def test_no_host_has_two_trials_at_a_time(job: Job) -> None:
    times = spans(job)
    hosts = {event["trial"]: event["host"] for event in job.events("worker_started")}
    together = [pair for pair in combinations(times, 2) if overlap(times[pair[0]], times[pair[1]])]
    assert together and all(hosts[one] != hosts[other] for one, other in together)


def test_the_results_say_who_ran_with_whom(job: Job) -> None:
    times = spans(job)
    trials: list[dict[str, Any]] = job.trials()
    assert [trial["name"] for trial in trials] == sorted(times), "in the order of the plan"
    for trial in trials:
        own = times[trial["name"]]
        others = [name for name in sorted(times) if name != trial["name"] and overlap(own, times[name])]
        assert (trial["status"], trial["ran_with"], trial["shared_hosts"]) == ("FINISHED", others, [])
    assert "trials at a time" in job.output and "ETA of the run" in job.output
