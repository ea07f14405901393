"""Training in this process that can be stopped or killed at an iteration, and its events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.data.generate import generate
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.spec import Experiment
from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment
from tests.builders.waiting import wait_for
from trainers.contract.channel import Channel, Command, Placement
from trainers.contract.events import CheckpointSaved, Event, StepsDone
from trainers.contract.plan import TrialPlan
from trainers.rank import Rank

RETINANET = {key: value for key, value in TINY_OVERRIDES.items() if not key.startswith(("MODEL.ROI", "MODEL.RPN"))} | {
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 50,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
}
MODELS: dict[str, dict[str, Any]] = {
    "mask_rcnn": {"weights": "", "overrides": TINY_OVERRIDES},
    "retinanet": {
        "weights": "",
        "config": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "overrides": RETINANET,
    },
}


class Died(BaseException):
    """Ends a rank as a signal would: nothing of it may be caught."""


def plan_of(folder: Path, model: str) -> TrialPlan:
    values = tiny_experiment(
        model=MODELS[model],
        protocol={"iterations": 12, "eval_period_iterations": 6, "warmup_iterations": 2},
        storage={"checkpoint_period_iterations": 4},
    )
    experiment = Experiment.model_validate(values)
    assert experiment.data.generated is not None
    generate(folder / "data", **experiment.data.generated.model_dump())
    (plan,) = expand(experiment, Hardware(num_cpus=1), str(folder / "run"), folder / "data")
    return plan


def train(
    plan: TrialPlan,
    attempt: int = 0,
    *,
    stop_at: int | None = None,
    die_at: int | None = None,
    act: Callable[[Event], None] = lambda event: None,
) -> list[Event]:
    """Trains in this process; asked to stop a window before `stop_at`, dead at the end of the window of `die_at`.

    `act` is called with every event, and training waits for it. One that dies has written the checkpoints that it
    began: the thread that writes them would otherwise live on here, next to the next attempt.
    """
    events: list[Event] = []
    command: list[Command] = ["run"]
    begun: list[int] = []  # checkpoints: each begins with a flush

    def all_saved() -> bool:
        return sum(isinstance(event, CheckpointSaved) for event in events) == len(begun)

    def push(event: Event) -> None:
        events.append(event)
        act(event)
        if isinstance(event, StepsDone) and stop_at is not None and event.iteration == stop_at - 2:
            command[0] = "stop"
            wait_for(lambda: rank.pulse.command == "stop")
        if isinstance(event, StepsDone) and event.iteration == die_at:
            wait_for(all_saved)
            raise Died

    channel = Channel(push=push, beat=lambda heartbeat: command[0], flush=lambda: begun.append(len(events)))
    rank = Rank(plan, attempt, Placement(0, 1, 0, 1, "here"), channel)
    try:
        rank.train(0.0)
    except Died:
        assert die_at is not None
    return events


def last(events: list[Event], kind: type[Any]) -> Any:
    return [event for event in events if isinstance(event, kind)][-1]
