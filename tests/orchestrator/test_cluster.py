"""The cluster that a run starts or joins: its settings, its dashboard, and calls on its nodes."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import requests
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.state import get_actor
from ray.util.state.exception import RayStateApiException

from orchestrator.execution import cluster, event_pump
from orchestrator.execution.event_log import EventLog
from orchestrator.execution.event_pump import EventPump
from orchestrator.execution.gauges import Gauges
from orchestrator.execution.nodes import NODE_ID, call_on_nodes, choose_nodes, list_nodes
from orchestrator.experiment.environment import CREDENTIALS, describe
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.spec import SpecError
from orchestrator.figures.gauges import GAUGES
from orchestrator.gpus import Gpu
from orchestrator.preflight.ray_setup import SOCKETS
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from tests.builders.experiments import tiny_experiment
from tests.builders.trials import trained
from tests.builders.waiting import wait_for
from trainers.contract.events import RunStarted

SECRET = CREDENTIALS[0]
NUM_CPUS = 3


def divide(a: float, b: float) -> float:
    return a / b


def sleep(seconds: float) -> None:
    time.sleep(seconds)


@pytest.fixture(scope="module")
def local_cluster() -> Iterator[cluster.Cluster]:
    """A local cluster with a dashboard: its driver holds credentials, sees two of its GPUs, and may use three CPUs."""
    before = dict(os.environ)
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1,7"
    os.environ[SECRET] = "secret"
    os.environ["RAY_API_SERVER_ADDRESS"] = "http://another-cluster.invalid:8265"
    os.environ.update({"RAY_metrics_report_interval_ms": "1000"})  # instead of 10 s
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cluster, "list_gpus", lambda: [Gpu("H100", number) for number in range(2)])
            patch.setattr(cluster, "num_usable_cpus", lambda: NUM_CPUS)
            started = cluster.start_ray(None, dashboard=True)
        yield started
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def test_the_dashboard_of_a_local_cluster_answers(local_cluster: cluster.Cluster) -> None:
    assert local_cluster.dashboard is not None
    status = requests.get(f"{local_cluster.dashboard}/api/version", timeout=600).status_code
    assert status in (200, 401), "401 where it asks for the token"
    page = describe(["run"])["ray_dashboard"]
    assert page == f"{local_cluster.dashboard}/#/jobs/{ray.get_runtime_context().get_job_id()}"
    assert os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "1"


def test_ray_has_the_gpus_and_cpus_that_the_driver_sees_whatever_it_counts_itself(
    local_cluster: cluster.Cluster,
) -> None:
    assert local_cluster.hardware.num_gpus == ray.cluster_resources()["GPU"] == 2
    assert local_cluster.hardware.num_cpus == ray.cluster_resources()["CPU"] == NUM_CPUS


def test_ray_has_no_gpu_where_the_driver_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def init(**options: object) -> SimpleNamespace:
        asked.update(options)
        return SimpleNamespace(dashboard_url="")

    monkeypatch.setattr(os, "environ", os.environ | {"CUDA_VISIBLE_DEVICES": "-1"})
    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "nodes", list)
    cluster.start_ray(None)
    assert asked["num_gpus"] == 0


def test_nodes_without_cpus_do_not_count_where_others_take_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"GPU": 8.0} | cpus} for cpus in ({}, {"CPU": 64.0}, {"CPU": 64.0})]
    monkeypatch.setattr(cluster.ray, "init", lambda **_: SimpleNamespace(dashboard_url=""))
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    assert cluster.start_ray(None).hardware == Hardware(num_gpus=16, num_cpus=128, num_hosts=2)


def test_a_node_exports_the_figures_of_a_running_trial_for_prometheus(local_cluster: cluster.Cluster) -> None:
    node = ray.nodes()[0]
    made, url = trained(), f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    driver = {"trial": "", "attempt": 0, "rank": -1, "time": made.epoch}
    events = [RunStarted(**driver, experiment={"name": "démo"}, run_id="1", tags={}), *made.events[:-1]]
    gauges = Gauges(events)

    def exported() -> list[str]:
        gauges.refresh()
        return [line for line in requests.get(url, timeout=600).text.splitlines() if line.startswith("ray_detectron2")]

    def names() -> set[str]:
        return {line.partition("{")[0].removeprefix("ray_") for line in exported()}

    wait_for(lambda: names() == set(GAUGES.values()) - {"detectron2_keypoint_ap"}, lambda: "\n".join(exported()))
    (box,) = [line for line in exported() if line.startswith("ray_detectron2_box_ap{")]
    assert box.endswith("} 55.0")
    assert 'experiment="d\\\\xe9mo"' in box and 'run_id="1"' in box and 'trial="reference-2xcpu"' in box
    events.append(made.events[-1])
    wait_for(lambda: not exported())


def test_ray_names_its_sockets_as_the_check_of_the_temporary_folder_has_it(local_cluster: cluster.Cluster) -> None:
    (node,) = cluster.ray.nodes()
    name = rf"/session_\d{{4}}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{{6}}_{os.getpid()}/sockets/{SOCKETS[False]}"
    assert re.search(rf"/ray{name}$", node["ObjectStoreSocketName"])
    assert len(Path(node["RayletSocketName"]).name) <= len(SOCKETS[False])
    sockets = Path(node["ObjectStoreSocketName"]).parent
    wait_for(lambda: (sockets / SOCKETS[True]).exists(), lambda: str(sorted(sockets.iterdir())))
    assert max(len(each.name) for each in sockets.iterdir()) == len(SOCKETS[True])


def test_the_driver_keeps_its_credentials_and_its_cluster_does_not_get_them(local_cluster: cluster.Cluster) -> None:
    (node,) = list_nodes()
    inherited = call_on_nodes(lambda: dict(os.environ), {node: ()}, timeout=600)[node]
    assert isinstance(inherited, dict) and "PATH" in inherited
    assert SECRET not in inherited and inherited["RAY_API_SERVER_ADDRESS"] == cluster.NO_API_SERVER
    assert os.environ[SECRET] == "secret" and os.environ["RAY_API_SERVER_ADDRESS"] != cluster.NO_API_SERVER


def test_ray_train_leaves_workers_alone_where_no_api_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its cleaner asks so for the controller, goes on after this exception, and removes the workers after any answer.
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster.NO_API_SERVER)
    with pytest.raises(RayStateApiException):
        get_actor("0" * 32, timeout=5)


def test_a_call_on_a_node_returns_or_raises_or_is_late(local_cluster: cluster.Cluster) -> None:
    (node,) = list_nodes()
    assert call_on_nodes(divide, {node: (7, 2)}, timeout=600) == {node: 3.5}
    assert isinstance(call_on_nodes(divide, {node: (7, 0)}, timeout=600)[node], ZeroDivisionError)
    assert isinstance(call_on_nodes(sleep, {node: (3600,)}, timeout=0.1)[node], TimeoutError)


def test_a_worker_gets_a_node_as_long_as_there_is_room_on_it(
    local_cluster: cluster.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = parse_experiment(tiny_experiment(), "test")
    (plan,) = expand(experiment, Hardware(num_cpus=1), str(tmp_path / "run"), tmp_path)
    (node,) = list_nodes()
    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.execution.nodes.RESERVE_TIMEOUT_SECONDS", 600.0)
        assert choose_nodes(plan) == [{NODE_ID: node.id}]
    taken = placement_group([{"CPU": node.num_cpus}])
    assert taken.wait(600)
    assert choose_nodes(plan) is None
    remove_placement_group(taken)


def test_a_cluster_that_is_joined_shows_runs_and_is_watched_for_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: dict[str, str] = {}

    def join(address: str, settings: Mapping[str, str]) -> None:
        joined.update(settings)

    monkeypatch.setattr(os, "environ", {"RAY_ADDRESS": "auto", "RAY_CHDIR_TO_TRIAL_DIR": "1"})
    monkeypatch.setattr(cluster, "_join", join)
    monkeypatch.setattr(cluster.ray, "nodes", list)
    assert cluster.start_ray(None, "ens5").dashboard is None
    assert joined["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "1"
    assert "EXPORT_TRAIN_RUN" in joined["RAY_enable_export_api_write_config"].split(",")
    assert joined["NCCL_SOCKET_IFNAME"] == joined["GLOO_SOCKET_IFNAME"] == "ens5"
    assert "RAY_CHDIR_TO_TRIAL_DIR" not in joined, "what the job sets stays"
    assert not {"RAY_TRAIN_METRICS_ENABLED", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"} & joined.keys()


@pytest.mark.parametrize(("failures", "starts"), [(0, 1), (2, 3), (3, 3)])
def test_a_machine_that_is_too_busy_for_ray_gets_another_start_and_then_a_sentence(
    monkeypatch: pytest.MonkeyPatch, failures: int, starts: int
) -> None:
    begun: list[int] = []

    def init(**_: object) -> SimpleNamespace:
        begun.append(1)
        if len(begun) <= failures:
            raise Exception("The current node timed out during startup.")  # noqa: TRY002 - as Ray does
        return SimpleNamespace(dashboard_url="")

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "nodes", list)
    if failures < cluster.MAX_STARTS:
        cluster.start_ray(None)
    else:
        with pytest.raises(SpecError, match="Ray cannot be started here: The current node timed out"):
            cluster.start_ray(None)
    assert len(begun) == starts


def test_ray_is_not_left_before_every_thread_that_calls_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, done = threading.Event(), list[str]()
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("left"))
    monkeypatch.setattr(cluster, "LEAVE_TIMEOUT_SECONDS", 600.0)
    cluster.start_thread(lambda name: (ended.wait(), done.append(name)), "calls Ray", "last call")
    leaving = threading.Thread(target=cluster.shutdown)
    leaving.start()
    leaving.join(timeout=0.1)
    assert not done
    ended.set()
    leaving.join()
    assert done == ["last call", "left"]


def test_ray_is_not_left_where_a_thread_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, done = threading.Event(), list[str]()
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("left"))
    monkeypatch.setattr(cluster, "LEAVE_TIMEOUT_SECONDS", 0.1)
    thread = cluster.start_thread(ended.wait, "calls Ray")
    cluster.shutdown()
    ended.set()
    thread.join()
    assert not done


def test_ray_is_not_left_while_the_events_of_workers_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answered, done = threading.Event(), list[str]()
    actor = SimpleNamespace(drain=SimpleNamespace(remote=lambda _: None))
    monkeypatch.setattr(EventPump, "_start_actor", lambda _: actor)
    monkeypatch.setattr(ray, "get", lambda *_, **__: (answered.wait(), ([], 0, {}, 0.0))[1])
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("left"))
    monkeypatch.setattr(cluster, "LEAVE_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(event_pump, "CLOSE_TIMEOUT_SECONDS", 0.1)
    pump = EventPump(EventLog(Outbox(tmp_path / FILE_NAME), []))
    pump.close()
    cluster.shutdown()
    assert not done
    monkeypatch.setattr(cluster, "LEAVE_TIMEOUT_SECONDS", 600.0)
    answered.set()
    cluster.shutdown()
    assert done == ["left"]


def test_a_cluster_that_another_thread_leaves_meanwhile_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_daemons", dict.fromkeys(cluster.DAEMONS))
    monkeypatch.setattr(cluster, "_runs", lambda _: cluster._daemons.clear() is None)
    assert cluster.lost_daemon() is None
