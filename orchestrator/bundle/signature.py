"""Signs a bundle's manifest with an SSH key and checks such a signature, by OpenSSH's `ssh-keygen -Y`.

It is on nearly every machine, works without a network, and people have its keys already and publish them
(`https://github.com/USER.keys`). Sigstore needs its servers to sign; minisign would be one more program and key.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from orchestrator.bundle.archive import MANIFEST, SIGNATURE, Bundle, BundleError
from orchestrator.findings import FindingList, printable

NAMESPACE = "detection-benchmark"
"""What the signature is for, so that one made for something else does not count."""

TIMEOUT_SECONDS = 60.0


def signature(content: bytes, key: Path) -> bytes:
    """The signature of some bytes by an SSH key (a private key, or a public one whose private one an agent holds).

    Raises:
        BundleError: `ssh-keygen` is not installed, or cannot sign with this key.
    """
    with tempfile.TemporaryDirectory(prefix="bundle-") as folder:
        file = Path(folder, MANIFEST)
        file.write_bytes(content)
        done = _ssh_keygen("-Y", "sign", "-q", "-f", str(key), "-n", NAMESPACE, str(file))
        if done is None:
            raise BundleError(f"{key}: cannot sign: ssh-keygen (OpenSSH) is not installed")
        if done.returncode != 0 or not Path(f"{file}.sig").is_file():
            raise BundleError(f"{key}: cannot sign: {_reason(done)}")
        return Path(f"{file}.sig").read_bytes()


def check_signature(bundle: Bundle, signers: Path | None, findings: FindingList) -> str:
    """Checks the signature of a bundle that has one.

    Args:
        bundle: The bundle.
        signers: OpenSSH's list of allowed signers (`NAME KEY` in each line); None for any key.
        findings: Gets what is wrong, and what cannot be checked.

    Returns:
        Who signed, for a person: a name of the list, or the key's fingerprint; "" where that is not known.
    """
    if not bundle.is_signed:
        if signers is not None:
            findings.error("not_signed", SIGNATURE, "", "the bundle is not signed", "Ask for a signed one")
        return ""
    content, place = (bundle.folder / MANIFEST).read_bytes(), str(bundle.folder / SIGNATURE)
    common = ("-n", NAMESPACE, "-s", place)
    if signers is None:
        done = _ssh_keygen("-Y", "check-novalidate", *common, content=content)
        name = "a key that no list names"
    else:
        found = _ssh_keygen("-Y", "find-principals", "-s", place, "-f", str(signers))
        name = found.stdout.split("\n")[0].strip() if found else ""
        if found and not name:
            what = f"no signer of {signers} made it"
            findings.error("signature_unknown", SIGNATURE, "", what, "Take the list of those whom you trust")
            return ""
        done = _ssh_keygen("-Y", "verify", *common, "-f", str(signers), "-I", name, content=content)
    if done is None:
        what = "ssh-keygen (OpenSSH) is not installed, so it is not checked"
        findings.warning("signature_unchecked", SIGNATURE, "", what, "Install openssh-client")
        return ""
    if done.returncode != 0:
        what = f"it is no signature of this manifest: {_reason(done)}"
        findings.error("signature_wrong", SIGNATURE, "", what, "Ask for the bundle as it was signed")
        return ""
    key = next((word for word in done.stdout.split() if word.startswith("SHA256:")), "")
    return printable(f"{name} ({key})")


def _ssh_keygen(*arguments: str, content: bytes = b"") -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            ["ssh-keygen", *arguments],
            input=content.decode(errors="surrogateescape"),
            errors="surrogateescape",
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(error.cmd, 1, "", f"no answer within {TIMEOUT_SECONDS:g} s")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return printable(lines[-1]) if lines else f"ssh-keygen ended with {done.returncode}"
