"""Ray's address and temporary folder are judged before Ray is started: it would fail late, or with a traceback."""

from __future__ import annotations

import os
import shutil
import socket
from collections import namedtuple
from pathlib import Path
from threading import Thread

import pytest

from orchestrator.experiment.environment import cluster_address
from orchestrator.experiment.reading import parse_experiment
from orchestrator.findings import Finding
from orchestrator.preflight.ray_setup import MAX_SOCKET_PATH, check_ray
from tests.builders.experiments import tiny_experiment


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "RAY_TRAIN_V2_ENABLED"):
        monkeypatch.delenv(name, raising=False)


def check(**resources: object) -> list[Finding]:
    return check_ray(parse_experiment(tiny_experiment(resources={"device": "cpu", **resources}), "test"))


@pytest.mark.parametrize(
    ("address", "such_as"),
    [
        ("headnode", "headnode:6379"),
        ("headnode:", "headnode:6379"),
        ("headnode:abc", "headnode:6379"),
        ("headnode:99999", "headnode:6379"),
        ("headnode:0", "headnode:6379"),
        ("head node:6379", "headnode:6379"),
        ("redis://10.0.0.1:6379", "10.0.0.1:6379"),
        ("ray://10.0.0.1", "10.0.0.1:6379"),
        ("10.0.0.1:6379/path", "10.0.0.1:6379"),
        ("::1", "HOST:6379"),
    ],
)
def test_what_is_no_address_is_named_with_one_that_is(
    address: str, such_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (configured,) = check(address=address)
    assert (configured.level, configured.code, configured.file) == ("error", "ray_address", "resources.address")
    assert address in configured.what and f"such as {such_as}," in configured.hint
    monkeypatch.setenv("RAY_ADDRESS", address)
    (from_environment,) = check()
    assert from_environment.file == "RAY_ADDRESS"


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "[::1]:9", "no-such-host.invalid:6379"])
def test_an_address_where_nothing_listens_is_refused_before_ray_tries(address: str) -> None:
    (finding,) = check(address=address)
    assert finding.code == "ray_unreachable" and finding.id == address and "cannot be joined" in finding.what
    assert "ray start --head" in finding.hint


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR unknown command\r\n", b""])
def test_another_server_at_the_address_is_told_from_ray(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        Thread(target=_answer_once, args=[other, answer], daemon=True).start()
        (finding,) = check(address=f"127.0.0.1:{other.getsockname()[1]}")
    assert finding.code == "ray_unreachable" and "not Ray (its dashboard has another port)" in finding.what


def _answer_once(server: socket.socket, answer: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(100)
        connection.sendall(answer)


def test_the_address_of_a_job_server_comes_with_the_command_that_sends_a_job_there() -> None:
    (finding,) = check(address="http://head:8265")
    assert finding.code == "ray_address" and "make submit ADDRESS=http://head:8265" in finding.hint


def test_auto_is_left_to_ray_and_local_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(address="auto") == []
    for nothing in ("local", ""):
        monkeypatch.setenv("RAY_ADDRESS", nothing)
        assert cluster_address(None) is None and check() == []


def socket_path(folder: Path, name: str) -> str:
    return f"{folder}/ray/session_2026-01-31_12-00-00_123456_{os.getpid()}/sockets/{name}"


@pytest.mark.parametrize(("dashboard", "name"), [(False, "plasma_store"), (True, "dash_MetricsHead")])
def test_a_temporary_folder_may_be_as_long_as_rays_sockets_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, dashboard: bool, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    base = Path("/tmp")
    fits = base / ("x" * (MAX_SOCKET_PATH - len(socket_path(base, name)) - 1))
    assert len(socket_path(fits, name)) == MAX_SOCKET_PATH
    for variable in ("TMPDIR", "RAY_TMPDIR"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, str(fits))
            assert check(dashboard=dashboard) == []
            patch.setenv(variable, f"{fits}x")
            (finding,) = check(dashboard=dashboard)
        assert (finding.level, finding.code, finding.file) == ("error", "ray_folder", variable)
        assert "108 bytes, Linux takes 107 (1 too many)" in finding.what and "RAY_TMPDIR=/tmp" in finding.hint


def test_rays_own_variable_goes_before_the_common_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 200)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert check() == []


@pytest.mark.parametrize("value", ["relative/folder", ""])
def test_a_relative_temporary_folder_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", value)
    (finding,) = check()
    assert finding.code == "ray_folder" and "absolute" in finding.what


def test_a_temporary_folder_that_cannot_be_used_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, reason in (("/dev/null", "Not a directory"), ("/proc/nothing", "No such file")):
        monkeypatch.setenv("TMPDIR", value)
        (finding,) = check()
        assert finding.code == "ray_folder" and reason in finding.what


def test_a_full_temporary_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 2**20, 2**20))
    (finding,) = check()
    assert "1 MiB are free, it needs 64" in finding.what


def test_the_first_version_of_ray_train_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "0")
    (finding,) = check()
    assert finding.code == "ray_setting" and finding.hint == "Unset RAY_TRAIN_V2_ENABLED"
