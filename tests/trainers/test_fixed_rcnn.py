"""A training step of fixed shapes computes what detectron2 computes, and nothing in it makes a host wait for a GPU."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torchvision
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from tests.builders.experiments import TINY_OVERRIDES
from tests.builders.models import tiny_config
from tests.builders.padded_batches import padded, random_records
from tests.builders.waits import NoWaits, WaitError
from trainers.recipes import FAST, PLAIN, REFERENCE
from trainers.speedups.apply import tune_model
from trainers.speedups.fixed_rcnn import FixedRCNN, unsupported
from trainers.speedups.padded_batch import PaddedBatch

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(64, 80), (90, 61), (33, 96)]
PADDED = (96, 96)
"""What detectron2 pads images of these sizes to."""

CPU, META, CUDA = (torch.device(name) for name in ("cpu", "meta", "cuda"))


@pytest.fixture(scope="module")
def plain() -> GeneralizedRCNN:
    """The tiny Mask R-CNN as detectron2 has it."""
    torch.manual_seed(0)
    model: GeneralizedRCNN = build_model(tiny_config(TINY_OVERRIDES)).train()
    return model


@pytest.fixture
def fixed(plain: GeneralizedRCNN) -> FixedRCNN:
    """The same, with the same weights, in fixed shapes."""
    return in_fixed_shapes(plain)


def in_fixed_shapes(plain: GeneralizedRCNN) -> FixedRCNN:
    model = copy.deepcopy(plain)
    tune_model(model, dataclasses.replace(REFERENCE, fixed_shapes=True), CPU)
    assert isinstance(model, FixedRCNN)
    return model


def batch_of(counts: list[int], canvas: tuple[int, int] = PADDED) -> PaddedBatch:
    return padded(random_records(SIZES, counts), canvas)


def total_loss(model: nn.Module, batch: object) -> Tensor:
    losses: dict[str, Tensor] = model(batch)
    return torch.stack(list(losses.values())).sum()


PRECISIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "fp32": nullcontext,
    "bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize(("device", "precision"), [(CPU, "fp32"), (CPU, "bf16"), (META, "fp32")])
def test_no_operation_of_a_step_makes_the_host_wait(device: torch.device, precision: str) -> None:
    model = build_model(tiny_config({**TINY_OVERRIDES, "MODEL.RESNETS.NORM": "FrozenBN"})).train()
    recipe = dataclasses.replace(FAST, fixed_shapes=True, triton_pooling=True, folded_norms=device == CPU)
    tune_model(model, recipe, CUDA)  # the meta device knows no autocast, for which folded norms ask
    batch = batch_of([3, 0, 5], canvas=(128, 160)).to(device)
    model.to(device)
    total_loss(model, batch)  # what is made in a first step
    with NoWaits():
        with PRECISIONS[precision]():
            loss = total_loss(model, batch)
        loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def _set(tensor: Tensor, index: Tensor) -> None:
    tensor[index] = 1.0


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "boolean index": lambda x: x[x > 0],
    "boolean assignment": lambda x: _set(x.clone(), x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave": lambda x: torch.repeat_interleave(torch.ones(3, dtype=torch.int64, device=x.device)),
    "bincount": lambda x: x.flatten().long().bincount(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "to device": lambda x: torch.zeros(3).to(x.device),
    "constant": lambda x: torch.tensor([1.0, 2.0]).to(x.device),
    "copy": lambda x: x[0].copy_(torch.zeros(x.shape[1:])),
    "nms": lambda x: torchvision.ops.nms(x.new_zeros(3, 4), x.new_zeros(3), 0.5),
}
"""What would make the host wait for a GPU if it were done in a step."""

ON_CPU: dict[str, Callable[[Tensor], object]] = {
    "constant of a device": lambda x: torch.tensor([1.0], device=x.device),
    "new": lambda x: x.new_tensor([1.0]),
}
"""What leaves no trace on the meta device; on a CPU it does."""


@pytest.mark.parametrize("name", [*WAITS, *ON_CPU])
def test_a_wait_that_is_planted_into_the_step_is_found(fixed: FixedRCNN, name: str) -> None:
    planted, device = {**WAITS, **ON_CPU}[name], CPU if name in ON_CPU else META
    batch = batch_of([1, 1, 1]).to(device)
    fixed.to(device).backbone.register_forward_pre_hook(lambda _module, given: planted(given[0]))
    with NoWaits(), pytest.raises(TypeError if name == "numpy" else WaitError):
        fixed(batch)


def test_a_wait_in_the_backward_pass_is_found(fixed: FixedRCNN) -> None:
    batch = batch_of([1, 1, 1])
    weight: Any = fixed.roi_heads.box_predictor.cls_score.weight
    weight.register_hook(lambda gradient: gradient.sum().item())
    with NoWaits():
        loss = total_loss(fixed, batch)
        with pytest.raises(WaitError, match="_local_scalar_dense"):
            loss.backward()


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0]])
def test_losses_and_gradients_are_detectron2s_where_all_is_sampled(plain: GeneralizedRCNN, counts: list[int]) -> None:
    theirs = copy.deepcopy(plain)
    theirs.proposal_generator.batch_size_per_image = 20_000  # more than there are: nothing is left to chance
    theirs.roi_heads.batch_size_per_image = 200
    theirs.proposal_generator.positive_fraction = theirs.roi_heads.positive_fraction = 0.5
    ours = in_fixed_shapes(theirs)
    with EventStorage(0):
        expected = theirs(random_records(SIZES, counts))
    losses = ours(batch_of(counts))
    assert list(losses) == list(expected)
    torch.testing.assert_close(losses, expected)
    for each in (losses, expected):
        torch.stack(list(each.values())).sum().backward()
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (weight.grad - other.grad).norm() <= 1e-4 * other.grad.norm() + 1e-7, name


def test_lists_of_records_are_trained_on_as_before(plain: GeneralizedRCNN, fixed: FixedRCNN) -> None:
    found = []
    for model in (plain, fixed):
        torch.manual_seed(5)
        with EventStorage(0):
            found.append(model(random_records(SIZES, [3, 0, 5])))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("canvas", [PADDED, (128, 160)])
def test_images_are_padded_after_they_are_normalized(fixed: FixedRCNN, canvas: tuple[int, int]) -> None:
    fixed.pixel_mean += torch.tensor([3.0, 4.0, 5.0]).view(3, 1, 1)
    images = fixed.normalized(batch_of([1, 0, 2], canvas))
    expected = fixed.preprocess_image(random_records(SIZES, [1, 0, 2])).tensor
    assert images.shape[2:] == canvas
    assert torch.equal(images[..., : PADDED[0], : PADDED[1]], expected)
    assert images.count_nonzero() == expected.count_nonzero()


def test_a_weight_that_is_not_finite_gives_a_loss_that_is_not_finite(fixed: FixedRCNN) -> None:
    fixed.proposal_generator.rpn_head.anchor_deltas.bias.data[3] = torch.nan
    assert not total_loss(fixed, batch_of([3, 0, 5])).isfinite()


def test_training_in_fixed_shapes_lowers_the_loss_as_detectron2_does(plain: GeneralizedRCNN) -> None:
    records = random_records([(64, 64), (64, 60), (60, 64)], [3, 1, 2])
    lowered = []
    for model, batch in ((copy.deepcopy(plain), records), (in_fixed_shapes(plain), padded(records, (64, 64)))):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            with EventStorage(0):
                loss = total_loss(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        lowered.append(sum(losses[-3:]) / 3 / losses[0])
    assert max(lowered) < 0.7
    assert lowered[1] == pytest.approx(lowered[0], rel=0.2)


def test_fixed_shapes_are_for_gpus_unless_they_are_asked_for(plain: GeneralizedRCNN) -> None:
    for device, by_default in ((CPU, False), (CUDA, True)):
        for fixed_shapes, expected in ((True, True), (False, False), (None, by_default)):
            model = copy.deepcopy(plain)
            tune_model(model, dataclasses.replace(PLAIN, fixed_shapes=fixed_shapes), device)
            assert isinstance(model, FixedRCNN) is expected


def _other_heads(model: Any) -> None:
    model.roi_heads.__class__ = CascadeROIHeads


CHANGES: dict[str, Callable[[Any], object]] = {
    "CascadeROIHeads is not StandardROIHeads": _other_heads,
    "VIS_PERIOD draws training images": lambda model: setattr(model, "vis_period", 10),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE is giou": lambda model: setattr(
        model.proposal_generator, "box_reg_loss_type", "giou"
    ),
    "MODEL.RPN.BOUNDARY_THRESH leaves out anchors": lambda model: setattr(
        model.proposal_generator, "anchor_boundary_thresh", 0
    ),
    "Linear is not StandardRPNHead": lambda model: setattr(model.proposal_generator, "rpn_head", nn.Linear(1, 1)),
    "MODEL.KEYPOINT_ON trains keypoints": lambda model: setattr(model.roi_heads, "keypoint_on", True),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES trains masks on predicted boxes": lambda model: setattr(
        model.roi_heads, "train_on_pred_boxes", True
    ),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE is diou": lambda model: setattr(
        model.roi_heads.box_predictor, "box_reg_loss_type", "diou"
    ),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE takes another loss": lambda model: setattr(
        model.roi_heads.box_predictor, "use_sigmoid_ce", True
    ),
    "Linear is not MaskRCNNConvUpsampleHead": lambda model: setattr(model.roi_heads, "mask_head", nn.Linear(1, 1)),
    "Linear is not FastRCNNConvFCHead": lambda model: setattr(model.roi_heads, "box_head", nn.Linear(1, 1)),
    "batch norm in the ROI heads would count empty slots": lambda model: model.roi_heads.box_head.add_module(
        "norm", nn.BatchNorm2d(1)
    ),
    "its pooler is not ROIAlign": lambda model: setattr(
        model.roi_heads.box_pooler, "level_poolers", nn.ModuleList([nn.Identity()])
    ),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_model_that_fixed_shapes_do_not_know_trains_as_without_them_and_the_log_says_why(
    plain: GeneralizedRCNN, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = copy.deepcopy(plain)
    assert unsupported(model) is None
    CHANGES[reason](model)
    assert unsupported(model) == reason
    tune_model(model, dataclasses.replace(PLAIN, fixed_shapes=True), CPU)
    assert type(model) is GeneralizedRCNN
    assert f"fixed_shapes: has no effect, {reason}." in caplog.text


def test_a_model_is_known_before_and_after_its_parts_are_exchanged(plain: GeneralizedRCNN) -> None:
    for fixed_shapes in (True, False):
        model = copy.deepcopy(plain)
        tune_model(model, dataclasses.replace(REFERENCE, fixed_shapes=fixed_shapes, sparse_pooling=True), CPU)
        assert unsupported(model) is None
    assert unsupported(nn.Linear(1, 1)) == "Linear is not GeneralizedRCNN"


def test_a_model_without_masks_has_no_loss_of_masks(plain: GeneralizedRCNN) -> None:
    model = copy.deepcopy(plain)
    model.roi_heads.mask_on = False
    assert "loss_mask" not in in_fixed_shapes(model)(batch_of([1, 0, 2]))
