"""The trials of a run as they are run: those that were begun earlier as they were begun, with what changed since."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from orchestrator.experiment.plan import under
from orchestrator.runlog.changes import with_changes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.experiment.spec import Experiment
    from orchestrator.runlog.folder import EarlierRun
    from trainers.contract.plan import TrialPlan


def final_plans(
    experiment: Experiment, plans: Sequence[TrialPlan], run_id: str, earlier: EarlierRun | None = None
) -> list[TrialPlan]:
    """The plans as the trials were begun with, or begin with now; a begun one that is not planned any more is kept."""
    begun = earlier.plans if earlier else {}
    if experiment.storage.checkpoints:
        # Storage that outlives run folders: a later run of the same name must not find these checkpoints.
        plans = [dataclasses.replace(each, checkpoint_dir=under(each.checkpoint_dir, run_id[-12:])) for each in plans]
    changes = earlier.changes if earlier else {}
    final = {plan.name: with_changes(begun[plan.name], plan, changes) if plan.name in begun else plan for plan in plans}
    return list((final | {name: plan for name, plan in begun.items() if name not in final}).values())
