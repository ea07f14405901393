"""Training by graphs is training without: the same weights, bit for bit, whatever comes between two replays."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from tests.builders import training
from tests.builders.experiments import TINY_OVERRIDES
from tests.builders.graphs import CPU, TinyDetector, Trained, batch_of, capture_of, plan_of, train
from tests.builders.models import tiny_config
from tests.builders.tape import TapeCapture
from trainers.batching import Batch
from trainers.contract.events import LoopFinished, StepsDone
from trainers.contract.plan import TrialPlan
from trainers.loop import NotFiniteError, TrainingLoop
from trainers.recipes import FAST, REFERENCE, Recipe
from trainers.speedups import graphs
from trainers.speedups.apply import tune_model
from trainers.speedups.padded_batch import PaddedBatch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def plan(tmp_path: Path) -> TrialPlan:
    return plan_of(tmp_path)


def eager_steps(trained: Trained) -> dict[str, int]:
    return dict(sum((Counter(event["eager_steps"]) for event in trained.events), Counter()))


def losses(trained: Trained) -> list[dict[str, float]]:
    return [event["losses"] for event in trained.events]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp"])
def test_two_shapes_by_turns_train_the_same_weights(plan: TrialPlan, precision: Any) -> None:
    """With clipping, a schedule, batch norm and random choices; in half precision with a gradient scaler."""
    plan = dataclasses.replace(plan, recipe=dataclasses.replace(REFERENCE, precision=precision))
    without, trained = train(plan, graphs=False), train(plan, graphs=True)
    assert trained.sha256 == without.sha256 and losses(trained) == losses(without)
    assert trained.capture is not None
    assert (trained.capture.num_captures, trained.capture.num_replays) == (2, 6)
    assert eager_steps(trained) == {"warm-up": 6}


def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_weights(plan: TrialPlan) -> None:
    whole = train(plan, graphs=False)
    half = train(plan, graphs=True, stop_at=6)
    assert half.loop.iteration == 6 and half.capture is not None and half.capture.num_replays == 1
    rest = train(plan, graphs=True, resume=half.state)
    assert rest.capture is not None and rest.capture.num_replays > 0
    assert rest.sha256 == whole.sha256


def test_a_batch_of_records_between_replays_uses_the_same_gradients(plan: TrialPlan) -> None:
    batch = partial(batch_of, records_at=(1, 6, 9))
    without, trained = train(plan, graphs=False, batch=batch), train(plan, graphs=True, batch=batch)
    assert trained.sha256 == without.sha256
    assert eager_steps(trained) == {"warm-up": 6, "batch not padded": 3}


class Between:
    """A hook that does something to the model between windows."""

    every_window = True

    def __init__(self, act: Callable[[nn.Module], None]) -> None:
        self.act = act

    def due(self, iteration: int, ending: bool) -> bool:
        return False

    def run(self, loop: TrainingLoop) -> None:
        self.act(loop.model)


def evaluate(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(batch_of(3).inputs)
    model.train()


def replace_buffers(model: nn.Module) -> None:
    assert isinstance(model, TinyDetector)
    norm: Any = model.stem[1]
    norm.running_mean = norm.running_mean + 1


@pytest.mark.parametrize(("act", "num_captures"), [(evaluate, 2), (replace_buffers, 5)])
def test_what_hooks_do_between_windows_counts(
    plan: TrialPlan, act: Callable[[nn.Module], None], num_captures: int
) -> None:
    """An evaluation changes nothing; where tensors were replaced, graphs are captured again."""
    without, trained = (train(plan, graphs=on, more_hooks=[Between(act)]) for on in (False, True))
    assert trained.sha256 == without.sha256
    assert trained.capture is not None and trained.capture.num_captures == num_captures


def test_more_shapes_than_graphs_are_trained_eagerly_and_reported(
    plan: TrialPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    without, trained = train(plan, graphs=False), train(plan, graphs=True)
    assert trained.sha256 == without.sha256
    assert eager_steps(trained) == {"warm-up": 4, "more than 1 shapes": 3}
    assert trained.events[-1]["num_graphs"] == 1


class Looking(TinyDetector):
    """Looks at a figure of the device before it goes on."""

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        losses = super().forward(inputs)
        assert losses["loss_cls"].item() > 0
        return losses


def test_a_model_that_cannot_be_captured_is_trained_eagerly_and_reported(
    plan: TrialPlan, caplog: pytest.LogCaptureFixture
) -> None:
    without, trained = (train(plan, graphs=on, build=Looking) for on in (False, True))
    assert trained.sha256 == without.sha256
    waits = "capture failed: WaitError: aten::_local_scalar_dense waits for the device"
    assert eager_steps(trained) == {"warm-up": 6, waits: 6}
    assert trained.events[-1]["num_graphs"] == 0
    assert caplog.text.count("No CUDA graph of batches of shape") == 2


def test_a_replay_sees_nothing_of_its_batch_but_its_copy() -> None:
    seen: list[Tensor] = []

    def passes(batch: PaddedBatch) -> Tensor:
        seen.append(batch.boxes)
        return torch.stack([batch.images.float().mean(), batch.boxes.sum()])

    kept = graphs.Graphs(TapeCapture(list), passes, list, CPU)
    first, second = (batch_of(iteration).inputs for iteration in (0, 1))
    assert isinstance(first, PaddedBatch) and isinstance(second, PaddedBatch)
    expected = passes(second)
    for _ in range(graphs.WARMUP_STEPS):
        assert kept.graph_of(first, expected) is None
    graph = kept.graph_of(first, expected)
    assert graph is not None and seen[-1].data_ptr() == graph.inputs.boxes.data_ptr() != first.boxes.data_ptr()
    for tensor in first.tensors():
        tensor.zero_()
    graph.inputs.copy_(second)
    for tensor in second.tensors():
        tensor.zero_()
    graph.replay()
    assert torch.equal(graph.losses, expected) and len(seen) == 2


def test_a_replayed_loss_that_is_not_finite_is_found_where_it_was(plan: TrialPlan) -> None:
    def batch(iteration: int, rank: int) -> Batch:
        made = batch_of(iteration, rank)
        if iteration == 9:
            assert isinstance(made.inputs, PaddedBatch)
            made.inputs.boxes[0, 0, 0] = torch.nan
        return dataclasses.replace(made, image_files=(f"{iteration}.jpg",))

    reached: list[TrainingLoop] = []
    hook = Between(lambda _: None)
    hook.run = reached.append  # type: ignore[method-assign]
    with pytest.raises(NotFiniteError, match="at iteration 9 "):
        train(plan, graphs=True, batch=batch, more_hooks=[hook])
    activity = reached[0].activity
    assert (activity.iteration, activity.image_files) == (9, ("9.jpg",))


def test_a_replay_has_no_forward_and_no_backward_pass_of_its_own(plan: TrialPlan) -> None:
    events = train(plan, graphs=True).events
    assert set(events[0]["part_seconds"]) == {"data", "forward", "backward", "optimizer"}
    assert set(events[0]["step_part_seconds"]) == {"forward", "backward", "optimizer"}
    # One step of the third window is replayed, the other not: neither part was timed in each.
    assert set(events[2]["part_seconds"]) == {"data", "forward", "backward", "graph", "optimizer"}
    assert set(events[2]["step_part_seconds"]) == {"optimizer"}
    assert set(events[3]["step_part_seconds"]) == {"graph", "optimizer"}
    assert [event["capture_seconds"] > 0 for event in events] == [False, False, True, False, False, True]
    assert [event["num_graphs"] for event in events] == [0, 0, 1, 1, 1, 2]


def test_a_mask_rcnn_trains_the_same_weights(plan: TrialPlan) -> None:
    """detectron2's model in fixed shapes, whatever it draws, on batches of different objects."""
    recipe = dataclasses.replace(REFERENCE, fixed_shapes=True)

    def build() -> nn.Module:
        model = build_model(tiny_config(TINY_OVERRIDES)).train()
        tune_model(model, recipe, CPU)
        return model

    plan = dataclasses.replace(plan, recipe=recipe, solver=dataclasses.replace(plan.solver, max_iter=6))
    batch = lambda iteration, rank: batch_of(3 * iteration)  # noqa: E731 - of one shape
    without, trained = (train(plan, graphs=on, build=build, batch=batch) for on in (False, True))
    assert trained.sha256 == without.sha256
    assert trained.capture is not None and trained.capture.num_replays == 3


@pytest.mark.train
def test_a_trial_with_evaluations_that_died_ends_as_one_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole rank: padded batches of the loader, evaluations, checkpoints, events."""
    values = training.plan_of(tmp_path, "mask_rcnn")
    whole = dataclasses.replace(values, recipe=dataclasses.replace(REFERENCE, fixed_shapes=True))
    expected = training.last(training.train(whole), LoopFinished)
    monkeypatch.setattr("trainers.rank.capture_for", lambda model, *_: capture_of(model))
    broken = dataclasses.replace(whole, checkpoint_dir=str(tmp_path / "broken"))
    first, second = training.train(broken, die_at=8), training.train(broken, attempt=1)
    assert training.last(second, LoopFinished).state_sha256 == expected.state_sha256
    steps = [event for event in (*first, *second) if isinstance(event, StepsDone)]
    assert sum((Counter(event.eager_steps) for event in steps), Counter()) == {"warm-up": 6}
    assert [event.num_graphs for event in steps] == [0, 1, 1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("breaks", [False, True])
def test_a_capture_that_breaks_leaves_the_stream_and_the_generator_as_they_were(
    monkeypatch: pytest.MonkeyPatch, breaks: bool
) -> None:
    """By the order of the calls; torch's own functions need a GPU."""
    calls: list[str] = []

    @contextmanager
    def noted(name: str, *_: object, **settings: object) -> Iterator[None]:
        calls.append(f"{name} begins")
        try:
            yield
        finally:
            calls.append(f"{name} ends")
            if breaks and name == "graph":
                raise RuntimeError("the capture had failed before")

    def run() -> None:
        calls.append("run")
        if breaks:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", partial(noted, "graph"))
    monkeypatch.setattr(torch.cuda, "stream", partial(noted, "stream"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(reset=lambda: calls.append("reset"), replay=1))
    for name in ("Stream", "graph_pool_handle", "synchronize", "empty_cache", "memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    capture = graphs.CudaCapture(torch.device("cuda"))
    if breaks:
        with pytest.raises(RuntimeError, match="failed before"):
            capture.record(run)
    else:
        assert capture.record(run) == 1
    order = ["stream begins", "graph begins", "run", "graph ends", "stream ends"]
    assert calls == order + ["reset"] * breaks


@pytest.mark.parametrize("recipe", [FAST, dataclasses.replace(FAST, cuda_graphs=True)])
def test_there_are_no_graphs_on_a_cpu(recipe: Recipe) -> None:
    assert graphs.capture_for(TinyDetector(), recipe, CPU, world_size=1) is None


def test_a_model_that_cannot_train_on_padded_batches_gets_no_graphs(caplog: pytest.LogCaptureFixture) -> None:
    recipe = dataclasses.replace(FAST, cuda_graphs=True)
    assert graphs.capture_for(TinyDetector(), recipe, torch.device("cuda"), world_size=1) is None
    assert "cuda_graphs: has no effect" in caplog.text
