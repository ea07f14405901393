"""`data fetch` gets through broken connections, refuses bad files, and never leaves half a data set in place."""

from __future__ import annotations

import hashlib
import io
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import pytest
from typer.testing import CliRunner

from orchestrator.data.__main__ import app
from orchestrator.data.fetch import BLOCK_BYTES, COCO2017, Archive, FetchError, fetch

if TYPE_CHECKING:
    from collections.abc import Iterator


def pack(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


IMAGES = {f"val2017/{index:012d}.jpg": bytes([index]) * 40_000 for index in range(5)}
PACKED = pack(**IMAGES)


def archive_of(content: bytes, **changes: Any) -> Archive:
    values: dict[str, Any] = {
        "path": "zips/val2017.zip", "num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
        "unpacked_bytes": 10**6, "makes": "val2017", "members": r"val2017/\d{12}\.jpg",
    }  # fmt: skip
    return Archive(**(values | changes))


class Server:
    """A file server that misbehaves on request."""

    def __init__(self) -> None:
        self.content = PACKED
        """What it serves, whatever the path."""
        self.status = 200
        """Sent instead of the file where it is another."""
        self.knows_ranges = True
        """Whether it honours a Range header."""
        self.cut_after: int | None = None
        """Bytes after which it drops the connection; None serves all."""
        self.stall_after: int | None = None
        """Bytes after which it falls silent, once, until the test is over."""
        self.ranges: list[int] = []
        """Start of every request's range, in order."""
        self.test_is_over = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        match = re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start = int(match[1]) if match and self.knows_ranges else 0
        self.ranges.append(start)
        if self.status != 200:
            request.send_error(self.status)
            return
        body = self.content[start:]
        request.send_response(206 if match and self.knows_ranges else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if self.stall_after is not None:
            request.wfile.write(body[: self.stall_after])
            request.wfile.flush()
            self.stall_after = None
            self.test_is_over.wait(600)
        elif self.cut_after is not None:
            request.wfile.write(body[: self.cut_after])
            request.close_connection = True
        else:
            request.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.test_is_over.set()
    server.http.shutdown()
    server.http.server_close()


def get(server: Server, to: Path, *archives: Archive, stall_seconds: float = 60.0) -> Path:
    return fetch(
        to, archives=archives or (archive_of(PACKED),), address=server.address, stall_seconds=stall_seconds,
        wait_seconds=0.01,
    )  # fmt: skip


def leftovers(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_an_archive_is_fetched_unpacked_and_removed(server: Server, tmp_path: Path) -> None:
    root = get(server, tmp_path)
    assert {f"val2017/{path.name}": path.read_bytes() for path in (root / "val2017").iterdir()} == IMAGES
    assert leftovers(root) == ["val2017"]
    get(server, tmp_path)
    assert len(server.ranges) == 1  # what is there is not fetched again


def test_a_connection_cut_again_and_again_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.cut_after = BLOCK_BYTES + 1000  # of which the last 1,000 bytes are lost with the connection
    root = get(server, tmp_path)
    assert server.ranges == [0, BLOCK_BYTES, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES]
    assert len(list((root / "val2017").iterdir())) == 5


def test_a_stalled_connection_is_given_up_and_taken_up(server: Server, tmp_path: Path) -> None:
    server.stall_after = 2 * BLOCK_BYTES
    get(server, tmp_path, stall_seconds=2.0)
    assert sorted(set(server.ranges)) == [0, 2 * BLOCK_BYTES]  # a busy machine may be silent for two seconds, too


def test_a_server_that_sends_nothing_is_given_up(server: Server, tmp_path: Path) -> None:
    server.content = b""
    with pytest.raises(FetchError, match=r"without progress, at byte 0 .*: the server ended the file early"):
        get(server, tmp_path)
    assert len(server.ranges) == 5


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.knows_ranges = False
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "val2017.zip.part").write_bytes(PACKED[:100])
    get(server, tmp_path)
    assert (tmp_path / "coco" / "val2017").is_dir()


def test_an_interrupted_fetch_goes_on_in_the_next_run(server: Server, tmp_path: Path) -> None:
    server.status = 503
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "val2017.zip.part").write_bytes(PACKED[:1000])
    with pytest.raises(FetchError, match=r"gave up after 5 attempts without progress, at byte 1,000 .* 503"):
        get(server, tmp_path)
    server.status = 200
    get(server, tmp_path)
    assert server.ranges[-1] == 1000


def test_a_bad_file_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    server.content = PACKED[:-1] + b"?"
    with pytest.raises(FetchError, match="a bad file was served"):
        get(server, tmp_path)
    assert leftovers(tmp_path / "coco") == []


def test_a_file_that_is_too_long_is_refused(server: Server, tmp_path: Path) -> None:
    server.content = PACKED + b"more"
    with pytest.raises(FetchError, match="sends more than"):
        get(server, tmp_path)


@pytest.mark.parametrize(
    "members",
    [
        {"../../evil.jpg": b"x"},
        {"/etc/evil.jpg": b"x"},
        {"val2017/../evil.jpg": b"x"},
        {"val2017/000000000001.jpg": b"0" * 2_000_000},
    ],
)
def test_an_archive_unpacks_only_what_is_expected_of_it(
    server: Server, tmp_path: Path, members: dict[str, bytes]
) -> None:
    server.content = pack(**members)
    with pytest.raises(FetchError, match="expected files"):
        get(server, tmp_path / "to", archive_of(server.content))
    assert leftovers(tmp_path) == ["to"] and not list(tmp_path.rglob("*.jpg"))


def test_a_broken_archive_leaves_no_half_folder(server: Server, tmp_path: Path) -> None:
    server.content = b"no archive" * 100
    with pytest.raises(FetchError, match="cannot be unpacked"):
        get(server, tmp_path, archive_of(server.content))
    assert not (tmp_path / "coco" / "val2017").exists()


def test_room_is_looked_at_before_anything_is_fetched(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="GiB are needed"):
        get(server, tmp_path, archive_of(PACKED, unpacked_bytes=10**16))
    assert server.ranges == [] and list(tmp_path.iterdir()) == []


def test_two_processes_do_not_fetch_into_one_folder(server: Server, tmp_path: Path) -> None:
    with filelock.FileLock(tmp_path / ".coco.lock"), pytest.raises(FetchError, match="another process is fetching"):
        get(server, tmp_path)
    assert server.ranges == []


def test_only_web_addresses_are_fetched_from(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="only http"):
        fetch(tmp_path, address="file:///etc")


def test_the_command_says_what_went_wrong(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.data.fetch.COCO2017", (archive_of(PACKED),))
    server.content = b"?" * len(PACKED)
    command = ["fetch", "coco2017", "--to", str(tmp_path), "--mirror", server.address]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "SHA-256" in done.stderr
    server.content = PACKED
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and f"DETECTRON2_DATASETS={tmp_path}" in done.stdout


def test_the_official_archives_make_detectron2s_layout() -> None:
    assert {archive.makes for archive in COCO2017} == {"annotations", "train2017", "val2017"}
    assert all(re.fullmatch("[0-9a-f]{64}", archive.sha256) for archive in COCO2017)
    annotations = next(archive for archive in COCO2017 if archive.makes == "annotations")
    assert re.fullmatch(annotations.members, "annotations/instances_train2017.json")
