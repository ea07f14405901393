"""Records what a rank's training thread is doing, for its heartbeats."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from trainers.contract.events import Section


@dataclass(slots=True)
class Activity:
    """What the training thread is doing; read by the thread that sends heartbeats."""

    section: Section = "setup"
    """Section of the loop."""
    part: str = ""
    """`data`, `forward`, `backward`, `optimizer`; empty for none."""
    iteration: int = 0
    """Iterations done."""
    since: float = field(default_factory=time.time)
    """When the section began (Unix seconds); every step begins a new section."""
    image_files: tuple[str, ...] = ()
    """Images of the current batch."""

    def enter(self, section: Section, part: str = "") -> None:
        """Marks the beginning of a section, or of a part of a step."""
        if section != self.section or part in ("", "data"):
            self.since = time.time()
        self.section, self.part = section, part
