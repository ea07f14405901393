"""What tells a data set from any other: the hash of its annotations, and how many images of which sizes there are."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.data.checks import SplitReport


def fingerprint(report: SplitReport) -> dict[str, Any] | None:
    """The fingerprint of a split that was checked, by the keys of `RunStarted.datasets`; None where it was not read.

    Images count by name and size in bytes: to hash COCO's takes minutes.
    """
    if report.summary is None:
        return None
    names = {os.path.relpath(path, report.summary.images): size for path, size in report.files.items()}
    lines = "".join(f"{name} {size}\n" for name, size in sorted(names.items()))
    return {
        "annotations_sha256": report.summary.sha256,
        "num_images": report.summary.num_images,
        "image_bytes": sum(report.files.values()),
        "image_sizes_sha256": hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest(),
    }
