"""Checkpoints on S3: the same promises as on a local path, against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs
import pytest

from orchestrator.experiment.plan import under
from orchestrator.preflight.local import check_remote_storage
from tests.builders.checkpoints import newest, save, state, store
from tests.builders.s3 import KEYS, s3_server
from tests.builders.trials import plan
from trainers.checkpoints import StorageError


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        with s3_server(tmp_path_factory.mktemp("s3")) as uri:
            yield uri


def objects(uri: str) -> list[str]:
    files, root = pyarrow.fs.FileSystem.from_uri(uri)
    found = files.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    return sorted(info.path.removeprefix(f"{root}/") for info in found if info.type == pyarrow.fs.FileType.File)


def test_the_newest_and_the_best_are_kept_on_s3_and_read_back(bucket: str) -> None:
    uri = under(bucket, "kept")
    save(store(uri), 1, 2, 3, 4, scores={1: 50.0, 3: 20.0})
    assert newest(uri) == 4
    manifests = [path for path in objects(uri) if path.endswith("manifest.json")]
    assert manifests == [f"iter_000000{iteration}/manifest.json" for iteration in (1, 3, 4)]


def test_a_checkpoint_on_s3_without_its_manifest_or_with_a_flipped_bit_is_skipped(bucket: str) -> None:
    uri = under(bucket, "damaged")
    save(store(uri, keep=3), 1, 2, 3)
    files, root = pyarrow.fs.FileSystem.from_uri(uri)
    files.delete_file(f"{root}/iter_0000003/manifest.json")
    with files.open_input_stream(f"{root}/iter_0000002/state-0.pt") as stream:
        content = bytearray(stream.read())
    content[len(content) // 2] ^= 1
    with files.open_output_stream(f"{root}/iter_0000002/state-0.pt") as stream:
        stream.write(bytes(content))
    assert newest(uri) == 1


def test_preflight_asks_the_server_that_the_addresss_options_name_and_leaves_nothing_there(bucket: str) -> None:
    run = under(bucket, "asked")
    save(store(under(run, "other/checkpoints")), 1)
    before = objects(run)
    assert check_remote_storage(plan(checkpoint_dir=under(run, "trial/checkpoints"))) == []
    assert objects(run) == before


def test_an_attempt_that_was_replaced_makes_no_checkpoint_valid_on_s3(bucket: str) -> None:
    uri = under(bucket, "replaced")
    old, new = store(uri, attempt=0), store(uri, attempt=1)
    old.take_over()
    new.take_over()
    save(new, 6)
    with pytest.raises(StorageError, match="attempt 1 writes here now"):
        save(old, 8)
    assert newest(uri) == 6


def test_a_server_that_is_gone_is_an_error_that_names_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with s3_server(tmp_path) as uri:
        target = store(under(uri, "gone"))
        save(target, 4)
    target.save(8, state(8), None)
    with pytest.raises(StorageError, match="iteration 8 could not be written to bucket/checkpoints/gone"):
        target.wait()
