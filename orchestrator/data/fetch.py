"""Downloads COCO 2017 from its official addresses: resumable, checked by SHA-256, unpacked into detectron2's layout.

A broken connection, a stall or a restart costs nothing that was already on disk; an archive is unpacked only after
its checksum was right, and a folder appears under its final name only when it is whole.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from orchestrator.data.progress_bar import show_bar
from orchestrator.preflight.node import existing_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    OnProgress = Callable[[int, int], None]

BLOCK = 2**20
STALL_SECONDS = 30.0
"""Silence of the server after which the connection is given up and taken up again."""
TRIES_WITHOUT_PROGRESS = 5
WAIT_SECONDS = 1.0
"""Before the second try; doubled before each further one."""

ADDRESS = "http://images.cocodataset.org"


class FetchError(Exception):
    """The data cannot be fetched; the message says why and what to do."""


@dataclass(frozen=True)
class Archive:
    """A file to be fetched and unpacked.

    Attributes:
        path: Below the server's address.
        num_bytes: Its size.
        sha256: Its checksum.
        unpacked_bytes: Size of what is taken from it, rounded up.
        makes: Folders it makes, in COCO's layout.
        members: Pattern of the names that are taken from it.
    """

    path: str
    num_bytes: int
    sha256: str
    unpacked_bytes: int
    makes: str
    members: str

    @property
    def name(self) -> str:
        """Its file name."""
        return self.path.rsplit("/", 1)[-1]


COCO2017 = (
    Archive(
        "annotations/annotations_trainval2017.zip", 252_907_541,
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        900_000_000, "annotations", r"annotations/[a-z_]+_(train|val)2017\.json",
    ),
    Archive(
        "zips/val2017.zip", 815_585_330, "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        850_000_000, "val2017", r"val2017/\d{12}\.jpg",
    ),
    Archive(
        "zips/train2017.zip", 19_336_861_798, "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        20_000_000_000, "train2017", r"train2017/\d{12}\.jpg",
    ),
)  # fmt: skip
"""The official archives. Sizes and checksums as published by the data set catalogues that mirror them."""


def fetch(
    to: Path,
    *,
    archives: Sequence[Archive] | None = None,
    address: str = ADDRESS,
    stall_seconds: float = STALL_SECONDS,
    wait_seconds: float = WAIT_SECONDS,
) -> Path:
    """Fetches and unpacks archives into `to`/coco; what is there already is left as it is.

    Args:
        to: The folder for DETECTRON2_DATASETS.
        archives: What to fetch; None for COCO 2017.
        address: Server; a mirror must serve the same paths.
        stall_seconds: Silence after which a connection is given up.
        wait_seconds: Before the second try of several.

    Returns:
        The folder in COCO's layout.

    Raises:
        FetchError: No room, no connection, a wrong checksum or a broken archive.
    """
    if not address.startswith(("http://", "https://")):
        raise FetchError(f"{address}: only http:// and https:// addresses are fetched from")
    root = to.absolute() / "coco"
    wanted = [archive for archive in archives or COCO2017 if not (root / archive.makes).exists()]
    _check_room(root, wanted)
    root.mkdir(parents=True, exist_ok=True)
    for archive in wanted:
        with show_bar(f"fetching {archive.name}", in_bytes=True) as advance:
            url = f"{address.rstrip('/')}/{archive.path}"
            file = _download(url, root, archive, stall_seconds, wait_seconds, advance)
        with show_bar(f"checking {archive.name}", in_bytes=True) as advance:
            _verify(file, archive, advance)
        with show_bar(f"unpacking {archive.name}") as advance:
            _unpack(file, root, archive, advance)
        file.unlink()
    return root


def _check_room(root: Path, archives: Sequence[Archive]) -> None:
    parent = existing_parent(root)
    there = sum(part.stat().st_size for archive in archives if (part := root / f"{archive.name}.part").exists())
    # An archive goes when it is unpacked: what is needed at most is all that is unpacked and the largest archive.
    needed = sum(archive.unpacked_bytes for archive in archives)
    needed += max((archive.num_bytes for archive in archives), default=0) - there
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise FetchError(f"{parent} has {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB are needed: make room")


def _download(
    url: str, root: Path, archive: Archive, stall_seconds: float, wait_seconds: float, on_progress: OnProgress
) -> Path:
    part = root / f"{archive.name}.part"
    failures, reason = 0, ""
    while (have := part.stat().st_size if part.exists() else 0) < archive.num_bytes:
        if failures == TRIES_WITHOUT_PROGRESS:
            raise FetchError(
                f"{url}: gave up after {failures} tries without progress, at byte {have:,} of "
                f"{archive.num_bytes:,}: {reason}. Run the same command again to go on from there"
            )
        if failures:
            time.sleep(wait_seconds * 2 ** (failures - 1))
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310 - http(s)
            with urllib.request.urlopen(request, timeout=stall_seconds) as answer:  # noqa: S310 - http(s)
                # A server that does not know ranges sends the whole file: from the start again.
                starts_over = answer.status != 206
                with part.open("wb" if starts_over else "ab") as stream:
                    _copy(answer, stream, 0 if starts_over else have, archive, on_progress)
            reason = "the server ended the file early"
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code == 416:
                part.unlink(missing_ok=True)
        except http.client.HTTPException as error:
            reason = repr(error)
        except OSError as error:
            reason = str(error.strerror or error) or type(error).__name__
            if error.errno is not None and not isinstance(
                error, ConnectionError | TimeoutError | urllib.error.URLError
            ):
                raise FetchError(f"{part} cannot be written: {reason}") from error
        failures = failures + 1 if (part.stat().st_size if part.exists() else 0) <= have else 1
    return part


def _copy(
    answer: http.client.HTTPResponse, stream: BinaryIO, have: int, archive: Archive, on_progress: OnProgress
) -> None:
    while block := answer.read1(BLOCK):
        have += len(block)
        if have > archive.num_bytes:
            raise FetchError(
                f"{archive.name}: the server sends more than its {archive.num_bytes:,} bytes: not this file"
            )
        stream.write(block)
        on_progress(have, archive.num_bytes)


def _verify(file: Path, archive: Archive, on_progress: OnProgress) -> None:
    digest, done = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            done += len(block)
            on_progress(done, archive.num_bytes)
    if digest.hexdigest() != archive.sha256:
        file.unlink()
        raise FetchError(
            f"{archive.name}: SHA-256 is {digest.hexdigest()}, not {archive.sha256}: a bad file was served; it was "
            "removed. Try again, or another network"
        )


def _unpack(file: Path, root: Path, archive: Archive, on_progress: OnProgress) -> None:
    aside = root / f".{archive.makes}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    taken = 0
    try:
        with zipfile.ZipFile(file) as packed:
            members = [member for member in packed.infolist() if re.fullmatch(archive.members, member.filename)]
            if not members or sum(member.file_size for member in members) > archive.unpacked_bytes:
                raise FetchError(f"{archive.name} holds {len(members)} expected files of an unexpected size")
            for member in members:
                # Only plain names that match the pattern, and the name's last part: nothing lands elsewhere.
                target = aside / Path(member.filename).name
                target.parent.mkdir(parents=True, exist_ok=True)
                with packed.open(member) as source, target.open("wb") as stream:
                    shutil.copyfileobj(source, stream, BLOCK)
                taken += 1
                on_progress(taken, len(members))
        aside.rename(root / archive.makes)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise FetchError(f"{archive.name} cannot be unpacked: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
