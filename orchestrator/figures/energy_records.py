"""The energy of a trial in its record."""

from __future__ import annotations

from typing import Literal

from orchestrator.figures.record import Record


class NodeEnergy(Record):
    """Energy of one host; joules as in `Energy`."""

    host: str
    joules: float | None = None
    """Of the devices that the trial computed on there."""
    host_joules: float | None = None
    """Of all its processors and its memory."""


class Energy(Record):
    """Energy of the devices that a trial computes on, all hosts together (`energy.` in the catalogue).

    On GPUs these are its GPUs, on CPUs the processors of its hosts, whatever else they do.
    """

    joules: float | None = None
    joules_per_image: float | None = None
    watt_hours_to_target: float | None = None
    training_joules: float | None = None
    evaluation_joules: float | None = None
    idle_joules: float | None = None
    host_joules: float | None = None
    cost: float | None = None
    cost_to_target: float | None = None
    carbon_grams: float | None = None
    carbon_grams_to_target: float | None = None
    source: Literal["counter", "power"] | None = None
    """The devices' own counters, or samples of their power integrated over time."""
    reason: str = ""
    """Why figures are null, or what is missing from them, for a person."""
    nodes: list[NodeEnergy] = []
    """By host."""
