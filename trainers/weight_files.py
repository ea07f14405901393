"""Reads files of weights without running anything in them.

Three formats, recognised by their content: torch.save's (zip since 1.6, and the older one), detectron2's and Caffe2's
pickles. Classes that a file names are never imported: arrays and tensors are rebuilt, anything else becomes an empty
stand-in, so that a file that also holds an optimizer or a training script's arguments is read as safely as others.
"""

from __future__ import annotations

import copy
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.contract.annotations import placeholder
from trainers.contract.problems import ConfigurationError
from trainers.contract.weights import StartWeights

FIELD = "model.weights"

WRAPPERS = ("model", "state_dict", "model_state_dict")
"""Keys under which training programs put a model's weights; detectron2's own is the first."""

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of torch.save's format before 1.6: its magic number, pickled."""

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
"""First bytes of compressed files."""

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"

PICKLE_STARTS = (b"\x80", b"(", b"}", b"]", b"c")
"""What a pickle of weights begins with: its protocol from 2 on, else a tuple, a dictionary, a list or a name."""

OURS = "Give weights that torch.save or detectron2 wrote"

MAX_NAMED = 4
"""Names of weights that a message lists."""

_ARRAY_PARTS = {  # what a pickled NumPy array is rebuilt by; NumPy has moved these between its private modules
    "ndarray": np.ndarray,
    "dtype": np.dtype,
    "_reconstruct": np.empty(0).__reduce__()[0],
    "scalar": np.float64(0).__reduce__()[0],
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a file of weights holds."""

    state: dict[str, Tensor]
    matching_heuristics: bool
    """Whether names are matched by their ends, as for detectron2's ImageNet weights."""
    caffe2: bool
    """Whether the names are Caffe2's."""


def read_weights(weights: StartWeights) -> Checkpoint:
    """Reads a file of weights; nothing in it is run.

    Raises:
        ConfigurationError: It is damaged, something else than weights, or in a format that detectron2 does not read.
    """
    path = weights.path
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
        size = path.stat().st_size
    except OSError as error:
        raise weights_error("missing", f"{path} cannot be read: {error.strerror}", "Make it readable") from error
    if (other := placeholder(head)) is not None:
        what, hint = other
        again = f", or remove it so that it is fetched again: {path}" if weights.address else ""
        raise weights_error("placeholder", f"{path} is {what}", hint + again)
    _refuse_other_formats(weights, head, size)
    is_torchs = head.startswith((b"PK\x03\x04", LEGACY_MAGIC))
    content = _read_torch(weights) if is_torchs else _read_pickle(weights)
    return _checkpoint(content, path, weights.matching_heuristics, is_torchs)


def weights_error(kind: str, what: str, hint: str) -> ConfigurationError:
    """The error for weights that cannot be used; its code is `weights_` and the kind."""
    return ConfigurationError(what, f"weights_{kind}", FIELD, hint)


def _corrupt(weights: StartWeights, reason: object) -> ConfigurationError:
    why = (str(reason).strip() or "it ends early").splitlines()[0][:200]
    hint = "Remove it, so that it is fetched again" if weights.address else "Copy it again, or write it with torch.save"
    return weights_error("corrupt", f"{weights.path} is corrupt: {why}", hint)


def _refuse_other_formats(weights: StartWeights, head: bytes, size: int) -> None:
    """Names formats that are neither torch's nor a pickle."""
    path = weights.path
    if not head:
        raise _corrupt(weights, "it is empty")
    for mark, name in COMPRESSED.items():
        if head.startswith(mark):
            raise weights_error("format", f"{path} is compressed ({name})", "Unpack it and give the file inside")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        hint = "Convert it: torch.save(safetensors.torch.load_file(FILE), 'weights.pth')"
        raise weights_error("format", f"{path} is a safetensors file, which detectron2 does not read", hint)
    if head.startswith(HDF5_MAGIC):
        what = f"{path} is an HDF5 file, as Keras and TensorFlow write them, which detectron2 does not read"
        raise weights_error("format", what, OURS)
    if not head.startswith((b"PK\x03\x04", *PICKLE_STARTS)):
        if path.suffix.lower() == ".onnx":
            what = f"{path} is an ONNX model, which detectron2 does not read"
            raise weights_error("format", what, "Give the weights of the model that it was exported from")
        again = ", or remove it so that it is fetched again" if weights.address else ""
        raise weights_error("format", f"{path} is neither torch's nor a pickle", OURS + again)
    if not head.startswith(b"PK\x03\x04"):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise _corrupt(weights, error) from error
    if "constants.pkl" in names:
        hint = "Give the weights alone: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
        raise weights_error("format", f"{path} is a TorchScript model", hint)
    if "data.pkl" not in names:
        raise weights_error("corrupt", f"{path} was not written by torch.save", "Unpack it and give the weights inside")


class _StandIn(list[Any]):
    """Takes the place of what a file names and that holds no weights; keeps nothing and does nothing."""

    def __new__(cls, *_args: Any, **_keywords: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_keywords: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _encode(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")


def _new_dict(*_args: Any) -> OrderedDict[Any, Any]:
    return OrderedDict()


_PLAIN = {"collections.OrderedDict": OrderedDict, "collections.defaultdict": _new_dict, "_codecs.encode": _encode}
_DTYPES = [type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "uint8", "bool")]


def _meaning(name: str) -> Any:
    """What a dotted name in a pickle stands for: a part of an array, a plain container, else a stand-in."""
    last = name.rpartition(".")[2]
    if name.startswith("numpy.") and last in _ARRAY_PARTS:
        return _ARRAY_PARTS[last]
    return _PLAIN.get(name) or type(last, (_StandIn,), {})


def _read_torch(weights: StartWeights) -> Any:
    """By torch's own safe reader; each name that it refuses is given a harmless meaning."""
    meanings: dict[str, Any] = {}
    while True:
        known: list[Any] = [*_DTYPES, *((meaning, name) for name, meaning in meanings.items())]
        try:
            with torch.serialization.safe_globals(known):
                return torch.load(weights.path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL ([\w.]+) was not an allowed global", str(error))
            if refused is None or refused[1] in meanings:
                raise _unsafe(weights.path, str(error)) from error
            meanings[refused[1]] = _meaning(refused[1])
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
            raise _corrupt(weights, error) from error


def _unsafe(path: Path, reason: str) -> ConfigurationError:
    named = re.search(r"GLOBAL ([\w.]+)", reason)
    what = f"{path} cannot be read without running code in it{f' ({named[1]})' if named else ''}"
    hint = "Where you trust it, load it in the program that wrote it, and torch.save(model.state_dict(), 'weights.pth')"
    return weights_error("unsafe", what, hint)


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds arrays and plain values; whatever else a pickle names is replaced by a stand-in and not imported."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream, encoding="latin1")  # Caffe2's were written by Python 2
        self.stand_ins: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for."""
        meaning = _meaning(f"{module}.{name}")
        if isinstance(meaning, type) and issubclass(meaning, _StandIn):
            self.stand_ins.add(f"{module}.{name}")
        return meaning


def _read_pickle(weights: StartWeights) -> Any:
    with weights.path.open("rb") as stream:
        unpickler = _ArrayUnpickler(stream)
        try:
            content = unpickler.load()
        except Exception as error:  # a damaged pickle raises anything
            raise _corrupt(weights, error) from error
    if isinstance(content, _StandIn):
        what = f"reading {weights.path} would run code in it ({', '.join(sorted(unpickler.stand_ins)[:MAX_NAMED])})"
        raise weights_error("unsafe", what, f"{OURS}; nothing in this file was run")
    return content


def _checkpoint(content: Any, path: Path, matching_heuristics: bool, is_torchs: bool) -> Checkpoint:
    """The weights in what a file holds, by the rules of DetectionCheckpointer; more wrappers than its `model`."""
    if not isinstance(content, Mapping):
        what = f"{path} holds a {type(content).__name__}, not weights by their names"
        raise weights_error("format", what, "Write it as torch.save(model.state_dict(), 'weights.pth')")
    caffe2 = content.get("__author__") == "Caffe2"
    matching_heuristics |= content.get("matching_heuristics") is True
    state: Any = content
    if "model_state" in content:  # pycls
        matching_heuristics = True
        state = {key: value for key, value in content["model_state"].items() if "num_batches_tracked" not in key}
    elif is_torchs or "__author__" in content:
        state = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    else:  # Caffe2's: detection models have "blobs", ImageNet models do not
        caffe2 = matching_heuristics = True
        blobs = content.get("blobs", content)
        state = {key: value for key, value in blobs.items() if not str(key).endswith("_momentum")}
    # A copy of torch's keeps the versions of modules, by which detectron2 reads older ones.
    tensors: OrderedDict[str, Any] = copy.copy(state) if isinstance(state, OrderedDict) else OrderedDict(state)
    for key, value in state.items():
        del tensors[key]
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            tensors[str(key)] = torch.from_numpy(value)
        elif isinstance(value, Tensor):
            tensors[str(key)] = value
    if not tensors:
        keys = ", ".join(map(repr, list(state)[:MAX_NAMED])) or "nothing"
        hint = "Write it as torch.save(model.state_dict(), 'weights.pth')"
        raise weights_error("format", f"{path} holds no weights by their names; it holds {keys}", hint)
    return Checkpoint(tensors, matching_heuristics, caffe2)
