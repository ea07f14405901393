"""A tiny model that trains on padded batches and on records, and loops that train it with and without graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss

from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from tests.builders.experiments import tiny_experiment
from tests.builders.padded_batches import padded, random_records
from tests.builders.tape import TapeCapture
from trainers import hooks, mask_rcnn
from trainers.batching import Batch
from trainers.contract.events import StepsDone
from trainers.contract.plan import TrialPlan
from trainers.ema import WeightAverage
from trainers.hooks import state_sha256
from trainers.loop import TrainingLoop
from trainers.pulse import Activity
from trainers.speedups.padded_batch import PaddedBatch

CPU = torch.device("cpu")
WIDE, TALL = (32, 64), (64, 32)


class TinyDetector(nn.Module):
    """Classifies the objects of an image by its features and a random choice of its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.stem.to(memory_format=torch.channels_last)
        self.classes, self.places = nn.Linear(8 + 4, 3), nn.Linear(8, 4)

    def forward(self, inputs: PaddedBatch | list[dict[str, Any]]) -> dict[str, Tensor]:
        if not isinstance(inputs, PaddedBatch):
            inputs = padded(inputs, (64, 64))
        features = self.stem(inputs.images / 57.0)
        chosen = torch.rand(features.shape[2:]) < 0.5
        pooled = torch.where(chosen, features, 0.0).mean(dim=(2, 3))
        valid_mask = torch.arange(inputs.boxes.shape[1]) < inputs.num_objects[:, None]
        boxes = inputs.boxes / inputs.sizes.flip(1).repeat(1, 2)[:, None]
        objects = torch.cat([pooled[:, None].expand(-1, boxes.shape[1], -1), boxes], dim=2)
        losses = cross_entropy(self.classes(objects).transpose(1, 2), inputs.classes, reduction="none")
        mean_box = (boxes * valid_mask[..., None]).sum(dim=1) / inputs.num_objects[:, None]
        return {
            "loss_cls": (losses * valid_mask).sum() / inputs.num_objects.sum(),
            "loss_box": smooth_l1_loss(self.places(pooled), mean_box),
        }


def plan_of(folder: Path, **changes: Any) -> TrialPlan:
    """A plan without data: 12 iterations, windows of 2, with clipping and a schedule."""
    (plan,) = expand(parse_experiment(tiny_experiment(), "test"), Hardware(num_cpus=1), str(folder), folder)
    solver = dataclasses.replace(plan.solver, max_iter=12, steps=(8,), warmup_iters=3, base_lr=0.1)
    return dataclasses.replace(plan, solver=solver, **changes)


def batch_of(iteration: int, rank: int = 0, *, records_at: Sequence[int] = ()) -> Batch:
    """A batch of two images that depends on iteration and rank: wide and tall by turns, records at some iterations."""
    canvas = TALL if (iteration + rank) % 3 == 2 else WIDE
    sizes = [(canvas[0] - iteration % 5, canvas[1]), (canvas[0], canvas[1] - iteration)]
    records = random_records(sizes, [1 + iteration % 4, 2], seed=100 * rank + iteration)
    files = tuple(record["file_name"] for record in records)
    shape = (len(records), *canvas)
    return Batch(records if iteration in records_at else padded(records, canvas), files, shape)


class Collect:
    """A hook that keeps what the progress hook sends."""

    every_window = True

    def __init__(self, plan: TrialPlan) -> None:
        self.events: list[dict[str, Any]] = []
        self._progress = hooks.ProgressHook(plan, lambda kind, **fields: self.events.append({"kind": kind, **fields}))

    def due(self, iteration: int, ending: bool) -> bool:
        return self._progress.due(iteration, ending)

    def run(self, loop: TrainingLoop) -> None:
        self._progress.run(loop)
        assert self.events[-1].pop("kind") is StepsDone


@dataclasses.dataclass
class Trained:
    """A loop that has run to its end."""

    loop: TrainingLoop
    capture: TapeCapture | None
    events: list[dict[str, Any]]

    @property
    def state(self) -> dict[str, Any]:
        return hooks.training_state(self.loop)

    @property
    def sha256(self) -> str:
        """Of weights, momentum, schedule and scaler."""
        return state_sha256(self.state)


def train(
    plan: TrialPlan,
    *,
    graphs: bool,
    resume: dict[str, Any] | None = None,
    stop_at: int | None = None,
    rank: int = 0,
    build: Callable[[], nn.Module] = TinyDetector,
    batch: Callable[[int, int], Batch] = batch_of,
    more_hooks: Sequence[Any] = (),
    ema_decay: float | None = None,
) -> Trained:
    """Trains a model to the end of the plan, or to `stop_at`, from its start or a state, on batches of an iteration."""
    torch.manual_seed(0)
    model = build()
    optimizer, scheduler = mask_rcnn.build_solver(mask_rcnn.build_config(plan), model, plan.recipe)
    capture = capture_of(model) if graphs else None
    start = resume["iteration"] if resume else 0
    collect = Collect(plan)
    loop = TrainingLoop(
        plan,
        mask_rcnn.distribute(model, CPU, plan.world_size, graphs=graphs),
        optimizer,
        scheduler,
        (batch(iteration, rank) for iteration in range(start, 1000)),
        [collect, *more_hooks],
        CPU,
        rank,
        start,
        Activity(),
        request=lambda: "stop" if loop.iteration == stop_at else "run",
        capture=capture,
        average=WeightAverage(model, ema_decay) if ema_decay else None,
    )
    if resume:
        hooks.restore(loop, {**resume, "ranks": [{}]})
    loop.run()
    return Trained(loop, capture, collect.events)


def capture_of(model: nn.Module) -> TapeCapture:
    """What captures a model's passes on tapes."""

    def lasting() -> list[Tensor]:
        weights = list(model.parameters())
        return [*weights, *(weight.grad for weight in weights if weight.grad is not None), *model.buffers()]

    return TapeCapture(lasting)
