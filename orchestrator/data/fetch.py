"""Downloads COCO 2017 from its official addresses: resumable, checked by SHA-256, unpacked into detectron2's layout.

An archive is unpacked only after its checksum was verified, and a folder gets its final name only when it is complete.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.progress_bar import OnProgress, show_bar
from orchestrator.files import existing_parent, file_sha256, redact
from orchestrator.findings import root_cause

BLOCK_BYTES = 2**16
"""What is written at once, and at most lost when a connection breaks."""

STALL_SECONDS = 30.0
"""Silence of the server after which the connection is closed and the download resumed over another one."""

ATTEMPTS_WITHOUT_PROGRESS = 5

WAIT_SECONDS = 1.0
"""Before the second attempt without progress; doubled before each further one."""

ADDRESS = "http://images.cocodataset.org"


class FetchError(Exception):
    """The data cannot be fetched; the message says why and what to do."""


@dataclass(frozen=True)
class Archive:
    """A file to be fetched and unpacked."""

    path: str
    """Path below the server's address."""
    num_bytes: int
    sha256: str
    unpacked_bytes: int
    """Size of what is unpacked, rounded up."""
    makes: str
    """Folder it makes, in COCO's layout."""
    members: str
    """Pattern of the names that are unpacked."""

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
    """Fetches and unpacks archives into `to`/coco, and returns that folder; folders in it that exist are left alone.

    Args:
        to: The folder for DETECTRON2_DATASETS.
        archives: What to fetch; None for COCO 2017.
        address: Server; a mirror must serve the same paths.
        stall_seconds: Silence of the server after which a connection is closed.
        wait_seconds: Wait before the second attempt.

    Raises:
        FetchError: No space, no connection, a wrong checksum, a broken archive, or another fetch into `to` is running.
    """
    if not address.startswith(("http://", "https://")):
        raise FetchError(f"{address}: only http:// and https:// addresses are fetched from")
    import filelock

    root = to.absolute() / "coco"
    wanted = [archive for archive in archives or COCO2017 if not (root / archive.makes).exists()]
    _check_room(root, wanted)
    root.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(to / ".coco.lock", timeout=0):
            for archive in wanted:
                part = root / f"{archive.name}.part"
                with show_bar(f"fetching {archive.name}", in_bytes=True) as advance:
                    url = f"{address.rstrip('/')}/{archive.path}"
                    waits = {"stall_seconds": stall_seconds, "wait_seconds": wait_seconds}
                    download(url, part, archive.num_bytes, advance, **waits)
                with show_bar(f"checking {archive.name}") as advance:
                    advance(0, None)
                    found = file_sha256(part)
                if found != archive.sha256:
                    part.unlink()
                    raise FetchError(
                        f"{archive.name}: SHA-256 is {found}, not {archive.sha256}: a bad file was served; it was "
                        "removed. Try again, or from another network"
                    )
                with show_bar(f"unpacking {archive.name}") as advance:
                    _unpack(part, root, archive, advance)
                part.unlink()
    except filelock.Timeout:
        raise FetchError(f"another process is fetching into {root}: wait until it has finished") from None
    return root


def _check_room(root: Path, archives: Sequence[Archive]) -> None:
    parent = existing_parent(root)
    # An archive is removed once unpacked: at most, everything unpacked and the largest archive are there at once.
    needed = sum(archive.unpacked_bytes - _size(root / f"{archive.name}.part") for archive in archives)
    needed += max((archive.num_bytes for archive in archives), default=0)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise FetchError(f"{parent} has {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB are needed: free some")


def download(
    url: str,
    part: Path,
    num_bytes: int | None,
    on_progress: OnProgress,
    *,
    stall_seconds: float = STALL_SECONDS,
    wait_seconds: float = WAIT_SECONDS,
) -> None:
    """Fetches a file into `part`, from where an earlier attempt ended; a lost connection is resumed over another one.

    Args:
        url: The file's address.
        part: Where to; its folder exists.
        num_bytes: Its size; None to take it from the server.
        on_progress: Called with the bytes so far, and of how many.
        stall_seconds: Silence of the server after which a connection is closed.
        wait_seconds: Wait before the second attempt.

    Raises:
        FetchError: The server refuses or cannot be reached, sends something else, or `part` cannot be written.
    """
    import requests
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

    attempts = Retrying(
        retry=retry_if_exception(_is_worth_another_attempt),
        stop=stop_after_attempt(ATTEMPTS_WITHOUT_PROGRESS),
        wait=wait_exponential(multiplier=wait_seconds),
        reraise=True,
    )
    place, total = redact(url), num_bytes
    while total is None or _size(part) < total:
        try:
            total = attempts(_append, url, part, num_bytes, stall_seconds, on_progress)
        except requests.RequestException as error:
            answer, of = error.response, f" of {num_bytes:,}" if num_bytes else ""
            if answer is not None and not _is_worth_another_attempt(error):
                raise FetchError(f"{place}: the server answers {answer.status_code} {answer.reason}") from error
            reason = root_cause(error) if answer is None else f"the server answers {answer.status_code} {answer.reason}"
            raise FetchError(
                f"{place}: gave up after {ATTEMPTS_WITHOUT_PROGRESS} attempts without progress, at byte "
                f"{_size(part):,}{of}: {reason}. Run the same command again to resume from there"
            ) from error
        except OSError as error:
            raise FetchError(f"{part} cannot be written: {error.strerror}") from error


def _is_worth_another_attempt(error: BaseException) -> bool:
    """Whether a failed request may succeed later: not one that the server refuses, such as 404."""
    import requests

    if not isinstance(error, requests.RequestException):
        return False
    status = error.response.status_code if error.response is not None else 0
    wrong = (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema)
    return not isinstance(error, wrong) and (not 400 <= status < 500 or status in (408, 416, 429))


def _append(url: str, part: Path, num_bytes: int | None, stall_seconds: float, on_progress: OnProgress) -> int | None:
    """Adds to a partial file until the connection ends; returns the file's size, None where more is to come.

    Raises RequestException if the connection gave nothing.
    """
    import requests

    before, total = _size(part), num_bytes
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={before}-"} if before else {})
    failure = requests.RequestException("the server ended the file early")
    try:
        with requests.get(url, headers=headers, stream=True, timeout=stall_seconds) as answer:
            if answer.status_code == requests.codes.requested_range_not_satisfiable:
                part.unlink(missing_ok=True)
            answer.raise_for_status()
            # A server that does not know ranges sends the whole file: from the start again.
            is_partial = answer.status_code == requests.codes.partial_content
            if total is None and (rest := answer.headers.get("Content-Length", "")).isdigit():
                total = int(rest) + (before if is_partial else 0)
            with part.open("ab" if is_partial else "wb") as stream:
                for block in answer.iter_content(BLOCK_BYTES):
                    stream.write(block)
                    on_progress(stream.tell(), total)
                    if total is not None and stream.tell() > total:
                        name = part.name.removesuffix(".part")
                        raise FetchError(f"{name}: the server sends more than its {total:,} bytes: not this file")
            if total is None:  # the server does not say: what it has sent is all
                return _size(part)
    except requests.RequestException as error:
        failure = error
    if _size(part) <= before:
        raise failure
    return total


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _unpack(file: Path, root: Path, archive: Archive, on_progress: OnProgress) -> None:
    partial = root / f".{archive.makes}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with zipfile.ZipFile(file) as packed:
            members = [member for member in packed.infolist() if re.fullmatch(archive.members, member.filename)]
            if not members or sum(member.file_size for member in members) > archive.unpacked_bytes:
                raise FetchError(f"{archive.name} holds {len(members)} expected files of an unexpected size")
            for index, member in enumerate(members, 1):
                # Only plain names that match the pattern, and the name's last part: nothing is written elsewhere.
                target = partial / Path(member.filename).name
                target.parent.mkdir(parents=True, exist_ok=True)
                with packed.open(member) as source, target.open("wb") as stream:
                    shutil.copyfileobj(source, stream)
                on_progress(index, len(members))
        partial.rename(root / archive.makes)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise FetchError(f"{archive.name} cannot be unpacked: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
