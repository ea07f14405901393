"""Start weights of every format are read without running anything, and loaded as detectron2 loads them."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn

from tests.builders.experiments import TINY_OVERRIDES
from tests.builders.models import tiny_config
from tests.builders.web import serving
from trainers.contract.problems import ConfigurationError
from trainers.contract.weights import StartWeights
from trainers.weights import fit_problems, load_start_weights

Names = dict[str, torch.Tensor]


class Model(nn.Module):
    """A backbone of two layers and a predictor, with detectron2's names."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {"bottom_up": nn.ModuleDict({"conv1": nn.Linear(2, 2), "conv2": nn.Linear(2, 2)})}
        )
        self.roi_heads = nn.ModuleDict({"box_predictor": nn.ModuleDict({"cls_score": nn.Linear(2, num_classes)})})


def other_state(num_classes: int = 3) -> Names:
    torch.manual_seed(5)
    return Model(num_classes).state_dict()


def save(path: Path, content: Any, *, legacy: bool = False) -> str:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


def dump(path: Path, content: Any) -> str:
    path.write_bytes(pickle.dumps(content, protocol=2))
    return str(path)


def assert_loaded(model: nn.Module, state: Names) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", None])
def test_a_pth_of_either_age_is_read_however_its_weights_are_wrapped(
    tmp_path: Path, wrapper: str | None, legacy: bool
) -> None:
    state = other_state()
    content = {wrapper: state, "iteration": 7} if wrapper else state
    model = Model()
    load_start_weights(model, save(tmp_path / "start.pth", content, legacy=legacy))
    assert_loaded(model, state)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_pth_with_a_training_scripts_arguments_is_read_without_them(tmp_path: Path, legacy: bool) -> None:
    state = other_state()
    extra = {"args": argparse.Namespace(lr=0.1, path=Path("x")), "epoch": np.float64(3.5), "when": Odd([1, 2])}
    model = Model()
    load_start_weights(model, save(tmp_path / "start.pth", {"model": state, **extra}, legacy=legacy))
    assert_loaded(model, state)


class Odd(list[int]):
    """A class that only the test knows."""


def test_weights_of_a_model_wrapped_for_several_workers_lose_its_prefix(tmp_path: Path) -> None:
    state = other_state()
    model = Model()
    wrapped = {f"module.{name}": value for name, value in state.items()}
    load_start_weights(model, save(tmp_path / "start.pth", {"model": wrapped}))
    assert_loaded(model, state)


def test_detectron2s_pickles_are_read_without_a_checksum(tmp_path: Path) -> None:
    state = other_state()
    arrays = {name: value.numpy() for name, value in state.items()}
    model = Model()
    load_start_weights(model, dump(tmp_path / "zoo.pkl", {"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    assert_loaded(model, state)
    # By the ends of their names, as ImageNet's.
    ends = {name.removeprefix("backbone."): value for name, value in arrays.items() if "backbone" in name}
    content = {"model": OrderedDict(ends), "__author__": "a test", "matching_heuristics": True}
    loaded = load_start_weights(Model(), dump(tmp_path / "R-50.pkl", content))
    assert len(loaded.fitting) == 4 and fit_problems(loaded) == [], "heads that the file leaves out are no problem"


def test_the_suffix_does_not_matter_and_heuristics_can_be_asked_for(tmp_path: Path) -> None:
    ends = {name.removeprefix("backbone."): value for name, value in other_state().items() if "backbone" in name}
    path = save(tmp_path / "renamed.pkl", ends)
    with pytest.raises(ConfigurationError, match="none of its names"):
        load_start_weights(Model(), path)
    assert len(load_start_weights(Model(), f"{path}?matching_heuristics=True").fitting) == 4


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "a.pkl"])
def test_nothing_in_a_file_is_run(tmp_path: Path, name: str) -> None:
    evil = Evil(f"touch {tmp_path / 'pwned'}")
    for number, content in enumerate((evil, {"model": other_state(), "more": evil}, {"__author__": evil})):
        path = tmp_path / f"{number}-{name}"
        (dump if name == "a.pkl" else lambda p, c: save(p, c, legacy="legacy" in name))(path, content)
        with contextlib.suppress(ConfigurationError):  # some of it can be read
            load_start_weights(Model(), str(path))
    assert not (tmp_path / "pwned").exists()


def spoilt(folder: Path) -> dict[str, tuple[bytes, str, str]]:
    good, plain = folder / "good.pth", folder / "good.pkl"
    save(good, {"model": other_state()})
    dump(plain, {"model": {"x": np.zeros(400)}, "__author__": "t"})
    scripted = folder / "scripted.pt"
    torch.jit.script(nn.Linear(1, 1)).save(str(scripted))
    return {
        "empty": (b"", "weights_corrupt", "it is empty"),
        "half": (good.read_bytes()[:-300], "weights_corrupt", "corrupt"),
        "half.pkl": (plain.read_bytes()[:-300], "weights_corrupt", "corrupt"),
        "page": (b"<!DOCTYPE html><html>Sign in</html>", "weights_placeholder", "web page"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "weights_placeholder", "LFS"),
        "gz": (gzip.compress(good.read_bytes()), "weights_format", "compressed (gzip)"),
        "safetensors": (b"\x10\0\0\0\0\0\0\0" + b'{"a":{}}        ' + b"\0" * 9, "weights_format", "safetensors"),
        "scripted": (scripted.read_bytes(), "weights_format", "TorchScript"),
        "keras.h5": (b"\x89HDF\r\n\x1a\n\0" + b"\0" * 90, "weights_format", "is an HDF5 file"),
        "model.onnx": (b"\x08\x07\x12\x07pytorch" + b"\0" * 90, "weights_format", "is an ONNX model"),
        "graph.pb": (b"\x08\x01\x12\x07pytorch" + b"\0" * 90, "weights_format", "is neither torch's nor a pickle"),
        "text": (b"these are no weights", "weights_format", "is neither torch's nor a pickle"),
        "python2.onnx": (pickle.dumps({"a": np.zeros(9)}, 0)[:-90], "weights_corrupt", "corrupt"),
        "list": (pickle.dumps([1, 2]), "weights_format", "holds a list"),
        "nothing": (pickle.dumps({"model": {}, "__author__": "x"}), "weights_format", "holds no weights"),
    }


def test_what_is_no_file_of_weights_is_named_for_what_it_is(tmp_path: Path) -> None:
    for name, (content, code, words) in spoilt(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ConfigurationError) as caught:
            load_start_weights(Model(), str(path))
        problem = caught.value.problem
        assert (problem.code, words in problem.what) == (code, True), (name, problem)
        assert problem.hint and problem.file == "model.weights"


def test_weights_of_other_programs_are_named(tmp_path: Path) -> None:
    foreign = {
        "mmdetection": {"backbone.layer1.0.conv1.weight": torch.zeros(1), "bbox_head.fc.weight": torch.zeros(1)},
        "torchvision": {"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)},
        "all begin with 'net'": {f"net.{name}": value for name, value in other_state().items()},
        "none of its 1 weights fits": {"model.0.conv.weight": torch.zeros(1)},
    }
    for words, state in foreign.items():
        with pytest.raises(ConfigurationError, match=words) as caught:
            load_start_weights(Model(), save(tmp_path / "foreign.pth", {"state_dict": state, "meta": {"epoch": 12}}))
        assert caught.value.problem.code == "weights_unmatched"


def test_what_fits_in_part_is_said_by_layer(tmp_path: Path) -> None:
    (problem,) = fit_problems(load_start_weights(Model(), save(tmp_path / "a.pth", other_state(num_classes=80))))
    assert problem.code == "weights_shape" and "cls_score.weight (80, 2) instead of (3, 2)" in problem.what
    deeper = {**other_state(), "backbone.bottom_up.conv9.weight": torch.zeros(1)}
    (problem,) = fit_problems(load_start_weights(Model(), save(tmp_path / "b.pth", deeper)))
    assert problem.code == "weights_unused" and "conv9" in problem.what
    shallower = {name: value for name, value in other_state().items() if "conv2" not in name}
    (problem,) = fit_problems(load_start_weights(Model(), save(tmp_path / "c.pth", shallower)))
    assert problem.code == "weights_missing_part" and "2 weights start at random" in problem.what
    heads = {name: value for name, value in other_state().items() if "backbone" not in name}
    (problem,) = fit_problems(load_start_weights(Model(), save(tmp_path / "d.pth", heads)))
    assert (problem.level, problem.code) == ("error", "weights_unmatched") and "backbone" in problem.what


def test_a_missing_file_and_another_checksum_are_errors(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", other_state())
    with pytest.raises(ConfigurationError, match="has SHA-256"):
        load_start_weights(Model(), path, "0" * 64)
    with pytest.raises(ConfigurationError, match="no such file"):
        load_start_weights(Model(), str(tmp_path / "missing.pth"))


@pytest.mark.parametrize("kind", ["pth", "pkl", "imagenet", "caffe2"])
def test_a_model_of_detectron2_gets_what_its_own_checkpointer_gives_it(tmp_path: Path, kind: str) -> None:
    cfg = tiny_config(TINY_OVERRIDES)
    state = {name: torch.randn(value.shape) for name, value in build_model(cfg).state_dict().items()}
    if kind == "pth":
        path = save(tmp_path / "start.pth", {"model": state})
    elif kind == "caffe2":
        shape = state["backbone.bottom_up.stem.conv1.weight"].shape
        blobs = {"conv1_w": np.full(shape, 0.5, np.float32), "conv1_w_momentum": np.zeros(2)}
        path = dump(tmp_path / "start.pkl", {"blobs": blobs, "cfg": "MODEL: {}"})
    else:
        arrays = {name: value.numpy() for name, value in state.items()}
        if kind == "imagenet":
            arrays = {name.removeprefix("backbone.bottom_up."): value for name, value in arrays.items()}
        content = {"model": arrays, "__author__": "third_party", "matching_heuristics": kind == "imagenet"}
        path = dump(tmp_path / "start.pkl", content)
    models = []
    for load in (lambda model: load_start_weights(model, path), lambda model: DetectionCheckpointer(model).load(path)):
        torch.manual_seed(1)
        models.append(build_model(cfg))
        load(models[-1])
    assert_loaded(models[0], models[1].state_dict())


def test_a_node_that_joined_after_preflight_fetches_them_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    state = other_state()
    with serving() as site:
        site.answers["/start.pth"] = Path(save(tmp_path / "a.pth", {"model": state})).read_bytes()
        for _ in range(2):
            model = Model()
            load_start_weights(model, f"{site.address}/start.pth")
            assert_loaded(model, state)
        assert site.requests["/start.pth"] == 1
        with pytest.raises(ConfigurationError, match="is not on this node, and cannot be fetched") as caught:
            load_start_weights(Model(), f"{site.address}/other.pth")
    assert caught.value.problem.code == "weights_download"


def test_an_address_has_a_place_of_its_own_and_detectron2s_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVCORE_CACHE", "/cache")
    zoo = StartWeights.of("detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    assert str(zoo.path) == "/cache/detectron2/ImageNetPretrained/MSRA/R-50.pkl"
    assert StartWeights.of(zoo.address).path == zoo.path
    one, other = (StartWeights.of(f"https://{host}.org/model_final.pth?v=1") for host in "ab")
    assert one.path != other.path and one.path.name == "model_final.pth" and str(one.path).startswith("/cache/")
    assert StartWeights.of("~/a.pth").path == Path("~/a.pth").expanduser() and not StartWeights.of("a.pth").address


def test_names_of_the_model_zoo_and_of_torchvision_carry_a_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    for name, words in {"model_final_900150.pkl": "MD5", "resnet50-ba7816bf.pth": "SHA-256"}.items():
        weights = StartWeights.of(f"https://example.org/{name}")
        weights.path.parent.mkdir(parents=True)
        weights.path.write_bytes(b"abc")  # MD5 900150983cd2…, SHA-256 ba7816bf8f01…
        assert weights.checksum_problem(None) == ""
        weights.path.write_bytes(b"abd")
        assert words in weights.checksum_problem(None) and "as its name says" in weights.checksum_problem(None)
    # A file of this machine may be called what its owner likes.
    assert StartWeights.of(str(weights.path)).checksum_problem(None) == ""
