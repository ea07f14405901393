"""The training function that Ray Train calls on every worker.

The driver imports this file to name the function, so torch and detectron2 are imported inside it.
The function runs in a thread that is not the main one, in a process whose working directory is Ray's: paths are
absolute here, and nothing installs Python's signal handlers.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from trainers import flight_recorder, stacks
from trainers.canary import find_port
from trainers.contract import clock
from trainers.contract.channel import Channel, Command, Placement, Start
from trainers.contract.events import ClockChanged, Heartbeat
from trainers.contract.plan import TrialPlan

logger = logging.getLogger(__name__)

BEFORE_STEP_VARIABLE = "BENCHMARK_BEFORE_STEP"
"""Names a function as `module:function`; it is called once per rank and returns the function to call before steps."""

CONFIRM_TIMEOUT_SECONDS = 30.0
"""Longest wait for the driver to confirm that it has events; after it, the worker goes on without a new checkpoint,
or asks again for its last one."""

PERSISTED_POLL_INTERVAL_SECONDS = 0.05
"""How often a worker asks whether they are on the driver's disk."""

BEAT_TIMEOUT_SECONDS = 10.0
"""Longest wait for the driver's command."""

PREEMPTION_POLL_INTERVAL_SECONDS = 1.0
"""How often Ray Train is asked whether a node is about to be taken away."""


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Ray Train's entry: trains one rank of a trial.

    Args:
        config: `start` (Start) of a worker that trains at once, or `gate` (handle of the actor) of one that waits there
            for its start; `clock` (the driver's, from `clock.anchor`).
    """
    start: Start = config["start"] if "start" in config else _wait_for_start(config["gate"])
    same_machine = _take_clock(config["clock"], start.telemetry)
    entered = clock.now()
    stacks.answer_requests()
    import ray
    import ray.train

    context = ray.train.get_context()
    placement = Placement(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        host=ray.util.get_node_ip_address(),
        node_id=ray.get_runtime_context().get_node_id(),
    )
    channel = _channel(start.telemetry, _watch_for_preemption())
    from trainers.rank import Rank  # torch and detectron2: seconds that belong to the clock

    flight_recorder.hide(placement.rank)
    plan = start.plan
    reserved = (
        {"start_evaluating": partial(RayEvaluators, start.telemetry)}
        if plan.evaluation_gpus or plan.evaluation_cpus
        else {}
    )
    rank = Rank(plan, start.attempt, placement, channel, before_step(), **reserved)
    if not (same_machine or placement.local_rank) and abs(deviation := clock.deviation()) > clock.TOLERANCE_SECONDS:
        rank.send(ClockChanged, seconds=deviation)
    rank.train(entered)


def _take_clock(anchor: str, telemetry: Any) -> bool:
    """Takes over the driver's clock, from another machine via the actor there; returns whether it is on this one."""
    import ray

    if clock.adopt(anchor):
        return True
    try:
        clock.follow(lambda: float(ray.get(telemetry.now.remote(), timeout=CONFIRM_TIMEOUT_SECONDS)))
    except ray.exceptions.RayError as error:  # the loss of that actor ends the attempt
        logger.warning("the driver's clock is not known: %s", error)
    return False


def _wait_for_start(gate: Any) -> Start:
    """Waits next to workers that train, with all imported that training needs."""
    import ray

    import trainers.rank  # noqa: F401 - torch and detectron2

    ray.get(gate.called.remote())
    start: Start = ray.get(gate.take.remote())
    return start


def before_step() -> Callable[[], None]:
    """The function that `$BENCHMARK_BEFORE_STEP` asks for; one that does nothing where it is not set."""
    name = os.environ.get(BEFORE_STEP_VARIABLE)
    function: Callable[[], None] = pkgutil.resolve_name(name)() if name else lambda: None
    return function


class RayEvaluators:
    """Servers that evaluate on what a trial reserves for it, wherever Ray finds room; they end with this process.

    See `trainers.evaluation_server.Evaluating`.
    """

    def __init__(self, telemetry: Any, plan: TrialPlan) -> None:
        import ray

        from trainers.evaluation_server import EvaluationServer

        class Server(EvaluationServer):
            def __init__(self, plan: TrialPlan, device: str, anchor: str, rank: int, world_size: int) -> None:
                _take_clock(anchor, telemetry)
                super().__init__(plan, device, anchor, rank, world_size)

            def address(self) -> str:
                return f"{ray.util.get_node_ip_address()}:{find_port()}"

        self._timeout = plan.timeouts["evaluation"]
        number, device = max(plan.evaluation_gpus, 1), "cuda" if plan.evaluation_gpus else "cpu"
        resources = {
            "num_cpus": plan.evaluation_cpus or plan.cpus_per_worker,
            "num_gpus": int(device == "cuda"),
            "scheduling_strategy": "DEFAULT",  # not among what the workers have reserved
        }
        start: Any = ray.remote(Server).options(**resources).remote
        self._servers: list[Any] = [start(plan, device, clock.anchor(), rank, number) for rank in range(number)]
        address = self._servers[0].address.remote() if number > 1 else ""
        for server in self._servers:
            server.set_up.remote(address)

    def evaluate(self, iteration: int, values: list[dict[str, float]], weights: Any) -> Any:
        """As `Evaluating.evaluate`; what is lost with one of several servers is lost."""
        import ray

        from trainers.evaluation_server import EvaluatorLostError, answer

        try:
            sent = ray.put(weights)
            calls = waiting = [server.evaluate.remote(iteration, values, sent) for server in self._servers]
            deadline = time.monotonic() + self._timeout
            while waiting:
                done, waiting = ray.wait(waiting, timeout=max(deadline - time.monotonic(), 0.0))
                if not done:
                    raise EvaluatorLostError(f"it took longer than {self._timeout:g} s (faults.timeouts.evaluation)")
                answer(ray.get(done[0]))
            return answer(ray.get(calls[0]))
        except ray.exceptions.RayError as error:
            raise EvaluatorLostError(str(error).splitlines()[0]) from error

    def end(self) -> None:
        """As `Evaluating.end`."""
        import ray

        for server in self._servers:
            ray.kill(server)


def _channel(telemetry: Any, preemption: threading.Event) -> Channel:
    """The connection to the driver via the telemetry actor."""
    import ray

    def received() -> int:
        # Calls of one process are answered in order: when this one is, all that was pushed before was received.
        return int(ray.get(telemetry.received.remote(), timeout=CONFIRM_TIMEOUT_SECONDS))

    def persisted() -> bool:
        number, deadline = received(), time.monotonic() + CONFIRM_TIMEOUT_SECONDS
        while ray.get(telemetry.persisted.remote(), timeout=CONFIRM_TIMEOUT_SECONDS) < number:
            if time.monotonic() > deadline:
                return False
            time.sleep(PERSISTED_POLL_INTERVAL_SECONDS)
        return True

    def beat(heartbeat: Heartbeat) -> Command:
        command: Command = ray.get(telemetry.beat.remote(heartbeat), timeout=BEAT_TIMEOUT_SECONDS)
        return "preempt" if command == "run" and preemption.is_set() else command

    def flush() -> None:
        _answer(received)

    return Channel(
        push=lambda event: telemetry.push.remote(event),
        beat=beat,
        flush=flush,
        wait_until_persisted=lambda: bool(_answer(persisted)),
    )


def _answer(ask: Callable[[], int]) -> int | None:
    """The driver's answer; None where there is none, because training goes on while the driver is away for a while."""
    try:
        return ask()
    except Exception as error:  # noqa: BLE001 - whatever Ray raises for an actor that is lost or does not answer
        logger.warning("the driver does not confirm what it has: %r", error)
        return None


def _watch_for_preemption() -> threading.Event:
    """An event that is set once a node of this trial is about to be taken away."""
    import ray.train

    announced = threading.Event()

    def watch() -> None:
        while not announced.is_set():
            try:
                info = ray.train.get_preemption_info()
            except Exception as error:  # noqa: BLE001 - whatever Ray raises while the trial's actors are being ended
                logger.debug("no longer watching for preemption: %r", error)
                return
            if info is not None:
                announced.set()
            time.sleep(PREEMPTION_POLL_INTERVAL_SECONDS)

    # In a thread on every rank: the question is a barrier, for which training must not wait.
    if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0":
        threading.Thread(target=watch, name="preemption", daemon=True).start()
    return announced
