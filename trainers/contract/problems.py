"""What is wrong with a plan: reported by preflight's rehearsal, raised in a worker. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong; the fields of the driver's `Finding`."""

    level: Literal["error", "warning"]
    code: str
    """Stable short name of the kind, such as `weights_unmatched`."""
    file: str
    """Config key, field of the experiment, or file it is about."""
    what: str
    """What is wrong, with the value that was found."""
    hint: str
    """How to fix it: a sentence without its full stop."""
    id: str = ""
    """Which entry of it; "" for none."""


class ConfigurationError(ValueError):
    """detectron2 cannot do what the plan asks for.

    Args:
        what: What is wrong.
        code: Stable short name of the kind.
        key: Config key, field of the experiment, or file it is about.
        hint: How to fix it: a sentence without its full stop.
    """

    def __init__(self, what: str, code: str = "model_config", key: str = "model", hint: str = "") -> None:
        super().__init__(what, code, key, hint)
        self.problem = Problem("error", code, key, what, hint or "Correct the model config or model.overrides")

    def __str__(self) -> str:
        problem = self.problem
        return f"{problem.file}: {problem.what}. {problem.hint}."
