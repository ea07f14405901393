"""Where start weights are on a machine: driver and workers find a fetched address at the same place. Stdlib only."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

CATALOGUE = "https://dl.fbaipublicfiles.com/detectron2/"
"""What `detectron2://` stands for (detectron2/utils/file_io.py, `Detectron2Handler`)."""

FETCHED_SCHEMES = ("https://", "http://")

_MATCHING = "?matching_heuristics=True"  # detectron2's way of asking for it (DetectionCheckpointer)
_CHECKSUMS = {"md5": r"model_final_([0-9a-f]{6})\.pkl", "sha256": r"[\w.-]+-([0-9a-f]{8})\.pth"}
_CALLED = {"md5": "MD5", "sha256": "SHA-256"}


@dataclass(frozen=True, slots=True)
class StartWeights:
    """Start weights as a config names them."""

    name: str
    """A path or an address, without what asks for matching heuristics."""
    matching_heuristics: bool
    """Whether names are matched by their ends, as for detectron2's ImageNet weights."""

    @classmethod
    def of(cls, name: str) -> StartWeights:
        """Reads `MODEL.WEIGHTS`, which may end in `?matching_heuristics=True`."""
        return cls(name.removesuffix(_MATCHING), name.endswith(_MATCHING))

    @property
    def address(self) -> str:
        """The address they are fetched from; "" for a file of this machine."""
        if self.name.startswith("detectron2://"):
            return CATALOGUE + self.name.removeprefix("detectron2://")
        return self.name if "://" in self.name else ""

    @property
    def path(self) -> Path:
        """Where they are on this machine once fetched.

        What detectron2 publishes is where detectron2 itself would put it (`$FVCORE_CACHE`, else
        `~/.torch/iopath_cache`), so that nothing is fetched twice. Its cache leaves out the host's name; other
        addresses have a folder each, so that two files of one name are not mistaken for one another.
        """
        if not (address := self.address):
            return Path(self.name).expanduser().absolute()
        named = os.getenv("FVCORE_CACHE") or "~/.torch/iopath_cache"
        cache = Path(os.path.expanduser(named)).absolute()  # noqa: PTH111 - as iopath does; Path.expanduser() may raise
        place = unquote(urlsplit(address).path).lstrip("/")
        if address.startswith(CATALOGUE) and ".." not in place:
            return cache / place
        folder = hashlib.sha256(address.encode()).hexdigest()[:16]
        return cache / "by_address" / folder / (Path(place).name or "weights")

    def checksum_problem(self, sha256: str | None) -> str:
        """Compares the file with a SHA-256, and what was fetched with the checksum in its name; "" where it is right.

        Names of detectron2's model zoo end in the first digits of the MD5 (MODEL_ZOO.md), torchvision's of the SHA-256.
        """
        wanted = {"sha256": sha256} if sha256 else {}
        for algorithm, pattern in _CHECKSUMS.items() if self.address else ():
            if match := re.fullmatch(pattern, self.path.name):
                wanted.setdefault(algorithm, match[1])
        for algorithm, start in wanted.items():
            with self.path.open("rb") as stream:
                # For finding damage; whoever distrusts the source gives the SHA-256.
                digest = hashlib.file_digest(stream, partial(hashlib.new, algorithm, usedforsecurity=False))
            if not (found := digest.hexdigest()).startswith(start):
                more = "" if start == sha256 else "…, as its name says"
                return f"has {_CALLED[algorithm]} {found}, not {start}{more}"
        return ""
