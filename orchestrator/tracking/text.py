"""Text as MLflow takes it: what somebody typed becomes a filter, a name, a key or a value here and nowhere else."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Literal

MAX_LENGTHS = {"filter": 250, "name": 250, "key": 250, "unique key": 250, "param": 6000, "tag": 5000}
"""Characters that every store takes, in MLflow's rules and in the columns of its tables."""

_UNFIT = {
    "filter": re.compile(r"""[\x00-\x1f\x7f\ud800-\udfff'"`\\%]"""),
    "key": re.compile(r"[^\w.\- :/]|[\ud800-\udfff]"),
}
"""Characters that cannot be used; MLflow's filters have no way to write a quote."""

_UNFIT_ANYWHERE = re.compile(r"[\x00\ud800-\udfff]")
"""Of every text: what PostgreSQL and UTF-8 do not have."""


def fit(text: object, use: Literal["filter", "name", "key", "unique key", "param", "tag"]) -> str:
    """A text for one use in MLflow: unchanged wherever it can be used as it is, cut where it is too long.

    Args:
        text: Anything with a text.
        use: `filter` for a value that is searched for, which must be stored in this form as well; `key` for the name of
            a metric, param or tag, `unique key` for one that somebody typed a part of; `name` for a run's; `param` and
            `tag` for their values.

    Returns:
        For `filter` and `unique key`, different texts stay different.
    """
    if use == "unique key":
        key, digest = fit(text, "key"), hashlib.sha256(str(text).encode(errors="surrogatepass")).hexdigest()[:8]
        return key if key == text else f"{key[: MAX_LENGTHS[use] - 9].rstrip('/')}-{digest}"
    whole = _UNFIT.get(use, _UNFIT_ANYWHERE).sub(_escaped if use != "key" else "_", str(text))
    limit = MAX_LENGTHS[use]
    if use == "key":  # MLflow takes a key for a path as well
        path = "/".join(part for part in whole.split("/") if part.strip("."))
        return path.lstrip(".")[:limit].rstrip("/") or "_"
    if use != "filter" or len(whole) <= limit:
        return whole[:limit]
    digest = hashlib.sha256(whole.encode()).hexdigest()
    return f"{whole[: limit - len(digest)]}{digest}"


def fit_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as MLflow takes them."""
    return {fit(key, "key"): fit(value, "tag") for key, value in tags.items()}


def own_runs(ids: dict[str, str]) -> dict[str, str]:
    """Of MLflow's run ids by name, those of the run itself: not of references, which other runs share."""
    return {name: id for name, id in ids.items() if not name.startswith("reference/")}


def _escaped(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass"))
