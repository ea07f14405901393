"""Checks that APs are on COCO's scale of 0 to 100: pycocotools and papers also have them on 0 to 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainers.contract.targets import VALIDATION_LOSS

if TYPE_CHECKING:
    from orchestrator.experiment.spec import Experiment
    from orchestrator.findings import FindingList

PROBLEM = "AP is on 0 to 100 here"


def meant_ap(ap: float | None) -> str | None:
    """What to ask about an AP or AR that is on 0 to 1, as which no model is trained; None for any other."""
    return f"Is {100 * ap:g} meant?" if ap is not None and 0 < ap < 1 else None


def check_scales(experiment: Experiment, findings: FindingList) -> None:
    """Reports targets (errors: the first evaluation would meet them) and published figures that are on 0 to 1."""
    protocol = experiment.protocol
    targets = {"target_box_ap": protocol.target_box_ap, "target_mask_ap": protocol.target_mask_ap}
    if protocol.metric != VALIDATION_LOSS:
        targets["target"] = protocol.target
    for field, ap in targets.items():
        if hint := meant_ap(ap):
            findings.error("ap_scale", f"protocol.{field}", "", f"{ap:g}: {PROBLEM}", hint)
    for row in experiment.reference_rows:
        for field, ap in {"box_ap": row.box_ap, "mask_ap": row.mask_ap}.items():
            if hint := meant_ap(ap):
                findings.warning("ap_scale", "reference_rows", f"{field} of {row.name!r}", f"{ap:g}: {PROBLEM}", hint)
