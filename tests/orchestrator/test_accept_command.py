"""What an acceptance leaves: a document, a page, a table, a run in MLflow, exit codes; and the real measurements."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pynvml
import pytest

from orchestrator.acceptance.document import Acceptance, LinkRecord, NodeRecord, Verdict, read_document, write_document
from orchestrator.acceptance.page import page
from orchestrator.acceptance.quantities import QUANTITIES, node_keys
from orchestrator.acceptance.table import missing, rows
from orchestrator.preflight.speed import speed_findings
from tests.builders.commands import run_command
from tests.builders.waiting import wait_for
from trainers.acceptance import gpus
from trainers.acceptance.cpu_time import Burst, run_burst
from trainers.acceptance.host import measure_host
from trainers.contract.acceptance import Measured, ProbeRequest


def node(host: str, number: int, *values: Measured, reason: str = "") -> NodeRecord:
    return NodeRecord(host, f"10.0.0.{number}", 8, "EPYC", (), values, 0.001, 0.0005, reason)


SLOW = Verdict(
    "behind", ("b",), "decode", "", "JPEG decoding 100 images/s; its 2 peers have 800 (median)", 100.0, 800.0
)
PAIR = Verdict("behind", ("a", "c"), "all_reduce", "4 MiB", "all-reduce 0.01 GB/s; its 2 peers have 1 (median)")
ACCEPTANCE = Acceptance(
    experiment="big <cluster>",
    started="2026-11-26T17:00:00+00:00",
    device="cpu",
    short=True,
    nodes=(
        node("a", 1, Measured("decode", 800.0), Measured("data_read", None, reason="Permission denied")),
        node("b", 2, Measured("decode", 100.0)),
        node("c", 3, Measured("decode", 900.0)),
    ),
    links=(LinkRecord(("a", "c"), None, (Measured("all_reduce", 0.01, "4 MiB"),)),),
    verdicts=(SLOW, PAIR),
    seconds=12.0,
)


def test_a_document_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = write_document(ACCEPTANCE, tmp_path)
    assert read_document(path) == read_document(tmp_path) == ACCEPTANCE


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"experiment": 3}', "\x00", '{"nodes": null}'])
def test_something_else_is_no_document(tmp_path: Path, text: str) -> None:
    (tmp_path / "acceptance.json").write_text(text)
    with pytest.raises(ValueError, match="is not the result of an acceptance"):
        read_document(tmp_path)


def test_exit_codes_say_what_was_found() -> None:
    assert ACCEPTANCE.exit_code == 1
    assert replace(ACCEPTANCE, verdicts=()).exit_code == 0
    assert replace(ACCEPTANCE, verdicts=(replace(SLOW, level="hint"),)).exit_code == 0
    assert replace(ACCEPTANCE, nodes=(*ACCEPTANCE.nodes, node("d", 4, reason="no answer"))).exit_code == 2


def test_two_clusters_are_set_side_by_side() -> None:
    other = replace(ACCEPTANCE, nodes=(node("x", 1, Measured("decode", 400.0)),), links=())
    decode, link = rows(ACCEPTANCE, other)
    assert (decode.median, decode.worst, decode.worst_at, decode.other, decode.ratio) == (
        "800",
        "100",
        "b",
        "400",
        "2.00",
    )
    assert (link.quantity, link.median, link.other, link.ratio) == ("all-reduce (4 MiB)", "0.01", "–", "–")
    text = page(ACCEPTANCE, other)
    assert (
        "falls behind" in text and "big &lt;cluster&gt;" in text and "<cluster>" not in text and "<script" not in text
    )
    assert missing(ACCEPTANCE) == [("host a: reading data", "Permission denied")]


def test_preflight_warns_and_leaves_slow_nodes_out_where_it_is_asked_to() -> None:
    excluded: set[str] = set()
    slow, pair = speed_findings(ACCEPTANCE, exclude=False, excluded=excluded)
    assert (slow.level, slow.code, slow.id, excluded) == ("warning", "slow_node", "host b", set())
    assert "100 images/s; its 2 peers have 800" in slow.what and "exclude_slow_nodes: true" in slow.hint
    assert (pair.code, pair.id) == ("slow_link", "link a - c")
    slow, _ = speed_findings(ACCEPTANCE, exclude=True, excluded=excluded)
    assert excluded == {"10.0.0.2"} and "left out of this run" in slow.hint


def test_time_that_other_processes_took_is_left_out_of_a_rate() -> None:
    # Two threads, 4 s each, of which others took a half: 100 pieces in 2 s each.
    burst = Burst(work=100, wall_seconds=8.0, contended_seconds=4.0, num_threads=2)
    assert (burst.rate, burst.cpu_share) == (50.0, 50.0)


def test_a_burst_works_in_all_threads_and_passes_errors_on() -> None:
    burst = run_burst(lambda: 1.0, 3, 0.02)
    assert burst.work >= 3 and burst.num_threads == 3 and burst.rate > 0

    def fail() -> float:
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        run_burst(fail, 2, 0.02)


def request(folder: Path | None, data: Path | None = None) -> ProbeRequest:
    return ProbeRequest("cpu", 2, 0.03, 2**20, str(data) if data else None, str(folder) if folder else None)


def test_storage_is_measured_without_leaving_anything(tmp_path: Path) -> None:
    values = {each.key: each.value for each in measure_host(request(tmp_path), ("checkpoint_write", "data_read"))}
    assert all(value and value > 0 for value in values.values()) and len(values) == 2
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_measured_has_a_reason(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "nothing.jpg").touch()
    keys = ("checkpoint_write", "data_read")
    for asked, words in [
        (request(tmp_path / "missing"), ["No such file", "No such file"]),
        (request(None), ["at an address", "at an address"]),
        (request(None, empty), ["at an address", "are empty"]),
    ]:
        found = list(measure_host(asked, keys))
        assert [each.value for each in found] == [None, None]
        assert all(word in each.reason for word, each in zip(words, found, strict=True)), found


def test_all_quantities_of_gpus_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With processors in place of GPUs, and NVML's answers made up."""
    import torch

    from tests.builders.numerics import process_switches

    handles = iter(["first", "second"])
    reasons = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonHwThermalSlowdown
    answers = {
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: reasons if handle == "first" else 0,
        "nvmlDeviceGetTotalEccErrors": lambda *_: 0,
        "nvmlDeviceGetRemappedRows": lambda handle: (0, 1, 0, handle == "second"),
        "nvmlDeviceGetRetiredPagesPendingStatus": lambda _: 0,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    for name, value in {
        "MATRIX_SIZE": 64,
        "COPY_BYTES": 2**16,
        "HOST_COPY_BYTES": 2**16,
        "CLOCK_INTERVAL_SECONDS": 0.0,
    }.items():
        monkeypatch.setattr(gpus, name, value)
    monkeypatch.setattr(gpus, "_handle", lambda _: next(handles))
    reads, matrix_rate = Counter[str](), gpus.matrix_rate

    def rate_until_clocks_are_read(*args: Any, **settings: Any) -> float:
        """Ends after both clocks were read twice under load, of which the first counts, however busy the machine is."""
        before, rate = reads.copy(), matrix_rate(*args, **settings)
        wait_for(lambda: all(reads[handle] >= before[handle] + 2 for handle in ("first", "second")))
        return rate

    def clock(handle: str, _: int) -> int:
        reads[handle] += 1
        return 1200 if handle == "first" else 1980

    monkeypatch.setattr(pynvml, "nvmlDeviceGetClockInfo", clock)
    monkeypatch.setattr(gpus, "matrix_rate", rate_until_clocks_are_read)
    monkeypatch.setattr(gpus, "_hardware_xids", lambda: ["Xid (PCI:0000:65:00): 79"])
    keys = node_keys("cuda", short=False)
    switches = process_switches()
    found = list(gpus.measure_gpus([torch.device("cpu")] * 2, keys, 0.02))
    assert process_switches() == switches
    values = {(each.key, each.part): each.value for each in found}
    wanted = {key for key in keys if QUANTITIES[key].device == "cuda"}
    assert {key for key, part in values if part == "GPU 0"} == {key for key, part in values if part == "GPU 1"}
    assert {key for key, _ in values} == wanted | {"gpu_fault"} and all(
        value and value > 0 for value in values.values()
    )
    assert (values["gpu_clock", "GPU 0"], values["gpu_clock", "GPU 1"]) == (1200, 1980)
    faults = [(each.part, each.reason) for each in found if each.key == "gpu_fault"]
    assert faults == [
        ("GPU 0", "it is too hot: the hardware slows it down"),
        ("GPU 1", "a row of its memory could not be remapped: replace it"),
        ("", "the kernel's log has Xid (PCI:0000:65:00): 79"),
    ]


@pytest.mark.train
def test_the_command_measures_this_machine(tmp_path: Path) -> None:
    command = ["--short", "--json", "--output", tmp_path / "out", "--set", f"storage.path={tmp_path}"]
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    done = run_command(*command, "--set", f"tracking.uri={store}", cwd=tmp_path, module="orchestrator.accept")
    assert done.returncode == 0, done.stderr
    document = msgspec.convert(json.loads(done.stdout), Acceptance)
    assert document == read_document(tmp_path / "out")
    (only,) = document.nodes
    values = {each.key: each.value for each in only.values}
    assert {"usable_cpus", "decode", "cpu_matrix", "checkpoint_write", "data_read"} <= set(values)
    assert only.processor and only.clock_offset_seconds is not None and document.links == ()
    assert "there is nothing to compare it with" in done.stderr
    assert (tmp_path / "out" / "acceptance.html").stat().st_size > 1000

    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    (experiment,) = (each for each in client.search_experiments() if each.name != "Default")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags["kind"] == "acceptance" and run.info.status == "FINISHED"
    assert run.data.metrics["acceptance/decode"] == values["decode"]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"acceptance.json", "acceptance.html"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["missing.yaml"], "missing.yaml"),
        (["--against", "nowhere"], "--against"),
        (["--set", "resources.exclude_slow_nodes=perhaps"], "exclude_slow_nodes"),
    ],
)
def test_bad_input_is_a_line_and_exit_code_2(tmp_path: Path, options: list[str], words: str) -> None:
    done = run_command(*options, cwd=tmp_path, module="orchestrator.accept")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
