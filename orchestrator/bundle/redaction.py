"""Takes out of a run's files what is nobody's business: passwords, tokens and home folders.

Text is replaced in place, so that JSON stays JSON and every number stays as it was.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

HIDDEN = "[hidden]"

MIN_SECRET = 8
"""Characters of the shortest value of the environment that is looked for; shorter ones are words."""

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE", re.IGNORECASE)

_ESCAPED = r"\\(?![\"'])."
"""A character with its backslash, in JSON; a quote ends the text, which may itself be JSON."""

_PATTERNS = (
    (rf"(?<=://)(?:[^\s\"'<>\\/?#]|{_ESCAPED})*@", ""),  # user and password
    (
        rf"(://(?:[^\s\"'<>\\?]|{_ESCAPED})*)\?(?:[^\s\"'<>\\]|{_ESCAPED})*",
        r"\1",
    ),  # an address's options, which may hold keys
    (r"\b(Bearer|Basic) [\w.~+/=-]{8,}", rf"\1 {HIDDEN}"),
    (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)", HIDDEN),
    (r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", HIDDEN),
    (r"\bgh[opsru]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}|\bhf_[A-Za-z0-9]{16,}", HIDDEN),
    (r"\bsk-[\w-]{20,}|\bxox[abeprs]-[\w-]{10,}|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*", HIDDEN),
    (
        r"(?i)((?:token|secret|passw(?:or)?d|api_?key|access_?key|private_?key)(?:\\?[\"'])?\s*[=:]\s*(?:\\?[\"'])?)"
        r"(?!null\b|none\b|true\b|false\b|[\d.eE+-]+\b)[^\s\"',;&}\])\\]{6,}",
        rf"\1{HIDDEN}",
    ),
)


class Redaction:
    """Hides what the environment of this process holds and what looks like a secret.

    Args:
        environment: Values of variables that are named like secrets (`…_TOKEN`, `…PASSWORD`) are hidden wherever they
            are; the home folder becomes `~`.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        secrets = {
            value
            for name, value in environment.items()
            if _SECRET_NAME.search(name) and len(value) >= MIN_SECRET and not Path(value).exists()
        }
        homes = {environment.get("HOME", "").rstrip("/")} - {"", "/"}
        self._secrets = _as_written(secrets)
        own = [rf"{re.escape(home)}(?![\w.-])" for home in _as_written(homes)]
        folders = "|".join([*own, r"/(?:home|Users)/[^/\s\"'`,;:)\]}>]+", r"/root(?![\w.-])"])
        self._patterns = [(re.compile(p, re.DOTALL), text) for p, text in (*_PATTERNS, (folders, "~"))]

    def apply(self, content: bytes) -> bytes:
        """The text without them."""
        text = content.decode("utf-8", "surrogateescape")
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        for pattern, instead in self._patterns:
            text = pattern.sub(instead, text)
        return text.encode("utf-8", "surrogateescape")


def _as_written(values: set[str]) -> list[str]:
    """Values as text files and JSON files hold them, the longest first."""
    quoted = (json.dumps(value, ensure_ascii=ascii_only)[1:-1] for value in values for ascii_only in (True, False))
    forms = {*values, *quoted}
    return sorted(forms, key=lambda form: (-len(form), form))
