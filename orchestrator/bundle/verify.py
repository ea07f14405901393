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
from orchestrator.bundle.witnesses import check_checkpoints, check_logs
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

    def guarded(check: Callable[[], object], what: str) -> None:
        try:
            check()
        except Exception as error:  # noqa: BLE001 - the files may be anybody's, and hold anything
            reason = printable(f"{type(error).__name__}: {error}")[:200]
            findings.error("not_checkable", run.name, what, f"{what} cannot be checked: {reason}", "Ask for its files")

    for file in unknown_files(run):
        findings.error("file_added", f"{run.name}/{file}", "", "no bundle holds such a file", "Ask what it is for")
    recomputed = recompute(run, findings)
    guarded(lambda: check_record(run, recomputed, findings), "its figures")
    statements = ["figures", *(["score"] if run.result.benchmark else [])]
    events = {name: run.of(name) for name in recomputed.plans}
    for each in recomputed.replayed:
        events[each.plan.name] = each.events
    for trial in recomputed.trials:
        plan = recomputed.plans[trial.name]
        guarded(lambda t=trial, p=plan: check_logs(run, p, events[t.name], t, findings), f"the logs of {trial.name}")
    if run.is_replayed:
        return [*statements, "logs of another program"]
    guarded(lambda: timeline.check_file(run, findings), "its events")
    guarded(lambda: settings.check_data(run, findings), "its data sets")
    logs = []
    for plan in recomputed.plans.values():
        assert isinstance(plan, TrialPlan)
        guarded(lambda p=plan: timeline.check_trial(run, p, findings), f"the events of {plan.name}")
        guarded(lambda p=plan: settings.check_trial(run, p, findings), f"the settings of {plan.name}")
        guarded(lambda p=plan: logs.append(check_log(run, p, findings)), f"the log of {plan.name}")
        guarded(lambda p=plan: check_checkpoints(run, p, findings), f"the checkpoints of {plan.name}")
    return [*statements, "settings", "times", *(["logs"] if all(logs) else [])]
