"""Whatever a data set or an experiment file holds, checking it ends in findings with a place, never in a traceback."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.data.checks import check_split
from orchestrator.data.generate import generate
from orchestrator.data.layout import Split
from orchestrator.data.masks import check_rle, decode_counts
from orchestrator.experiment.reading import load_experiment
from orchestrator.experiment.spec import SpecError
from orchestrator.findings import to_json
from tests.builders.bad_input import base_experiment

if TYPE_CHECKING:
    from orchestrator.findings import Finding

# Files are written and images read in every example: fewer of them than usual.
checking = settings(
    max_examples=120,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
    | st.sampled_from([0, 1, -1, 2**63, 2**31, 1e308, "", "..", "/etc/passwd", "a\0b", "\udcff", float("nan")])
)  # fmt: skip
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)
keys = st.sampled_from(
    ["id", "image_id", "category_id", "bbox", "segmentation", "area", "iscrowd", "file_name", "width", "height", "name"]
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("properties") / "set"
    generate(root, num_train=3, num_val=1, size=32, crowd_fraction=1.0)
    return root


def check(root: Path, content: bytes) -> list[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "annotations.json"
        file.write_bytes(content)
        findings = check_split(Split(file, root / "train2017", for_scoring=True)).findings
    to_json(findings)
    for finding in findings:
        assert finding.code and finding.file and finding.what and finding.hint
        assert finding.to_line().encode()
    return findings


def dump(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@given(document=anything | st.fixed_dictionaries(dict.fromkeys(("images", "annotations", "categories"), anything)))
@checking
def test_any_json_is_checked_without_a_crash(good: Path, document: Any) -> None:
    assert check(good, dump(document))


@given(content=st.binary(max_size=200))
@checking
def test_any_bytes_are_checked_without_a_crash(good: Path, content: bytes) -> None:
    assert check(good, content)


@given(part=st.sampled_from(["images", "annotations", "categories"]), index=st.integers(0, 2), key=keys, value=anything)
@checking
def test_one_spoilt_value_is_checked_without_a_crash_and_named(
    good: Path, part: str, index: int, key: str, value: Any
) -> None:
    document = json.loads((good / "annotations" / "instances_train2017.json").read_text())
    before = copy.deepcopy(document)
    document[part][index][key] = value
    for finding in check(good, dump(document)):
        assert finding.id, finding
        assert dump(document) != dump(before)


@given(cut=st.integers(1, 10_000))
@checking
def test_an_annotation_file_cut_anywhere_is_found_truncated(good: Path, cut: int) -> None:
    content = (good / "annotations" / "instances_train2017.json").read_bytes()
    (finding,) = check(good, content[: cut % (len(content) - 1) + 1])
    assert finding.code == "json_truncated" and "at byte" in finding.what


@given(size=anything, counts=anything | st.text(alphabet=[chr(code) for code in range(45, 115)], max_size=30))
@checking
def test_any_rle_is_checked_without_a_crash(size: Any, counts: Any) -> None:
    assert isinstance(check_rle({"size": size, "counts": counts}, (0, 0)), str)


@given(data=st.data(), height=st.integers(1, 40), width=st.integers(1, 40))
@checking
def test_every_mask_that_pycocotools_writes_is_fine(data: st.DataObject, height: int, width: int) -> None:
    import numpy as np
    from pycocotools import mask as coco_mask

    bits = data.draw(st.binary(min_size=height * width, max_size=height * width))
    mask = np.asfortranarray(np.frombuffer(bits, dtype=np.uint8).reshape(height, width) & 1)
    counts = coco_mask.encode(mask)["counts"].decode()
    assert decode_counts(counts).sum() == height * width
    assert check_rle({"size": [height, width], "counts": counts}, (width, height)) == ""


@given(
    path=st.lists(st.sampled_from(["data", "coco", "trials", "world_sizes", "model", "overrides", "name"]), max_size=3),
    value=anything,
)
@checking
def test_any_experiment_is_read_or_refused_with_its_place(path: list[str], value: Any) -> None:
    values = base_experiment(Path("/data"))
    node: Any = values
    for part in path[:-1]:
        node = node.get(part) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node[path[-1] if path else "extra"] = value
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "experiment.yaml"
        file.write_bytes(yaml.safe_dump(values).encode("utf-8", "surrogatepass"))
        try:
            load_experiment(file)
        except SpecError as error:
            message = str(error)
        else:
            message = ""
    assert not message or "experiment.yaml" in message


@given(content=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
@checking
def test_any_file_is_read_as_an_experiment_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "experiment.yaml"
        file.write_bytes(content)
        with pytest.raises(SpecError, match=r"experiment\.yaml"):
            load_experiment(file)
