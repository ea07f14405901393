"""Counters of energy and power that a fake sensor gives are integrated, with wraps, resets and gaps."""

import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.figures.energy import energy_figures
from tests.builders.training import plan_of, train
from trainers import energy
from trainers.contract import clock
from trainers.contract.channel import Placement
from trainers.contract.events import EnergySampled, Event, StepsDone
from trainers.energy import EnergyMeter, Sensor, SensorTotal, gpu_sensors, host_sensors, measured


def _total(kind: str, *readings: float | None, step: float = 1.0, wraps_at: float | None = None) -> tuple[float, float]:
    """Joules and lost seconds after readings at even times; None is a reading that fails."""
    values = iter(readings)

    def read() -> float:
        value = next(values)
        if value is None:
            raise OSError("gone")
        return value

    total = SensorTotal(Sensor("made", kind, read, wraps_at), 0.0)
    for number in range(1, len(readings)):
        total.update(number * step)
    return total.joules, total.lost_seconds((len(readings) - 1) * step)


def test_a_counter_gives_its_differences_wherever_it_began():
    assert _total("counter", 1000.0, 1250.0, 1250.0, 1700.0) == (700.0, 0.0)


def test_a_counter_that_cannot_be_read_for_a_while_misses_nothing():
    assert _total("counter", 100.0, None, None, 400.0) == (300.0, 0.0)


def test_a_counter_that_is_gone_is_missing_from_then_on():
    assert _total("counter", 100.0, 200.0, None, None) == (100.0, 2.0)


def test_a_counter_that_was_reset_misses_that_interval_only():
    assert _total("counter", 1000.0, 1100.0, 30.0, 130.0) == (200.0, 1.0)


def test_a_counter_that_wraps_goes_on():
    assert _total("counter", 65000.0, 65500.0, 36.0, 236.0, wraps_at=65536.0) == (500.0 + 72.0 + 200.0, 0.0)


def test_a_wrapping_counter_that_was_not_read_for_long_may_have_wrapped_twice():
    assert _total("counter", 100.0, 300.0, 500.0, step=61.0, wraps_at=65536.0) == (0.0, 122.0)


def test_power_is_integrated_as_a_straight_line_between_its_readings():
    assert _total("power", 100.0, 200.0, 200.0, 0.0) == (150.0 + 200.0 + 100.0, 0.0)


def test_power_is_not_made_up_for_a_gap():
    assert _total("power", 100.0, 100.0, None, None, 100.0, step=2.0) == (200.0, 6.0)


def test_a_sensor_that_cannot_be_read_at_first_is_none():
    with pytest.raises(OSError, match="gone"):
        _total("counter", None)


def _no_sensors() -> list[Sensor]:
    raise OSError("none here")


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that moves on a second with each look, from 100."""
    state = SimpleNamespace(now=99.0)

    def now() -> float:
        state.now += 1.0
        return state.now

    monkeypatch.setattr(clock, "now", now)
    return state


def _counting(*values: float) -> Sensor:
    readings = iter(values)
    return Sensor("made", "counter", lambda: next(readings))


def test_the_first_and_the_last_reading_are_sent_also_of_a_short_run(seconds):
    sent: list[dict[str, Any]] = []
    meter = EnergyMeter(
        lambda kind, **fields: sent.append(fields), "a", lambda: [_counting(5, 25), _counting(1, 2)], _no_sensors
    )
    with meter:
        pass
    assert [fields["times"] for fields in sent] == [(100.0,), (101.0,)]
    assert [fields["joules"] for fields in sent] == [(0.0,), (21.0,)]
    assert {(f["host"], f["source"], f["host_joules"], f["host_reason"], f["reason"]) for f in sent} == {
        ("a", "counter", None, "none here", "")
    }


def test_readings_are_sent_while_a_run_goes_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(energy, "READ_SECONDS", 0.001)
    sent, enough = [], threading.Event()

    def send(kind: type, **fields: Any) -> None:
        sent.append(kind(trial="t", attempt=0, rank=0, **fields))
        if len(sent) == 3:
            enough.set()

    steady = Sensor("made", "power", lambda: 100.0)
    with EnergyMeter(send, "a", lambda: [steady], lambda: [steady, steady]):
        assert enough.wait(600)
    times = [moment for event in sent for moment in event.times]
    joules = [value for event in sent for value in event.joules]
    assert times == sorted(times) and joules == sorted(joules)
    assert len(sent[1].times) == energy.READINGS_PER_EVENT
    assert all(event.kind == "energy_sampled" and event.source == "power" for event in sent)
    assert sent[-1].host_joules[-1] == pytest.approx(2 * joules[-1], abs=0.01)


def test_a_node_without_sensors_sends_the_reasons_and_starts_no_thread():
    sent: list[dict[str, Any]] = []
    before = set(threading.enumerate())  # others may end meanwhile
    with EnergyMeter(lambda kind, **fields: sent.append(fields), "a", _no_sensors, _no_sensors):
        assert set(threading.enumerate()) <= before
    (only,) = sent
    assert (only["joules"], only["host_joules"], only["source"]) == (None, None, None)
    assert only["reason"] == only["host_reason"] == "none here"


def _zone(root: Path, name: str, label: str, microjoules: str) -> Path:
    zone = root / name
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{label}\n")
    (zone / "max_energy_range_uj").write_text("262143328850\n")
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    return zone


def test_rapls_packages_and_memory_are_read_and_what_is_part_of_them_is_not(tmp_path: Path):
    _zone(tmp_path, "intel-rapl:0", "package-0", "1500000")
    _zone(tmp_path, "intel-rapl:0:0", "core", "900000")
    _zone(tmp_path, "intel-rapl:0:1", "dram", "250000")
    _zone(tmp_path, "intel-rapl:1", "psys", "9000000")
    _zone(tmp_path, "intel-rapl-mmio:0", "package-0", "1500000")
    sensors = host_sensors(tmp_path)
    assert [(sensor.name, sensor.read()) for sensor in sensors] == [
        ("intel-rapl:0 package-0", 1.5), ("intel-rapl:0:1 dram", 0.25),
    ]  # fmt: skip
    assert [sensor.wraps_at for sensor in sensors] == [pytest.approx(262143.328850)] * 2


@pytest.mark.parametrize("content", ["", "many"])
def test_a_counter_of_rapl_that_holds_no_number_is_the_reason(tmp_path: Path, content: str):
    zone = _zone(tmp_path, "intel-rapl:0", "package-0", content)
    with pytest.raises(OSError, match=str(zone / "energy_uj")):
        host_sensors(tmp_path)


def test_a_host_without_rapl_says_so(tmp_path: Path):
    with pytest.raises(OSError, match="no RAPL counters"):
        host_sensors(tmp_path / "missing")


def test_counters_that_only_root_may_read_are_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _zone(tmp_path, "intel-rapl:0", "package-0", "1")
    real = Path.read_text

    def refused(path: Path, **options: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(OSError, match=r"energy_uj is for root alone"):
        host_sensors(tmp_path)


class NvmlError(Exception):
    """Any error of NVML."""


class NotSupportedError(NvmlError):
    """NVML's answer where a GPU does not have something."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """NVML of three GPUs: the second has its power only, the third nothing."""

    def energy_of(handle: str) -> int:
        if handle != "GPU-0":
            raise NotSupportedError("Not Supported")
        return 7_654_321

    def power_of(handle: str) -> int:
        if handle == "GPU-2":
            raise NvmlError("Unknown Error")
        return 250_500

    made = SimpleNamespace(
        NVMLError=NvmlError, NVMLError_NotSupported=NotSupportedError, nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=str, nvmlDeviceGetTotalEnergyConsumption=energy_of, nvmlDeviceGetPowerUsage=power_of,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=index))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    return made


def test_gpus_count_their_energy_and_older_ones_give_their_power(nvml):
    counter, power = gpu_sensors(2)
    assert (counter.kind, counter.read(), counter.wraps_at) == ("counter", 7654.321, None)
    assert (power.kind, power.read()) == ("power", 250.5)


def test_a_gpu_that_measures_nothing_is_the_reason(nvml):
    with pytest.raises(OSError, match="NVML does not measure the GPUs' energy: Unknown Error"):
        gpu_sensors(3)


def test_gpus_that_a_worker_does_not_see_are_the_reason(nvml):
    with pytest.raises(OSError, match="a worker sees 3 of the 8 GPUs"):
        gpu_sensors(8)


def test_a_gpu_that_fails_later_is_a_gap_and_no_error(nvml, monkeypatch: pytest.MonkeyPatch):
    total = SensorTotal(gpu_sensors(1)[0], 0.0)

    def lost(handle: str) -> int:
        raise NvmlError("GPU is lost")

    monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", lost)
    total.update(3.0)
    assert (total.joules, total.lost_seconds(3.0)) == (0.0, 3.0)


@pytest.mark.parametrize(("local_rank", "number"), [(0, 1), (1, 0)])
def test_one_rank_of_a_node_measures(local_rank: int, number: int):
    sent = []
    with measured(lambda kind, **fields: sent.append(kind), Placement(2 + local_rank, 4, local_rank, 2, "b"), "cpu"):
        pass
    assert set(sent) <= {EnergySampled} and bool(sent) == bool(number)


@pytest.mark.train
def test_a_trained_run_has_the_energy_of_its_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    zone = _zone(tmp_path / "powercap", "intel-rapl:0", "package-0", "5000000")

    def use(event: Event) -> None:
        if isinstance(event, StepsDone):  # 2 J for each window, as the processors count it
            used = int((zone / "energy_uj").read_text())
            (zone / "energy_uj").write_text(f"{used + 2_000_000}\n")

    monkeypatch.setattr(energy, "host_sensors", lambda: host_sensors(tmp_path / "powercap"))
    plan = plan_of(tmp_path, "mask_rcnn")
    events = train(plan, act=use)
    windows = [event for event in events if isinstance(event, StepsDone)]
    found = energy_figures(plan, events, windows, windows[-1].time)
    assert len(windows) > 2 and found.joules == pytest.approx(2.0 * len(windows)) == found.host_joules
    assert found.training_joules + found.evaluation_joules + found.idle_joules == pytest.approx(found.joules)
    assert found.joules_per_image > 0 and found.source == "counter" and found.reason == ""
    assert [(node.host, node.joules) for node in found.nodes] == [("here", found.joules)]
