"""A log that went through consoles, collectors, mail and packers gives its own figures, or says what is missing."""

import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.figures.records import TrialResult
from orchestrator.replay.record import replay
from orchestrator.replay.unpacking import ReplayError
from tests.builders.damages import BYTES, PACKERS, TEXT
from tests.builders.logs import whole_run

FIGURES = (
    "images_per_second", "wall_images_per_second", "time_to_train_seconds", "time_to_box_target_seconds",
    "startup_seconds", "schedule_seconds", "evaluation_seconds", "data_wait_share", "peak_memory_gib", "iterations",
    "global_batch_size", "base_lr", "max_iter", "num_train_images", "seed", "box_ap", "mask_ap", "num_restarts",
)  # fmt: skip
WRAPS = [name for name in TEXT if "columns" in name]
OTHERS = [name for name in TEXT if name not in WRAPS and name != "heads only"]


def _figures(result: TrialResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in FIGURES}


def _read(raw: bytes, folder: Path) -> TrialResult:
    (folder / "copied.log").write_bytes(raw)
    (one,) = replay([folder / "copied.log"])
    return one.result


@cache
def _text(styled: bool) -> str:
    return whole_run(styled=styled).text()


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory) -> TrialResult:
    return _read(_text(True).encode(), tmp_path_factory.mktemp("undamaged"))


@pytest.mark.parametrize("styled", [True, False])
@pytest.mark.parametrize("damage", TEXT)
def test_a_copied_log_gives_the_figures_of_the_log(tmp_path, undamaged, damage, styled):
    result = _read(TEXT[damage](_text(styled)).encode(), tmp_path)
    assert _figures(result) == _figures(undamaged)
    assert result.evaluations == undamaged.evaluations and result.world_size == 2
    assert not any("interrupted" in note or "last line" in note for note in result.notes)


@pytest.mark.parametrize("change", [*BYTES.values(), *PACKERS.values()], ids=[*BYTES, *PACKERS])
def test_an_encoded_or_packed_log_gives_the_figures_of_the_log(tmp_path, undamaged, change):
    result = _read(change(_text(False).encode()), tmp_path)
    assert _figures(result) == _figures(undamaged) and result.evaluations == undamaged.evaluations
    assert result.notes == []


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.booleans(),
    st.lists(st.sampled_from(OTHERS), max_size=2),
    st.sampled_from([None, *WRAPS]),
    st.sampled_from([None, *BYTES]),
    st.sampled_from([None, *PACKERS]),
    st.booleans(),
)
def test_a_log_copied_in_several_steps_never_gives_another_number(
    tmp_path_factory, undamaged, styled, damages, wrap, encoding, packer, wrapped_first
):
    wraps = [wrap] if wrap else []
    text = _text(styled)
    for name in wraps + damages if wrapped_first else damages + wraps:
        text = TEXT[name](text)
    raw = BYTES[encoding](text.encode()) if encoding else text.encode()
    raw = PACKERS[packer](raw) if packer else raw
    try:
        result = _read(raw, tmp_path_factory.mktemp("copied"))
    except ReplayError:
        return
    mine, right = _figures(result), _figures(undamaged)
    assert {name: value for name, value in mine.items() if value is not None and value != right[name]} == {}
    assert mine == right or result.notes
    for evaluation in result.evaluations:
        same = [e for e in undamaged.evaluations if e.iteration == evaluation.iteration]
        assert any(evaluation.box_ap in (None, e.box_ap) and evaluation.mask_ap in (None, e.mask_ap) for e in same)


def test_a_prefix_that_differs_from_process_to_process_separates_them(tmp_path):
    result = _read(TEXT["other ranks of srun"](_text(False)).encode(), tmp_path)
    assert result.notes == ["9 lines of other processes were left out"]
    assert len(result.evaluations) == 3


def test_lines_that_cannot_be_put_together_are_an_error(tmp_path):
    text = _text(False).replace("time: 0.5000  data_time", "time:\n0.5000 \n  data_time")
    with pytest.raises(ReplayError, match="broken by a terminal or mail"):
        _read(text.encode(), tmp_path)


def test_a_packed_log_that_is_cut_off_is_read_as_far_as_it_goes(tmp_path):
    packed = PACKERS["gzip"](_text(False).encode())
    result = _read(packed[: len(packed) - 40], tmp_path)
    assert "the packed file is cut off: what follows is not known" in result.notes
    assert result.images_per_second in (None, 8.0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "it is empty"),
        (b" \n\n", "it is empty"),
        (bytes(range(256)) * 20, "it is binary; expected detectron2's log.txt"),
        (b"hello\n", r"no line begins with \[month/day hour:minute:second; expected detectron2's log.txt"),
        (b'{"cells": [{"outputs": []}]}', "it is a notebook"),
        (b"May 04 10:00:00 gpu7 python[1]: [97B blob data]\n", "journalctl --all"),
        (b"\x28\xb5\x2f\xfd0000", "packed with zstd"),
        (b"\x1f\x8bnot gzip", "its packed data is damaged"),
    ],
)
def test_what_is_no_log_is_named(tmp_path, raw, message):
    with pytest.raises(ReplayError, match=message):
        _read(raw, tmp_path)


def test_archives_are_refused_with_what_to_do(tmp_path):
    with zipfile.ZipFile(tmp_path / "log.zip", "w") as archive:
        archive.writestr("log.txt", _text(False))
    with pytest.raises(ReplayError, match=r"a zip archive .*; unpack it"):
        replay([tmp_path / "log.zip"])


def test_a_folder_or_a_missing_file_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReplayError, match="holds neither log"):
        replay([tmp_path / "empty"])
    with pytest.raises(ReplayError, match="cannot be read: No such file"):
        replay([tmp_path / "missing.txt"])


def test_a_folder_with_a_packed_log_is_read_and_named_after_it(tmp_path):
    (tmp_path / "run7").mkdir()
    (tmp_path / "run7" / "log.txt.gz").write_bytes(PACKERS["gzip"](_text(False).encode()))
    (one,) = replay([tmp_path / "run7"])
    assert one.plan.name == "run7" and one.result.time_to_train_seconds == 73
