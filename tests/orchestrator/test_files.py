"""Files are replaced whole, hashes are right, and what is shown holds no password."""

import hashlib
from pathlib import Path

import pytest

from orchestrator.files import (
    cache_folder,
    existing_parent,
    file_sha256,
    holds_credentials,
    redact,
    without_credentials,
    write_atomically,
)


def test_a_file_is_written_with_its_folder_and_nothing_next_to_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    write_atomically(path, "ü")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second" and list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_files_hash_is_that_of_its_content(tmp_path: Path) -> None:
    content = b"0123456789" * 1_000_000
    (tmp_path / "x").write_bytes(content)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_the_cache_is_where_the_user_wants_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ray-detectron2-benchmark"


def test_the_nearest_existing_folder_is_found(tmp_path: Path) -> None:
    assert existing_parent(tmp_path / "a" / "b") == existing_parent(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("text", "without", "redacted"),
    [
        ("http://ada:pw@host:5000/x", "http://host:5000/x", "http://…@host:5000/x"),
        ("http://ada:p@w@host", "http://host", "http://…@host"),
        ("s3://key:secret@bucket/x?token=1", "s3://bucket/x?token=", "s3://…@bucket/x?…"),
        ("s3://key:a/b@bucket/x", "s3://bucket/x", "s3://…@bucket/x"),
        ("mysql://ada:p/w?#@host:3306/x", "mysql://host:3306/x", "mysql://…@host:3306/x"),
        (
            "postgresql://host/x?user=ada&password=pw&a=1",
            "postgresql://host/x?user=ada&password=&a=1",
            "postgresql://host/x?…",
        ),
        (
            "--set tracking.uri=http://ada:pw@host/",
            "--set tracking.uri=http://host/",
            "--set tracking.uri=http://…@host/",
        ),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("http://host/a@b", "http://host/a@b", "http://host/a@b"),
        ("http://host:5000/a@b", "http://host:5000/a@b", "http://host:5000/a@b"),
        ("http://[::1]:5000/a@b", "http://[::1]:5000/a@b", "http://[::1]:5000/a@b"),
    ],
)
def test_user_and_password_of_an_address_are_not_shown(text: str, without: str, redacted: str) -> None:
    assert (without_credentials(text), redact(text)) == (without, redacted)


@pytest.mark.parametrize(
    ("text", "has_one"),
    [
        ("s3://KEY:SECRET@bucket/x", True),
        ("s3://KEY:SEC/RET@bucket/x", True),
        ("https://ada:pw@host/w.pkl", True),
        ("https://a-token@host/w.pkl", True),
        ("see https://host/w.pkl?X-Amz-Expires=60&X-Amz-Signature=ab12", True),
        ("abfss://container@account.dfs.core.windows.net/x?sv=1&sig=ab%3D", True),
        ("https://host/w.pkl?client_secret=ab", True),
        ("https://host/w.pkl?sas-token=ab", True),
        ("https://host/w.pkl?apikey=ab", True),
        ("s3://bucket/x?secret_key=ab", True),
        ("abfss://container:key@account.dfs.core.windows.net/x", True),
        ("abfss://container@account.dfs.core.windows.net/x", False),
        ("abfss://container@account.dfs.core.windows.net/x?credential_kind=environment", False),
        ("https://host/w.pkl?tokenizer=bpe&num_tokens=5&signature_version=s3v4&secretary=1", False),
        ("see https://host;ada@host and https://host, bob@host", False),
        ("hdfs://ada@host:8020/x", False),
        ("s3://bucket/x?scheme=http&endpoint_override=127.0.0.1:9000", False),
        ("https://host:8080/models/a@2.pkl?download=1&keyword=signal", False),
        ("detectron2://a/b.pkl?matching_heuristics=True", False),
        ("mail ada@host: a question? password=x", False),
        ("/data/ada@host:1/x", False),
    ],
)
def test_an_address_with_a_password_key_or_signature_is_recognised(text: str, has_one: bool) -> None:
    assert holds_credentials(text) == has_one
