"""A node is lost, or taken away with notice: the trial goes on elsewhere as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from orchestrator.experiment.spec import Faults
from orchestrator.figures.trial import trial_result
from tests.builders.fault_bench import Bench, Outcome, experiment
from tests.builders.waiting import wait_for
from trainers.contract.events import (
    CheckpointSaved,
    Event,
    LoopFinished,
    LoopStarted,
    StandbyLost,
    StandbyReady,
    StepsDone,
    TrialRestarted,
    WorkerStarted,
)
from trainers.faults import VARIABLE, Fault, fired

pytestmark = pytest.mark.cluster


class Nodes:
    """Four Ray nodes on this machine: the driver's without room for workers, and three with room for a trial each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.workers = {}
        for address in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
            self.add(address)

    def add(self, address: str) -> None:
        """Brings a node."""
        node: Any = self.cluster.add_node(num_cpus=2, node_ip_address=address)
        self.workers[node.node_id] = node

    def kill(self, node_id: str) -> None:
        """Takes a node away without a word."""
        self.cluster.remove_node(self.workers.pop(node_id), allow_graceful=False)

    def announce(self, node_id: str, seconds: int) -> None:
        """Announces that a node will be taken away, as a spot market does."""
        subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.cluster.address,
                "--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                "--deadline-remaining-seconds", str(seconds),
            ],
            check=True,
            timeout=300,
        )  # fmt: skip


@pytest.fixture(scope="module")
def bench_and_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bench, Nodes]]:
    from orchestrator.execution.cluster import SETTINGS, VISIBLE, shutdown, start_ray

    folder = tmp_path_factory.mktemp("nodes")
    faults_file = folder / "faults.json"
    with pytest.MonkeyPatch.context() as patch:
        settings = SETTINGS | VISIBLE | {VARIABLE: str(faults_file), "RAY_AUTH_MODE": "disabled"}
        for name, value in settings.items():
            patch.setenv(name, value)
        nodes = Nodes()
        start_ray(nodes.cluster.address)
        yield Bench(folder, faults_file), nodes
        shutdown()
        nodes.cluster.shutdown()


@pytest.fixture(scope="module")
def control(bench_and_nodes: tuple[Bench, Nodes]) -> Outcome:
    return bench_and_nodes[0].run()


class WhenHeld:
    """Does something once, when a fault holds rank 0 in a step, with the node of a worker."""

    def __init__(self, bench: Bench, action: Callable[[str], None]) -> None:
        self.bench, self.action, self.node_id, self.done_at = bench, action, "", 0.0
        self.thread = Thread(target=self._act, daemon=True)

    def __call__(self, event: Event) -> None:
        if isinstance(event, WorkerStarted) and event.attempt == 0:
            self.node_id = event.node_id
        if isinstance(event, LoopStarted) and not self.thread.is_alive() and not self.done_at:
            self.thread.start()

    def _act(self) -> None:
        wait_for(lambda: fired(self.bench.faults_file))
        self.done_at = time.time()
        self.action(self.node_id)


def test_a_preemption_notice_makes_a_checkpoint_and_counts_as_no_failure(
    bench_and_nodes: tuple[Bench, Nodes], control: Outcome
) -> None:
    bench, nodes = bench_and_nodes

    def announce(node_id: str) -> None:
        nodes.announce(node_id, seconds=300)
        (log,) = bench.run_dir.glob("*/log.txt")
        wait_for(lambda: "The driver's command: preempt" in log.read_text())
        bench.faults_file.unlink()  # the worker goes on

    notice = WhenHeld(bench, announce)
    outcome = bench.run(Fault("hold", rank=0, iteration=7), policy=Faults(max_failures=0), listeners=[notice])
    assert notice.done_at and outcome.ended.status == "FINISHED", outcome.ended.reason
    assert [event.failure for event in outcome.of(TrialRestarted)] == ["preempted"]
    assert outcome.of(LoopFinished)[0].reason == "preempted"
    assert [event.iteration for event in outcome.of(CheckpointSaved) if event.attempt == 0] == [3, 6, 9]
    homes = {event.attempt: event.node_id for event in outcome.of(WorkerStarted)}
    assert homes[1] != homes[0]
    assert (outcome.state, outcome.scores, outcome.rows) == (control.state, control.scores, control.rows)


def test_a_trial_that_may_goes_on_with_fewer_workers_where_a_node_does_not_come_back(
    bench_and_nodes: tuple[Bench, Nodes], control: Outcome
) -> None:
    bench, nodes = bench_and_nodes
    # One worker fills a node: two nodes are left, and one of them is lost.
    # What the test before used is free in far less than these seconds.
    resources = {"device": "cpu", "cpus_per_worker": 2, "min_workers": 1, "resize_after_seconds": 10}
    values = experiment(resources=resources)
    loss = WhenHeld(bench, nodes.kill)
    outcome = bench.run(Fault("hold", rank=0, iteration=7), values=values, listeners=[loss])
    nodes.add("127.0.0.5")  # the next test loses one too, also where this one fails
    assert loss.done_at and outcome.ended.status == "FINISHED", outcome.ended.reason
    assert {event.attempt: event.world_size for event in outcome.of(WorkerStarted)} == {0: 2, 1: 1}
    # The other node's rank reported a broken connection, or its own did not answer: the node's loss is the cause.
    (restart,) = outcome.of(TrialRestarted)
    assert restart.failure == "worker_lost" and restart.message.endswith("was lost")
    assert outcome.rows == control.rows, "every point of every curve, once"
    result = trial_result(outcome.plan, outcome.events)
    assert (result.world_size, result.iterations, [restart.world_size for restart in result.restarts]) == (2, 12, [1])
    assert result.notes[0].startswith("attempt 1 with 1 of 2 workers")


@pytest.mark.soak
def test_a_trial_on_a_lost_node_goes_on_elsewhere(bench_and_nodes: tuple[Bench, Nodes], control: Outcome) -> None:
    bench, nodes = bench_and_nodes
    loss = WhenHeld(bench, nodes.kill)
    outcome = bench.run(Fault("hold", rank=0, iteration=7), listeners=[loss])
    assert loss.done_at and outcome.ended.status == "FINISHED", outcome.ended.reason
    (restart,) = outcome.of(TrialRestarted)
    assert restart.failure == "worker_lost" and restart.message.endswith("was lost")
    homes = {event.attempt: event.node_id for event in outcome.of(WorkerStarted)}
    assert homes[1] != homes[0] == loss.node_id
    assert (outcome.state, outcome.scores, outcome.rows) == (control.state, control.scores, control.rows)
    resumed = min(event.time - event.seconds for event in outcome.of(StepsDone) if event.attempt == 1)
    print(f"\nlost node: {resumed - loss.done_at:.1f} s from the loss to the next step")


@pytest.mark.soak
def test_workers_that_waited_on_a_lost_node_are_not_used(
    bench_and_nodes: tuple[Bench, Nodes], control: Outcome
) -> None:
    bench, nodes = bench_and_nodes
    nodes.add("127.0.0.6")
    homes: dict[int, str] = {}

    def kill_their_node(event: Event) -> None:
        if isinstance(event, WorkerStarted):
            homes[event.attempt] = event.node_id
        if isinstance(event, StandbyReady) and event.attempt == 0:
            nodes.kill(homes[0])

    hold = Fault("hold", rank=0, iteration=7)
    outcome = bench.run(hold, policy=Faults(standby=True), listeners=[kill_their_node])
    assert outcome.ended.status == "FINISHED" and outcome.of(StandbyLost), outcome.ended.reason
    assert [event.failure for event in outcome.of(TrialRestarted)] == ["worker_lost"] and homes[1] != homes[0]
    assert (outcome.state, outcome.scores, outcome.rows) == (control.state, control.scores, control.rows)
