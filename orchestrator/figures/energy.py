"""Energy of a trial from the readings of its nodes: in all, by section, for an image, to the targets.

Between two readings, which are a second apart, a device takes energy evenly. Nothing is measured while no worker runs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.figures.energy_records import Energy, NodeEnergy
from orchestrator.figures.logged_plan import Plan
from orchestrator.figures.sections import loop_runs
from orchestrator.figures.steps import after_warmup
from trainers.contract.events import EnergySampled, Evaluated, Event, StepsDone, WorkerStarted
from trainers.contract.plan import TrialPlan

JOULES_PER_WATT_HOUR = 3600.0

MAX_LOST_SHARE = 0.05
"""Share of the time that may be missing from the readings; above it the figures are null."""

Span = tuple[float, float]
"""From and to (Unix seconds)."""


@dataclass(slots=True)
class _Readings:
    """The readings of one node in one attempt."""

    host: str
    times: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    """Since the first of them; empty where they were not measured."""
    lost_seconds: float = 0.0
    reason: str = ""

    @property
    def total(self) -> float:
        """Joules of all of them."""
        return self.joules[-1] - self.joules[0] if self.joules else 0.0

    @property
    def seconds(self) -> float:
        """How long they go on."""
        return self.times[-1] - self.times[0] if self.times else 0.0

    def until(self, moment: float) -> float:
        """Joules until a moment, by linear interpolation."""
        after = bisect_right(self.times, moment)
        if after in (0, len(self.times)):
            return self.total if after else 0.0
        (begin, end), (low, high) = self.times[after - 1 : after + 1], self.joules[after - 1 : after + 1]
        return low - self.joules[0] + (high - low) * (moment - begin) / (end - begin)


def energy_figures(plan: Plan, events: Sequence[Event], steps: Sequence[StepsDone], met_at: float | None) -> Energy:
    """The energy of a trial.

    Args:
        plan: The trial.
        events: All its events, of every attempt.
        steps: The windows of steps that count for its throughput.
        met_at: When its targets were met (Unix seconds); None for never.
    """
    sampled = [event for event in events if isinstance(event, EnergySampled)]
    nodes, hosts = _readings(sampled, "joules"), _readings(sampled, "host_joules")
    reason = _missing(nodes, events)
    energy = Energy(
        reason=reason or "; ".join(_left_out(plan, nodes, events)),
        host_joules=None if _missing(hosts, events) else sum(node.total for node in hosts.values()),
        nodes=_by_host(nodes, hosts),
    )
    if reason:
        return energy
    figures: dict[str, Any] = {"joules": sum(node.total for node in nodes.values())}
    training, evaluating = _sections(nodes.values(), events)
    figures["training_joules"], figures["evaluation_joules"] = training, evaluating
    figures["idle_joules"] = figures["joules"] - training - evaluating
    figures["joules_per_image"] = _per_image(nodes.values(), steps, plan.throughput_warmup_iters)
    if met_at is not None:
        figures["watt_hours_to_target"] = sum(node.until(met_at) for node in nodes.values()) / JOULES_PER_WATT_HOUR
    source = "power" if any(event.source == "power" for event in sampled) else "counter"
    return energy.model_copy(update={**figures, **_priced(plan, figures), "source": source})


def _readings(sampled: Sequence[EnergySampled], name: str) -> dict[tuple[int, int], _Readings]:
    """The readings by attempt and rank; `name` is the event's field."""
    nodes: dict[tuple[int, int], _Readings] = {}
    for event in sampled:
        node = nodes.setdefault((event.attempt, event.rank), _Readings(event.host))
        values = getattr(event, name)
        if values is None:
            node.reason = event.reason if name == "joules" else event.host_reason
            continue
        node.times += event.times
        node.joules += values
        node.lost_seconds = event.lost_seconds
    return nodes


def _missing(nodes: dict[tuple[int, int], _Readings], events: Sequence[Event]) -> str:
    """Why the energy of all nodes together is not known; "" where it is."""
    if not nodes:
        return "its events hold no energy"
    for node in nodes.values():
        if not node.joules:
            return f"{node.host}: {node.reason}"
    for event in events:
        if isinstance(event, WorkerStarted) and not event.local_rank and (event.attempt, event.rank) not in nodes:
            return f"{event.host}: no reading arrived from it in attempt {event.attempt}"
    lost, whole = _lost_seconds(nodes, events)
    if lost > MAX_LOST_SHARE * whole:
        return f"{lost:.1f} of {whole:.1f} s of the nodes were not measured"
    return ""


def _left_out(plan: Plan, nodes: dict[tuple[int, int], _Readings], events: Sequence[Event]) -> Iterator[str]:
    """What is not in the figures."""
    lost, whole = _lost_seconds(nodes, events)
    if lost >= 1:
        yield f"{lost:.1f} of {whole:.1f} s of the nodes are missing from it"
    if isinstance(plan, TrialPlan) and plan.evaluation_gpus:
        yield f"the {plan.evaluation_gpus} GPUs that are reserved for evaluations are not in it"


def _lost_seconds(nodes: dict[tuple[int, int], _Readings], events: Sequence[Event]) -> Span:
    """Seconds of the nodes that were not measured, and all of them: a killed process takes its last readings along."""
    last = {run.attempt: run.last_progress for run in loop_runs(events)}
    lost = whole = 0.0
    for (attempt, _), node in nodes.items():
        if node.joules:
            cut_off = max(last.get(attempt, 0.0) - node.times[-1], 0.0)
            lost, whole = lost + node.lost_seconds + cut_off, whole + node.seconds + cut_off
    return lost, whole


def _sections(nodes: Iterable[_Readings], events: Sequence[Event]) -> Span:
    """Joules of the steps, and of the evaluations for which training waited."""
    spans: list[tuple[float, float, bool]] = []
    for event in events:
        if isinstance(event, StepsDone) and event.rank == 0:
            spans.append((event.time - event.seconds, event.time, True))
        elif isinstance(event, Evaluated) and not event.overlapped and event.seconds is not None:
            spans.append((event.time - event.seconds, event.time, False))
    joules = {True: 0.0, False: 0.0}
    taken = 0.0  # no moment counts twice
    for begin, end, is_training in sorted(spans):
        begin = max(begin, taken)
        if end > begin:
            joules[is_training] += _between(nodes, begin, end)
            taken = end
    return joules[True], joules[False]


def _per_image(nodes: Iterable[_Readings], steps: Sequence[StepsDone], warmup_iters: int) -> float | None:
    """Joules of the steps after the warm-up over the images of all ranks in them; None where there are none."""
    images = joules = 0.0
    for step in steps:
        if rest := after_warmup(step, warmup_iters):
            images += rest.num_images
            joules += _between(nodes, step.time - rest.seconds, step.time) if step.rank == 0 else 0.0
    return joules / images if images else None


def _between(nodes: Iterable[_Readings], begin: float, end: float) -> float:
    return sum(node.until(end) - node.until(begin) for node in nodes)


def _priced(plan: Plan, figures: dict[str, Any]) -> dict[str, float | None]:
    """What the energy costs and emits, in all and to the targets; None without a price or a grid intensity."""
    to_target = figures.get("watt_hours_to_target")
    kwh = {"": figures["joules"] / JOULES_PER_WATT_HOUR / 1000, "_to_target": to_target and to_target / 1000}
    return {
        f"{name}{part}": None if factor is None or amount is None else factor * amount
        for name, factor in (("cost", plan.price_per_kwh), ("carbon_grams", plan.carbon_grams_per_kwh))
        for part, amount in kwh.items()
    }


def _by_host(nodes: dict[tuple[int, int], _Readings], hosts: dict[tuple[int, int], _Readings]) -> list[NodeEnergy]:
    joules: dict[str, dict[str, float]] = defaultdict(dict)
    for name, readings in (("joules", nodes), ("host_joules", hosts)):
        for node in readings.values():
            own = joules[node.host]
            if node.joules:
                own[name] = own.get(name, 0.0) + node.total
    return [NodeEnergy(host=host, **own) for host, own in sorted(joules.items())]
