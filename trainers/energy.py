"""Measures the energy that a node's devices take, from their own counters: one rank of each node reads them.

A GPU counts its joules (NVML, Volta and later) or at least reports its power, which is integrated over time; processors
count theirs (RAPL). What can be read on none of these ways is not measured, and the reason is sent instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trainers.contract import clock
from trainers.contract.channel import Placement
from trainers.contract.events import EnergySampled

READ_SECONDS = 1.0
"""Time between two readings, in a thread next to training."""

READINGS_PER_EVENT = 10

MAX_POWER_GAP_SECONDS = 5.0
"""Longest time between two readings of a power over which it is integrated."""

MAX_WRAP_GAP_SECONDS = 60.0
"""Longest time between two readings of a counter that begins again from 0: RAPL's takes a minute at 1 kW at least."""

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows RAPL's counters (Documentation/power/powercap/powercap.rst)."""


@dataclass(frozen=True, slots=True)
class Sensor:
    """What a device measures of itself."""

    name: str
    kind: Literal["counter", "power"]
    read: Callable[[], float]
    """Joules so far, or watts now; raises OSError where it cannot be read."""
    wraps_at: float | None = None
    """Joules at which the counter begins again from 0; None for never."""


class SensorTotal:
    """Joules of one sensor since its first reading; wraps, resets and gaps of it are found here.

    Args:
        sensor: What is read.
        now: The time (Unix seconds).

    Raises:
        OSError: It cannot be read.
    """

    def __init__(self, sensor: Sensor, now: float) -> None:
        self._sensor = sensor
        self._value, self._since = sensor.read(), now
        self._lost = 0.0
        self.kind, self.joules = sensor.kind, 0.0

    def update(self, now: float) -> None:
        """Reads the sensor; one that cannot be read now may be read again later."""
        try:
            value = self._sensor.read()
        except OSError:
            return
        gained = self._gained(value, now - self._since)
        if gained is None:
            self._lost += now - self._since
        else:
            self.joules += gained
        self._value, self._since = value, now

    def lost_seconds(self, now: float) -> float:
        """How long it has not been measured, so far."""
        return self._lost + now - self._since

    def _gained(self, value: float, seconds: float) -> float | None:
        """Joules since the last reading; None where the readings do not say."""
        if self._sensor.kind == "power":
            return (self._value + value) / 2 * seconds if seconds <= MAX_POWER_GAP_SECONDS else None
        gained = value - self._value
        if self._sensor.wraps_at is None:
            return gained if gained >= 0 else None  # its driver was started again
        if seconds > MAX_WRAP_GAP_SECONDS:
            return None
        return gained if gained >= 0 else gained + self._sensor.wraps_at


class EnergyMeter:
    """Reads sensors within its `with` block, and sends what they sum up to.

    Args:
        send: Sends an event of the given class with the given fields, without waiting.
        host: Name of this node.
        find_devices: Finds the sensors of what the trial computes on; raises OSError with the reason for none.
        find_host: Likewise for the processors and the memory of this node.
    """

    def __init__(
        self,
        send: Callable[..., None],
        host: str,
        find_devices: Callable[[], Sequence[Sensor]],
        find_host: Callable[[], Sequence[Sensor]],
    ) -> None:
        self._send_event, self._host = send, host
        now = clock.now()
        self._devices, self._reason = _totals(find_devices, now)
        self._processors, self._host_reason = _totals(find_host, now)
        self._source = "power" if any(total.kind == "power" for total in self._devices) else "counter"
        self._readings: list[tuple[float, float, float]] = [(now, 0.0, 0.0)]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="energy", daemon=True)

    def __enter__(self) -> None:
        self._send()
        if self._devices or self._processors:
            self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=10)
            self._read()
            self._send()

    def _run(self) -> None:
        while not self._ended.wait(READ_SECONDS):
            self._read()
            if len(self._readings) >= READINGS_PER_EVENT:
                self._send()

    def _read(self) -> None:
        now = clock.now()
        for total in (*self._devices, *self._processors):
            total.update(now)
        self._readings.append((now, _joules(self._devices), _joules(self._processors)))

    def _send(self) -> None:
        """Sends the readings since the last event; without sensors, the reasons."""
        times, joules, host_joules = zip(*self._readings, strict=True)
        now = times[-1]
        self._send_event(
            EnergySampled,
            time=now,
            host=self._host,
            times=_rounded(times),
            joules=_rounded(joules) if self._devices else None,
            host_joules=_rounded(host_joules) if self._processors else None,
            source=self._source if self._devices else None,
            lost_seconds=max((total.lost_seconds(now) for total in self._devices), default=0.0),
            reason=self._reason,
            host_reason=self._host_reason,
        )
        self._readings = []


def measured(
    send: Callable[..., None], placement: Placement, device: Literal["cuda", "cpu"]
) -> AbstractContextManager[None]:
    """A context in which the energy of this node is measured, if it is this rank that does so on its node."""
    if placement.local_rank:
        return nullcontext()
    host = host_sensors
    return EnergyMeter(
        send, placement.host, (lambda: gpu_sensors(placement.local_world_size)) if device == "cuda" else host, host
    )


def gpu_sensors(number: int) -> list[Sensor]:
    """Sensors of the first GPUs that this process sees: those of its node's workers, as Ray Train sets them.

    Raises:
        OSError: One of them cannot be read.
    """
    import pynvml

    if torch.cuda.device_count() < number:
        raise OSError(f"a worker sees {torch.cuda.device_count()} of the {number} GPUs of its host's workers")
    names = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(number)]
    try:
        pynvml.nvmlInit()
        return [_gpu_sensor(pynvml, pynvml.nvmlDeviceGetHandleByUUID(name), name) for name in names]
    except pynvml.NVMLError as error:
        raise OSError(f"NVML does not measure the GPUs' energy: {error}") from error


def _gpu_sensor(nvml: Any, handle: Any, name: str) -> Sensor:
    """The GPU's energy counter (millijoules), or its power (milliwatts) where it has none: before Volta."""

    def read(call: Callable[[Any], int]) -> float:
        try:
            return call(handle) / 1000
        except nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    try:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError_NotSupported:
        nvml.nvmlDeviceGetPowerUsage(handle)
        return Sensor(name, "power", lambda: read(nvml.nvmlDeviceGetPowerUsage))
    return Sensor(name, "counter", lambda: read(nvml.nvmlDeviceGetTotalEnergyConsumption))


def host_sensors(root: Path = POWERCAP) -> list[Sensor]:
    """RAPL's counters of the processors' packages and of the memory that is not in them.

    Raises:
        OSError: There are none, or only root may read them.
    """
    sensors = []
    for zone in sorted(root.glob("intel-rapl:*")):  # AMD's processors are under this name too
        name = (zone / "name").read_text(encoding="ascii").strip()
        if name.startswith("package") or name == "dram":
            sensors.append(_zone_sensor(zone, name))
    if not sensors:
        raise OSError(f"this host shows no RAPL counters in {root}, as most virtual machines")
    return sensors


def _zone_sensor(zone: Path, name: str) -> Sensor:
    def read(file: str = "energy_uj") -> float:
        try:
            return int((zone / file).read_text(encoding="ascii")) / 1e6
        except PermissionError as error:
            raise OSError(f"{zone / file} is for root alone") from error
        except ValueError as error:
            raise OSError(f"{zone / file}: {error}") from error

    read()
    return Sensor(f"{zone.name} {name}", "counter", read, wraps_at=read("max_energy_range_uj"))


def _totals(find: Callable[[], Sequence[Sensor]], now: float) -> tuple[list[SensorTotal], str]:
    """Totals of the sensors that are found, or none and the reason."""
    try:
        return [SensorTotal(sensor, now) for sensor in find()], ""
    except OSError as error:
        return [], str(error)


def _joules(totals: Sequence[SensorTotal]) -> float:
    return sum(total.joules for total in totals)


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, 3) for value in values)
