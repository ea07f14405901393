"""What the speed recipes promise: the reference changes nothing, and each switch does what it says."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling.roi_heads import fast_rcnn, mask_head
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from tests.builders.recipes import plan_of, train
from trainers import mask_rcnn
from trainers.contract.plan import TrialPlan
from trainers.loading import batches_of_a_size
from trainers.recipes import FAST, PLAIN, RECIPES, REFERENCE, Recipe
from trainers.speedups.apply import quiet_mask_loss, resolve_precision
from trainers.speedups.roi_pooling import SparsePooler
from trainers.speedups.sgd import clip_each, tune_optimizer


@pytest.fixture(autouse=True)
def own_cache_and_detectron2_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mask_head, "mask_rcnn_loss", mask_head.mask_rcnn_loss)
    monkeypatch.setattr(fast_rcnn, "_log_classification_stats", fast_rcnn._log_classification_stats)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.train
def test_the_reference_recipe_trains_the_same_weights_as_detectron2s_parts_bit_for_bit(tmp_path: Path) -> None:
    plain_hash, plain_figures = train(plan_of(tmp_path, PLAIN, "plain"))
    reference_hash, reference_figures = train(plan_of(tmp_path, REFERENCE, "reference"))
    assert reference_hash == plain_hash
    assert reference_figures == pytest.approx(plain_figures, abs=1e-6)


@pytest.mark.train
def test_the_fast_recipe_trains(tmp_path: Path) -> None:
    _, figures = train(plan_of(tmp_path, FAST, "fast"))
    assert figures["box_ap"] is not None


def test_the_ladder_only_ever_turns_switches_on() -> None:
    assert list(RECIPES) == ["plain", "reference", "pooling", "layout", "fast"]
    assert RECIPES["plain"] == Recipe()
    for lower, upper in itertools.pairwise(RECIPES.values()):
        changed = {f.name for f in dataclasses.fields(Recipe) if getattr(lower, f.name) != getattr(upper, f.name)}
        assert changed and all(getattr(lower, name) == getattr(Recipe(), name) for name in changed - {"mapper"})
    assert [recipe.mapper for recipe in RECIPES.values()] == ["detectron2", *["exact"] * 3, "fast"]


def test_auto_precision_is_what_the_device_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for native in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert resolve_precision("auto", cpu) == ("bf16" if native else "fp32")
    for capability, precision in (((7, 0), "amp"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert resolve_precision("auto", cuda) == precision
    assert resolve_precision("bf16", cpu) == "bf16"


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_gradients_clipped_at_once_are_those_clipped_one_by_one(norm_type: float) -> None:
    torch.manual_seed(0)
    shapes = [(3, 4, 5), (7,), (64, 128), (1,), (2, 2)]
    gradients = [torch.randn(shape) * 10**i for i, shape in enumerate(shapes)] + [torch.zeros(3)]
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
        nn.utils.clip_grad_norm_(parameter, 5.0, norm_type)
    clip_each(gradients, 5.0, norm_type)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None and parameter.grad.equal(gradient)
    clip_each([], 5.0, norm_type)


def updated(
    recipe: Recipe, plan: TrialPlan, earlier: dict[str, Any] | None = None
) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """Weights after three steps with given gradients, with the momenta of an earlier optimizer."""
    cfg = mask_rcnn.build_config(plan)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = tune_optimizer(build_optimizer(cfg, model), cfg, recipe)
    if earlier:
        optimizer.load_state_dict(copy.deepcopy(earlier))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape) * 20
        optimizer.step()
    return optimizer, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("recipe", [Recipe(batched_clipping=True), Recipe(fused_optimizer=True), REFERENCE, FAST])
def test_tuned_optimizers_update_weights_to_the_bit_and_go_on_from_each_others_momenta(
    tmp_path: Path, recipe: Recipe
) -> None:
    plan = plan_of(tmp_path, PLAIN, "x")
    plain, expected = updated(PLAIN, plan)
    optimizer, weights = updated(recipe, plan)
    assert all(ours.equal(theirs) for ours, theirs in zip(weights, expected, strict=True))
    # The momenta lie in another order where one of the two is channels-last; that must not mix them up.
    for first, second in ((plain, recipe), (optimizer, PLAIN)):
        _, expected = updated(PLAIN, plan, plain.state_dict())
        _, weights = updated(second, plan, first.state_dict())
        assert all(ours.equal(theirs) for ours, theirs in zip(weights, expected, strict=True))


def test_gradients_are_clipped_after_the_scaling_of_float16_is_undone(tmp_path: Path) -> None:
    cfg = mask_rcnn.build_config(plan_of(tmp_path, PLAIN, "x"))
    assert cfg.SOLVER.CLIP_GRADIENTS.ENABLED
    found = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = nn.Linear(16, 16)
        optimizer = tune_optimizer(build_optimizer(cfg, model), cfg, FAST)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(model(torch.ones(4, 16)).pow(2).sum()).backward()
        scaler.step(optimizer)
        found.append(model.weight.detach())
    assert found[0].equal(found[1])


def test_the_fast_recipe_exchanges_the_poolers_and_keeps_the_names_of_weights(tmp_path: Path) -> None:
    models = []
    for recipe in (PLAIN, FAST):
        plan = plan_of(tmp_path, recipe, "x")
        models.append(mask_rcnn.build_detector(mask_rcnn.build_config(plan), plan))
    plain, fast = models
    assert [type(module) for module in fast.modules()].count(SparsePooler) == 2
    assert list(fast.state_dict()) == list(plain.state_dict())
    weight = fast.get_submodule("backbone.bottom_up.res2.0.conv2").weight
    assert isinstance(weight, torch.Tensor) and weight.is_contiguous(memory_format=torch.channels_last)


def proposals(classes: int, seed: int) -> Instances:
    rng = np.random.default_rng(seed)
    polygons = [[rng.uniform(0, 50, 12)] for _ in range(5)]
    found = Instances((50, 50))
    found.proposal_boxes = Boxes(torch.tensor([[5.0, 5, 40, 45]] * 5))
    found.gt_classes = torch.tensor(rng.integers(0, classes, 5))
    found.gt_masks = PolygonMasks(polygons)
    return found


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_the_mask_loss_without_statistics_is_detectron2s(channels: int, num_images: int) -> None:
    images = [proposals(channels, seed) for seed in range(num_images)] + [proposals(channels, 9)[:0]]
    logits = torch.randn(5 * num_images, channels, 28, 28)
    with EventStorage():
        expected = mask_head.mask_rcnn_loss(logits, images)
    assert quiet_mask_loss(logits, images).equal(expected)


@pytest.mark.parametrize("most", [1, 3])
def test_only_images_of_one_size_are_detected_on_together_and_none_is_lost(most: int) -> None:
    kinds: np.ndarray[Any, Any] = np.array([(4, 6), (6, 4), (5, 5)], dtype=np.int32)
    sizes = kinds[np.random.default_rng(0).integers(0, 3, 20)]
    batches = batches_of_a_size(range(3, 20), sizes, most)
    assert sorted(index for batch in batches for index in batch) == list(range(3, 20))
    assert all(len(batch) <= most and len({tuple(sizes[i]) for i in batch}) == 1 for batch in batches)
    if most == 1:
        assert batches == [[index] for index in range(3, 20)]
