"""Checks that a run that is gone on with is still the one that was begun."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.findings import Finding, FindingList

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from orchestrator.runlog.folder import EarlierRun
    from trainers.contract.plan import TrialPlan


def check_earlier_data(
    earlier: EarlierRun, trials: Sequence[TrialPlan], datasets: Mapping[str, Mapping[str, Any]]
) -> list[Finding]:
    """Refuses other data than a run was begun with: order of images, epochs and AP would be of both.

    Args:
        earlier: The run.
        trials: Its trials.
        datasets: Fingerprints of `train` and `val` now; what is not known, now or then, is not compared.

    Returns:
        Errors; none where no trial has anything left to do, and none of `val` where none of these evaluates.
    """
    left = [trial for trial in trials if trial.name not in earlier.finished]
    findings = FindingList()
    for part, now in datasets.items() if left else ():
        if part == "val" and not any(trial.solver.evaluates for trial in left):
            continue
        then = earlier.datasets.get(part, now)
        sha256, images = ([each.get(key) for each in (then, now)] for key in ("annotations_sha256", "num_images"))
        if sha256[0] == sha256[1] and images[0] == images[1]:
            continue
        number = f"{images[1]} images instead of {images[0]}, " if images[0] != images[1] else ""
        hashes = " instead of ".join(str(each)[:12] for each in reversed(sha256))
        what = f"the run was begun with another {part} set: {number}SHA-256 of the annotations {hashes}"
        file = (left[0].train if part == "train" else left[0].val).annotations
        findings.error("other_data", file, part, what, "Put the file back as it was, or begin a new run")
    return findings.to_list()
