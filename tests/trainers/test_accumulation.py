"""Batches whose gradients add up are the step of one large batch, where the model's losses allow it."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.builders.graphs import batch_of, plan_of, train
from tests.builders.ranks import spawn_ranks
from tests.builders.training import last
from tests.builders.training import plan_of as plan_of_rank
from tests.builders.training import train as train_rank
from trainers.batching import Batch
from trainers.contract.events import LoopFinished, StepsDone
from trainers.contract.plan import TrialPlan
from trainers.passes import step_seed
from trainers.recipes import REFERENCE
from trainers.speedups.padded_batch import PaddedBatch
from trainers.training_order import TrainingOrder, whole


def test_the_batches_of_a_step_are_the_parts_of_the_large_one() -> None:
    wide = [number % 3 == 0 for number in range(40)]

    def batches(batch_size: int, parts: int, skip: int = 0) -> list[list[tuple[int, int]]]:
        order = TrainingOrder(whole(40).draw, wide, batch_size, 7, 1, 2, skip, parts)
        return list(itertools.islice(order, 12))

    parts = batches(6, 3)
    assert [[*itertools.chain(*parts[n : n + 3])] for n in range(0, 12, 3)] == batches(6, 1)[:4]
    assert batches(6, 3, skip=2)[:6] == batches(6, 3)[6:]


def test_every_batch_of_a_step_draws_other_numbers() -> None:
    assert step_seed(0, 0, 0, 0) == step_seed(0, 0, 0)
    assert len({step_seed(0, rank, 1, part) for rank in range(3) for part in range(4)}) == 12


EVERYTHING = {
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 40,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.5],
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": False,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 10_000,
    "MODEL.RPN.POSITIVE_FRACTION": 1.0,
    "MODEL.RPN.NMS_THRESH": 1.0,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 40,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 40,
}
"""All anchors and 40 proposals of each image are taken: nothing is left to the generator."""


def rank_plan(folder: Path, model: str, accumulate: int, **overrides: Any) -> TrialPlan:
    """Two steps of 4 images without warm-up, in one batch or several, whose gradients are not clipped."""
    plan = plan_of_rank(folder, model)
    solver = dataclasses.replace(plan.solver, max_iter=2, warmup_iters=0, eval_period=0, evaluate_at_end=False)
    return dataclasses.replace(
        plan,
        solver=solver,
        overrides={**plan.overrides, **overrides},
        accumulate=accumulate,
        log_period=1,
        checkpoint_dir=str(folder / f"{model}-{accumulate}"),
    )


def steps_and_weights(plan: TrialPlan) -> tuple[list[StepsDone], dict[str, torch.Tensor]]:
    events = train_rank(plan)
    (file,) = Path(plan.checkpoint_dir).glob("iter_0000002/state*")
    steps = [event for event in events if isinstance(event, StepsDone)]
    return steps, torch.load(file, weights_only=True)["model"]


@pytest.mark.train
def test_two_steps_of_a_box_model_are_equal_in_losses_and_weights(tmp_path: Path) -> None:
    """Its losses are divided by numbers that are the same in each batch."""
    overrides = {**EVERYTHING, "MODEL.MASK_ON": False}
    (one, expected), *others = (steps_and_weights(rank_plan(tmp_path, "mask_rcnn", n, **overrides)) for n in (1, 2, 4))
    for accumulate, (steps, weights) in zip((2, 4), others, strict=True):
        assert [step.num_images for step in steps] == [4, 4] and steps[0].batches_per_step == accumulate
        for mine, theirs in zip(steps, one, strict=True):
            assert mine.losses == pytest.approx(theirs.losses, rel=1e-5)
            assert set(mine.step_part_seconds) == {"forward", "backward", "optimizer"}
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6, msg=name)
    start = expected["backbone.fpn_output2.weight"]
    assert not torch.equal(others[0][1]["backbone.fpn_output2.weight"], torch.zeros_like(start))


@pytest.mark.train
def test_the_loss_of_masks_is_the_mean_of_the_batches_however_many_objects_each_shows(tmp_path: Path) -> None:
    """What the docs say of masks: here one of two batches has none, and counts as much. Other losses are equal."""
    (one, _), (two, _) = (steps_and_weights(rank_plan(tmp_path, "mask_rcnn", n, **EVERYTHING)) for n in (1, 2))
    first, parts = one[0].losses, two[0].losses
    for name in ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"):
        assert parts[name] == pytest.approx(first[name], rel=1e-5)
    assert parts["loss_mask"] == pytest.approx(first["loss_mask"] / 2, rel=1e-5)


@pytest.mark.train
def test_retinanet_divides_by_the_running_mean_of_its_smaller_batches(tmp_path: Path) -> None:
    """From the start value of 100, halves of the gradients: the sums of both batches, over 2 x nearly 100."""
    norms = {"MODEL.RESNETS.NORM": "FrozenBN"}
    (one, _), (two, _) = (steps_and_weights(rank_plan(tmp_path, "retinanet", n, **norms)) for n in (1, 2))
    assert two[0].losses["loss_cls"] < 0.75 * one[0].losses["loss_cls"]


@pytest.mark.train
def test_a_rank_that_died_goes_on_with_the_batches_of_its_next_step(tmp_path: Path) -> None:
    plan = dataclasses.replace(plan_of_rank(tmp_path, "mask_rcnn"), accumulate=2)
    healthy = train_rank(plan)
    broken = dataclasses.replace(plan, checkpoint_dir=str(tmp_path / "broken"))
    train_rank(broken, die_at=6)
    second = train_rank(broken, attempt=1)
    assert last(second, LoopFinished).state_sha256 == last(healthy, LoopFinished).state_sha256
    assert {step.num_images for step in healthy if isinstance(step, StepsDone)} == {8}


def halves(iteration: int, rank: int) -> Batch:
    """Batches by turns of one step's two images, each by itself."""
    batch = batch_of(iteration // 2, rank)
    assert isinstance(batch.inputs, PaddedBatch)
    part = slice(iteration % 2, iteration % 2 + 1)
    inputs = PaddedBatch(*(tensor[part] for tensor in batch.inputs.tensors()))
    return dataclasses.replace(batch, inputs=inputs, image_files=batch.image_files[part], shape=(1, *batch.shape[1:]))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp"])
def test_graphs_add_up_the_gradients_of_a_step(tmp_path: Path, precision: Any) -> None:
    """Warm-up, capture and replays in the middle of a step; a scaler and clipping after it."""
    recipe = dataclasses.replace(REFERENCE, precision=precision)
    plan = dataclasses.replace(plan_of(tmp_path), recipe=recipe, accumulate=2)
    without, trained = (train(plan, graphs=on, batch=halves) for on in (False, True))
    assert trained.sha256 == without.sha256
    assert [event["losses"] for event in trained.events] == [event["losses"] for event in without.events]
    assert trained.capture is not None and (trained.capture.num_captures, trained.capture.num_replays) == (2, 18)
    assert sum(event["num_images"] for event in trained.events) == 24
    assert trained.events[-1]["batches_per_step"] == 2


def test_records_between_replays_add_up_too(tmp_path: Path) -> None:
    plan = dataclasses.replace(plan_of(tmp_path), accumulate=2)
    batch = partial(batch_of, records_at=(1, 6, 9, 14, 15))
    without, trained = (train(plan, graphs=on, batch=batch) for on in (False, True))
    assert trained.sha256 == without.sha256


def _rank_trains(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    plan = dataclasses.replace(plan_of(Path(folder)), world_size=2, accumulate=2)
    batch = partial(batch_of, records_at=(2, 7) if rank else (5,))
    found = []
    for graphs in (False, True):
        with patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as reduce:
            trained = train(plan, graphs=graphs, rank=rank, batch=batch)
        communication = [len(event["step_part_seconds"]["communication"]) for event in trained.events]
        found.append((trained.sha256, reduce.call_count, communication))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.train
def test_workers_meet_once_in_a_step(tmp_path: Path) -> None:
    """In DistributedDataParallel and in our buckets, with the same weights after 12 steps of two batches."""
    spawn_ranks(_rank_trains, str(tmp_path / "store"), str(tmp_path))
    for rank in (0, 1):
        without, trained = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert trained == without
        assert without[1:] == (12, [2] * 6)
