"""The table of a run's plan; separate from progress, so that `--dry-run` imports no figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from rich import box
from rich.markup import escape
from rich.table import Table

from orchestrator.experiment.placement import num_side_by_side, smaller
from trainers.contract.plan import TrialPlan


def plan_table(plans: list[TrialPlan], note: str = "") -> Table:
    """The plan of every trial, as `--dry-run` and the start of a run show it; fits 80 columns.

    Args:
        plans: The trials.
        note: What holds for all of them together.
    """
    devices = " and ".join(dict.fromkeys(plan.device for plan in plans))
    table = Table(
        title=f"Plan, on {devices}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, caption_justify="left",
    )  # fmt: skip
    table.add_column("Trial", no_wrap=True)
    for heading in ("Work\ners", "CPUs\neach", "Batch", "Base\nLR", "Itera-\ntions", "Warm-\nup"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("LR\nsteps", justify="right")
    table.add_column("Eval.\nevery", justify="right", no_wrap=True)
    for plan in plans:
        solver = plan.solver
        evaluation = str(solver.eval_period) if solver.eval_period else "end" if solver.evaluate_at_end else "none"
        steps = [step for step in solver.steps if step < solver.max_iter]
        table.add_row(
            escape(plan.name), str(plan.world_size), str(plan.cpus_per_worker), str(solver.global_batch_size),
            f"{solver.base_lr:g}", str(solver.max_iter), str(solver.warmup_iters),
            " ".join(map(str, steps)) or "none", evaluation,
        )  # fmt: skip
    table.caption = escape("; ".join(dict.fromkeys(filter(None, [note, *map(_extras, plans)])))) or None
    return table


def side_by_side_note(
    plans: list[TrialPlan], concurrent: int | Literal["auto"], hosts: Mapping[str, tuple[int, int]] | None
) -> str:
    """How many trials are run at a time, in a line; "" where nothing is said about it.

    Args:
        plans: The trials.
        concurrent: `trials.concurrent`.
        hosts: Host to its GPUs and CPUs; None for a cluster that has not been asked.
    """
    if concurrent == 1 or len(plans) < 2:
        return ""
    shared = "" if plans[0].own_nodes else ", on shared hosts"
    if hosts is None:
        most = "" if concurrent == "auto" else f", at most {min(concurrent, len(plans))}"
        return f"as many trials at a time as the cluster has room for{most}{shared}"
    number = num_side_by_side(plans, hosts, concurrent)
    return f"up to {number} trials at a time{shared}" if number > 1 else "one trial after the other: no room for two"


def _extras(plan: TrialPlan) -> str:
    """What a trial does besides: nothing by default."""
    evaluated_on = {"GPUs": plan.evaluation_gpus, "CPUs": plan.evaluation_cpus}
    fewer = [str(each.world_size) for each in smaller(plan)]
    parts = {
        f"{plan.accumulate} batches of each worker in a step": plan.accumulate > 1,
        f"with {' or '.join(fewer)} workers while there is no room for all": bool(fewer),
        f"best by {plan.metric}": plan.metric != "box_ap",
        f"ends after {plan.patience} evaluations without improvement": plan.patience is not None,
        f"weights averaged ({plan.ema_decay})": plan.ema_decay is not None,
        "validation loss": plan.validation_loss,
        **{f"evaluated on {number} {what} of their own": bool(number) for what, number in evaluated_on.items()},
    }
    return ", ".join(text for text, applies in parts.items() if applies)
