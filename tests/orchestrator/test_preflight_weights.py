"""Start weights are on this machine before anything starts: fetched once, whole, and what they claim to be."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.execution.nodes import Node
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from orchestrator.findings import Finding
from orchestrator.preflight import cluster
from orchestrator.preflight import weights as preflight_weights
from orchestrator.preflight.weights import check_weights, prepare_weights
from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment
from tests.builders.trials import plan
from tests.builders.web import Site, serving
from trainers.contract.weights import StartWeights

CONTENT = b"PK\x03\x04 what torch.save wrote"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(preflight_weights, "FIRST_WAIT_SECONDS", 0.0)
    with serving() as site:
        site.answers["/start.pth"] = CONTENT
        yield site


def refused(name: str, sha256: str | None = None) -> Finding:
    problem = prepare_weights(name, sha256)
    assert problem is not None and problem.level == "error" and problem.hint
    return problem


def test_an_address_is_fetched_once_to_where_workers_look(site: Site) -> None:
    name = f"{site.address}/start.pth"
    assert prepare_weights(name, None) is None and prepare_weights(name, None) is None
    assert StartWeights.of(name).path.read_bytes() == CONTENT
    assert site.requests["/start.pth"] == 1
    assert sorted(path.suffix for path in StartWeights.of(name).path.parent.iterdir()) in ([".lock", ".pth"], [".pth"])


def test_two_runs_that_start_at_once_share_one_download(site: Site) -> None:
    name = f"{site.address}/start.pth"
    threads = [threading.Thread(target=prepare_weights, args=(name, None)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert site.requests["/start.pth"] == 1 and StartWeights.of(name).path.is_file()


def test_a_damaged_copy_in_the_cache_is_fetched_again(site: Site) -> None:
    name, sha256 = f"{site.address}/start.pth", hashlib.sha256(CONTENT).hexdigest()
    path = StartWeights.of(name).path
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-3])
    assert prepare_weights(name, sha256) is None
    assert path.read_bytes() == CONTENT


def test_a_file_that_is_not_the_one_asked_for_is_refused(site: Site) -> None:
    assert refused(f"{site.address}/start.pth", "0" * 64).code == "weights_checksum"
    site.answers["/model_final_f10217.pkl"] = CONTENT
    problem = refused(f"{site.address}/model_final_f10217.pkl")
    assert problem.code == "weights_checksum" and "MD5" in problem.what and "as its name says" in problem.what


@pytest.mark.parametrize(
    ("answer", "code", "words", "requests"),
    [
        (404, "weights_download", "answers 404", 1),
        (403, "weights_download", "answers 403", 1),
        (503, "weights_download", "503", 5),
        (b"<!DOCTYPE html><title>Sign in</title>", "weights_placeholder", "web page", 1),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "weights_placeholder", "LFS", 1),
    ],
)
def test_what_a_server_sends_instead_is_named(
    site: Site, answer: bytes | int, code: str, words: str, requests: int
) -> None:
    site.answers["/secret.pth?token=abc"] = answer
    name = f"{site.address}/secret.pth?token=abc"
    problem = refused(name)
    assert problem.code == code and words in problem.what and "by hand" in problem.hint
    assert "abc" not in problem.to_line() and not StartWeights.of(name).path.exists()
    assert sum(site.requests.values()) == requests


def test_an_address_that_nothing_answers_is_an_error_with_what_to_do(site: Site) -> None:
    problem = refused("http://127.0.0.1:9/model.pth")
    assert problem.code == "weights_download" and "refused" in problem.what and "set model.weights" in problem.hint
    assert refused("s3://bucket/model.pth").code == "weights_address"


def test_a_cache_that_cannot_be_written_is_an_error(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "taken" / "cache"))
    problem = refused(f"{site.address}/start.pth")
    assert problem.code == "weights_download" and "FVCORE_CACHE" in problem.hint


def test_a_path_is_checked_without_reading_it_all(tmp_path: Path) -> None:
    assert refused(str(tmp_path / "none.pth")).code == "weights_missing"
    assert "folder" in refused(str(tmp_path)).what
    assert "cannot be read: File name too long" in refused(str(tmp_path / ("n" * 300))).what
    (tmp_path / "page.pth").write_bytes(b"<html><body>404</body></html>")
    assert refused(str(tmp_path / "page.pth")).code == "weights_placeholder"
    (tmp_path / "start.pth").write_bytes(CONTENT)
    assert prepare_weights(str(tmp_path / "start.pth"), None) is None


def test_weights_are_taken_from_the_config_where_the_experiment_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = {**TINY_OVERRIDES, "MODEL.WEIGHTS": "mine.pth"}
    experiment = parse_experiment(tiny_experiment(model={"overrides": overrides}), "test")
    (plan,) = expand(experiment, Hardware(num_cpus=1), "/runs/x", Path("/data"))
    assert plan.weights == str(tmp_path / "mine.pth"), "workers have another working directory"
    (finding,) = check_weights(experiment)
    assert finding.code == "weights_missing" and "mine.pth" in finding.file
    random = parse_experiment(tiny_experiment(model={"overrides": overrides, "weights": ""}), "test")
    assert check_weights(random) == []


def test_every_node_of_a_cluster_fetches_them_and_is_named_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [Node(id=host, host=host, address="127.0.0.1", num_gpus=0, num_cpus=2) for host in "abc"]
    refusal = Finding(
        "error", "weights_download", "https://example.org/a.pth", "model.weights", "no route", "Try again"
    )
    answers = dict(zip(nodes, (None, refusal, TimeoutError("no answer within 9 s")), strict=True))
    called = []

    def call_on_nodes(function: object, arguments: dict[Node, tuple[object, ...]], timeout: float) -> object:
        called.append((function, set(arguments.values())))
        return answers

    monkeypatch.setattr(cluster, "call_on_nodes", call_on_nodes)
    trial = plan(weights="https://example.org/a.pth", weights_sha256="0" * 64)
    found = cluster.fetch_weights(trial, nodes)
    assert called == [(prepare_weights, {("https://example.org/a.pth", "0" * 64)})]
    assert [(finding.code, finding.id) for finding in found] == [
        ("weights_download", "host b"), ("weights_download", "host c"),
    ]  # fmt: skip
    assert "no answer" in found[1].what
    assert cluster.fetch_weights(plan(weights="/data/a.pth"), nodes) == [] and len(called) == 1
