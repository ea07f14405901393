"""Verifies a bundle: recomputes every published figure, and says which statement does not follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.bundle import settings, timeline
from orchestrator.bundle.archive import Bundle, BundleError, check_files, unpack
from orchestrator.bundle.contents import BundledRun, read_run, unknown_files
from orchestrator.bundle.record import check_record, recompute
from orchestrator.bundle.signature import check_signature
from orchestrator.bundle.witnesses import check_checkpoints, check_details, check_logs
from orchestrator.bundle.worker_log import check_log
from orchestrator.findings import Finding, FindingList, has_errors, printable
from trainers.contract.plan import TrialPlan

RUNS = "runs"


@dataclass(frozen=True, slots=True)
class Verified:
    """What the verification of a bundle found."""

    manifest_sha256: str
    runs: list[Path]
    """Folders of its runs, where it was unpacked."""
    statements: tuple[str, ...]
    """What was verified, in a word or two each; what is wrong is among the findings."""
    findings: list[Finding]
    """Errors: statements that do not follow. Warnings: what could not be checked."""


def verify(path: Path, to: Path, signers: Path | None = None, manifest_sha256: str | None = None) -> Verified:
    """Unpacks a bundle and checks all of its statements.

    Args:
        path: The bundle; it may be anybody's.
        to: An empty folder, for its files.
        signers: OpenSSH's list of those whose signature counts; None for no one in particular.
        manifest_sha256: The hash that the manifest must have, known from elsewhere; None for any.

    Raises:
        BundleError: It is no bundle, or one that this version cannot read.
    """
    bundle, findings = unpack(path, to), FindingList()
    check_files(bundle, findings)
    if manifest_sha256 not in (None, bundle.manifest_sha256):
        what = f"its SHA-256 is {bundle.manifest_sha256}"
        findings.error("manifest_changed", "manifest.json", "", what, f"It was to be {manifest_sha256:.80}")
    signer = check_signature(bundle, signers, findings)
    runs = read_runs(path, bundle)
    for name in sorted(name for name in bundle.found if not name.startswith(f"{RUNS}/")):
        findings.error("file_added", name, "", "no bundle holds such a file", "Ask what it is for")
    statements = {"files": None}
    for run in runs:
        statements |= dict.fromkeys(_check_run(run, findings))
    settings.same_data(runs, findings)
    if signer:
        statements[f"signature of {signer}"] = None
    return Verified(bundle.manifest_sha256, [run.folder for run in runs], tuple(statements), findings.to_list())


def unpack_verified(path: Path, to: Path) -> Verified:
    """Unpacks a bundle all of whose statements follow.

    Raises:
        BundleError: It is no bundle, or a statement does not follow; the text is one line.
    """
    verified = verify(path, to)
    if has_errors(verified.findings):
        raise BundleError(f"{path}: not verified: {verified.findings[0].to_line()}")
    return verified


def read_runs(path: Path, bundle: Bundle) -> list[BundledRun]:
    """The runs of a bundle that was unpacked, by name. Raises BundleError."""
    folders = sorted(each for each in (bundle.folder / RUNS).glob("*") if each.is_dir())
    if not folders:
        raise BundleError(f"{path}: a bundle without a run")
    return [read_run(folder, folder.name) for folder in folders]


def _check_run(run: BundledRun, findings: FindingList) -> list[str]:
    """Checks one run; returns what was compared."""

    def guarded(what: str, check: Callable[..., object], *arguments: object) -> None:
        try:
            check(*arguments, findings)
        except Exception as error:  # noqa: BLE001 - the files may be anybody's, and hold anything
            reason = printable(f"{type(error).__name__}: {error}")[:200]
            findings.error("not_checkable", run.name, what, f"{what} cannot be checked: {reason}", "Ask for its files")

    for file in unknown_files(run):
        findings.error("file_added", f"{run.name}/{file}", "", "no bundle holds such a file", "Ask what it is for")
    recomputed = recompute(run, findings)
    guarded("its figures", check_record, run, recomputed)
    statements = ["figures", *(["score"] if run.result.benchmark else [])]
    events = {name: run.of(name) for name in recomputed.plans}
    for each in recomputed.replayed:
        events[each.plan.name] = each.events
    for trial in recomputed.trials:
        plan = recomputed.plans[trial.name]
        guarded(f"the logs of {trial.name}", check_logs, run, plan, events[trial.name], trial)
    if run.is_replayed:
        return [*statements, "logs of another program"]
    guarded("its events", timeline.check_file, run)
    guarded("its data sets", settings.check_data, run)
    for plan in recomputed.plans.values():
        assert isinstance(plan, TrialPlan)
        guarded(f"the events of {plan.name}", timeline.check_trial, run, plan)
        guarded(f"the settings of {plan.name}", settings.check_trial, run, plan)
        guarded(f"the log of {plan.name}", check_log, run, plan)
        guarded(f"the checkpoints of {plan.name}", check_checkpoints, run, plan)
        guarded(f"the evaluations of {plan.name}", check_details, run, plan)
    has_logs = all(run.place(name, "log.txt").is_file() for name in recomputed.plans)
    return [*statements, "settings", "times", *(["logs"] if has_logs else [])]
