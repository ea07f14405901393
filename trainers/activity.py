"""What a rank's training thread is doing at the moment, for its heartbeats."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from trainers.contract.events import Section


@dataclass(slots=True)
class Activity:
    """What the training thread is doing; read by the thread that sends heartbeats.

    Attributes:
        section: Section of the loop.
        part: `data`, `forward`, `backward`, `optimizer`, or "".
        iteration: Iterations done.
        since: When the section began (Unix seconds); a step is a section of its own.
        image_files: Images of the current batch.
    """

    section: Section = "setup"
    part: str = ""
    iteration: int = 0
    since: float = field(default_factory=time.time)
    image_files: tuple[str, ...] = ()

    def enter(self, section: Section, part: str = "") -> None:
        """Marks the beginning of a section, or of a part of a step."""
        if section != self.section or part in ("", "data"):
            self.since = time.time()
        self.section, self.part = section, part
