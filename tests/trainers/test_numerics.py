"""A worker computes as detectron2's own process does, and deterministically where it is asked to."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.keypoint_head import KRCNNConvDeconvUpsampleHead
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ours import write_plan
from tests.builders.experiments import TINY_OVERRIDES
from tests.builders.models import tiny_config
from tests.builders.numerics import process_switches
from tests.builders.padded_batches import padded, random_records
from tests.builders.training import last, plan_of, train
from trainers import machine, mask_rcnn
from trainers.contract.events import LoopFinished, LoopStarted, StepsDone
from trainers.contract.plan import TrialPlan
from trainers.contract.problems import ConfigurationError
from trainers.failures import classify
from trainers.recipes import PLAIN, REFERENCE
from trainers.speedups.apply import process_settings, tune_model
from trainers.speedups.determinism import CUBLAS_VARIABLE, require_deterministic

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DETERMINISTIC = dataclasses.replace(REFERENCE, deterministic=True, fixed_shapes=True, triton_pooling=True)


@pytest.mark.train
def test_a_worker_has_the_switches_of_a_process_that_runs_default_trainer(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "mask_rcnn")
    plan = dataclasses.replace(plan, overrides={**plan.overrides, "CUDNN_BENCHMARK": True})
    write_plan(plan, tmp_path / "plan.json")
    command = [sys.executable, "-m", "tests.builders.numerics", str(tmp_path / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs["cudnn.benchmark"] == theirs["cudnn.allow_tf32"] == "True"
    for name, recipe in (("plain", PLAIN), ("reference", REFERENCE)):
        with process_settings(recipe, CUDA, cudnn_benchmark=True):
            assert process_switches() == theirs, name
        found = in_training(dataclasses.replace(plan, recipe=recipe, checkpoint_dir=str(tmp_path / name)))
        # A worker on a CPU has no use for cuDNN's switch.
        assert found | {"cudnn.benchmark": "True"} == theirs, name


def in_training(plan: TrialPlan) -> dict[str, str]:
    """The switches of a worker when it has trained its first window of steps."""
    found: list[dict[str, str]] = []
    train(plan, die_at=2, act=lambda event: found.append(process_switches()))
    return found[-1]


def test_deterministic_settings_of_the_process_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, used in ((None, ":4096:8"), (":16:8", ":16:8"), (":0:0", ":4096:8")):
        if given is None:
            monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(CUBLAS_VARIABLE, given)
        before = process_switches()
        with process_settings(DETERMINISTIC, CUDA):
            found = machine.numerics()
            assert found["deterministic_algorithms"] is found["cudnn.deterministic"] is True
            assert found["cudnn.benchmark"] is False
            assert os.environ[CUBLAS_VARIABLE] == used
            assert torch.get_deterministic_debug_mode() == 2  # an error, not a warning
        assert process_switches() == before and os.environ.get(CUBLAS_VARIABLE) == given


@pytest.fixture
def clean_switches() -> Iterator[None]:
    """Fails where a test leaves a switch of the process behind."""
    before = process_switches()
    yield
    assert process_switches() == before


@pytest.mark.train
@pytest.mark.usefixtures("clean_switches")
def test_two_runs_and_one_that_was_killed_and_resumed_end_with_the_same_weights(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "mask_rcnn")
    recipe = dataclasses.replace(DETERMINISTIC, triton_pooling=False)

    def named(name: str) -> Any:
        return dataclasses.replace(plan, recipe=recipe, checkpoint_dir=str(tmp_path / name))

    runs = [train(named("first")), train(named("second"))]
    train(named("killed"), die_at=6)
    runs.append(train(named("killed"), attempt=1))
    assert last(runs[-1], LoopStarted).iteration == 4
    assert len({last(events, LoopFinished).state_sha256 for events in runs}) == 1
    for events in runs:
        assert last(events, LoopStarted).numerics["deterministic_algorithms"] is True
        assert all(event.eager_batches == {} for event in events if isinstance(event, StepsDone))


def pooler(kind: str) -> ROIPooler:
    return ROIPooler(7, (1 / 16,), sampling_ratio=0, pooler_type=kind)


@pytest.mark.parametrize(
    ("module", "settings", "key"),
    [
        (pooler("ROIPool"), {}, "MODEL.ROI_BOX_HEAD.POOLER_TYPE"),
        (KRCNNConvDeconvUpsampleHead(ShapeSpec(channels=4), num_keypoints=3, conv_dims=[4]), {}, "MODEL.KEYPOINT_ON"),
        (nn.Identity(), {"CUDNN_BENCHMARK": True}, "CUDNN_BENCHMARK"),
        (
            nn.Identity(),
            {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, True]},
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
        ),
    ],
    ids=["roi pool", "keypoints", "measured", "deformable"],
)
def test_what_is_not_deterministic_on_a_gpu_is_refused(module: nn.Module, settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        require_deterministic(nn.Sequential(module), tiny_config(settings), DETERMINISTIC)
    assert (caught.value.problem.code, caught.value.problem.file) == ("not_deterministic", key)
    require_deterministic(nn.Sequential(pooler("ROIAlignV2")), tiny_config({}), DETERMINISTIC)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plan_for_a_gpu_is_refused_before_its_weights_are_read_and_one_for_a_cpu_is_not(
    tmp_path: Path, device: Any
) -> None:
    recipe = dataclasses.replace(DETERMINISTIC, triton_pooling=False)
    plan = dataclasses.replace(plan_of(tmp_path, "mask_rcnn"), recipe=recipe, device=device)
    cfg = mask_rcnn.build_config(plan).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    if device == "cpu":
        mask_rcnn.build_detector(cfg, plan)
    else:
        with pytest.raises(ConfigurationError, match="triton_pooling"):
            mask_rcnn.build_detector(cfg, plan)


def test_an_operation_that_torch_refuses_is_no_reason_to_start_again() -> None:
    with process_settings(DETERMINISTIC, CPU), pytest.raises(RuntimeError) as caught:
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
    assert classify(caught.value) == "configuration"


NOT_DETERMINISTIC = {
    "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "max_unpool2d",
    "max_unpool3d", "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
    "upsample_trilinear3d_backward", "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward",
    "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss2d_forward",
    "_ctc_loss_backward", "_embedding_bag_dense_backward", "put_", "put", "histc", "bincount", "median",
    "grid_sampler_2d_backward", "grid_sampler_3d_backward", "scatter_reduce", "scatter_reduce_", "roi_align",
    "_roi_align_backward", "roi_pool", "_roi_pool_backward", "deform_conv2d", "_deform_conv2d_backward",
}  # fmt: skip
"""Operations that raise on a GPU in deterministic mode, by the documentation of `torch.use_deterministic_algorithms`,
and torchvision's that add up gradients atomically. `nll_loss` is there for images only (its source)."""


class Recorded(TorchDispatchMode):
    """Collects the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.name().split(".")[0].split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masks", [True, False])
def test_a_step_of_fixed_shapes_has_no_operation_without_a_deterministic_version(masks: bool) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_config({**TINY_OVERRIDES, "MODEL.MASK_ON": masks})).train()
    tune_model(model, DETERMINISTIC, CPU)
    batch = padded(random_records([(64, 80), (60, 64)], [3, 2]), (64, 96))
    with process_settings(DETERMINISTIC, CPU), Recorded() as recorded:
        torch.stack(list(model(batch).values())).sum().backward()
    assert {"convolution_backward", "level_pooling", "level_pooling_backward"} <= recorded.names
    assert recorded.names & NOT_DETERMINISTIC == set()
