"""What a harness counts."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Tally:
    """Tries and their ends.

    Attributes:
        ok: ended as it must: recovered, refused with a clear error, or answered rightly.
        lost: what was there before is gone, or cannot be continued.
        wrong: ended in any other way: a foreign error, a hang, a crash, a wrong answer.
        accepted_bad: taken for good although it was not.
        disturbed: verbs that a signal ended, of which something was left to be done.
        problems: a line for each try that is not ok.
    """

    name: str
    seed: int
    tried: int = 0
    ok: int = 0
    lost: int = 0
    wrong: int = 0
    accepted_bad: int = 0
    disturbed: int = 0
    problems: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def add(self, end: str, problem: str = "") -> None:
        """Count one try that ended as `ok`, `lost`, `wrong` or `accepted_bad`."""
        self.tried += 1
        setattr(self, end, getattr(self, end) + 1)
        if end != "ok":
            self.problems.append(f"{end}: {problem}")

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        del found["problems"]
        return found | {"seconds": round(time.monotonic() - found.pop("started"), 1)}
