"""Start weights on this machine: a file is there, an address is fetched once, and what is there is no error page.

What is in the file is read by the rehearsal, which knows torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.data.fetch import FetchError, download
from orchestrator.data.progress_bar import show_bar
from orchestrator.experiment.plan import start_weights
from orchestrator.files import is_folder, redact
from orchestrator.findings import Finding
from trainers.contract.annotations import placeholder
from trainers.contract.weights import FETCHED_SCHEMES, StartWeights

if TYPE_CHECKING:
    from orchestrator.experiment.spec import Experiment

FIRST_WAIT_SECONDS = 0.5
"""Before the second attempt without progress; doubled before each further one."""

BY_HAND = "Download it by hand, and set model.weights to the file's path"


def check_weights(experiment: Experiment) -> list[Finding]:
    """Checks that the start weights are on this machine; an address is fetched, with a progress bar."""
    name = start_weights(experiment)
    problem = prepare_weights(name, experiment.model.weights_sha256) if name else None
    return [problem] if problem else []


def prepare_weights(name: str, sha256: str | None) -> Finding | None:
    """Makes sure that start weights are on this machine, where its workers look for them (`StartWeights.path`).

    An address that was fetched before is not fetched again, unless the file has not the checksum that it should have.
    Of several processes that want one file, one fetches it and the others wait.

    Args:
        name: `MODEL.WEIGHTS`: an address, or an absolute path.
        sha256: Hash the file must have; None for not checked.

    Returns:
        Why they are not there, or not what they should be; None where they are.
    """
    weights = StartWeights.of(name)
    if not weights.address:
        if is_folder(weights.path):
            return _finding(weights, "missing", "the start weights are a folder", "Correct the path")
    elif not weights.address.startswith(FETCHED_SCHEMES):
        what = f"addresses of {name.partition('://')[0]}:// are not fetched, only those of https:// and detectron2://"
        return _finding(weights, "address", what, BY_HAND)
    elif problem := _fetch(weights, sha256):
        return problem
    try:
        if wrong := weights.checksum_problem(sha256):
            hint = "Download it again, or correct model.weights_sha256 if you trust this file"
            return _finding(weights, "checksum", wrong, BY_HAND if weights.address else hint)
        with weights.path.open("rb") as stream:
            other = placeholder(stream.read(512))
    except (FileNotFoundError, NotADirectoryError):
        return _finding(weights, "missing", "the start weights do not exist", "Correct the path")
    except OSError as error:
        return _finding(weights, "missing", f"the start weights cannot be read: {error.strerror}", "Make them readable")
    return _finding(weights, "placeholder", f"the start weights are {other[0]}", other[1]) if other else None


def _finding(weights: StartWeights, kind: str, what: str, hint: str) -> Finding:
    return Finding("error", f"weights_{kind}", redact(weights.name), "model.weights", what, hint)


def _fetch(weights: StartWeights, sha256: str | None) -> Finding | None:
    import filelock

    path = weights.path
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f".{path.name}.lock")):
            if path.is_file() and not weights.checksum_problem(sha256):
                return None
            with show_bar(f"fetching {path.name}", in_bytes=True) as advance:
                download(weights.address, part, None, advance, wait_seconds=FIRST_WAIT_SECONDS)
            with part.open("rb") as stream:
                other = placeholder(stream.read(512))
            if other:
                part.unlink()
                return _finding(weights, "placeholder", f"the server sent {other[0]}", BY_HAND)
            part.replace(path)
    except FetchError as error:
        reason = str(error).removeprefix(f"{redact(weights.address)}: ")
        return _finding(weights, "download", f"the start weights cannot be fetched: {reason}", BY_HAND)
    except OSError as error:
        what, hint = f"{path.parent} cannot be written: {error.strerror}", "Set FVCORE_CACHE to a folder that can be"
        return _finding(weights, "download", what, hint)
    return None
