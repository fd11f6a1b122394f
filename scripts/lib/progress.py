"""How far a stage is, in a small file that others may read at any time."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def say(id: str, text: str) -> None:
    """One line on a node on the terminal, also where several nodes run at once."""
    print(f"{id}  {text}", file=sys.stderr, flush=True)


class Progress:
    """Writes `progress.json` in a work folder: step, steps, metrics, seconds left.

    The time left is taken from the steps of this process, so that a resumed run
    does not count what an earlier one did.
    """

    def __init__(self, work: Path) -> None:
        self.path = work / "progress.json"
        self.began: tuple[float, int] | None = None
        self.written = 0.0

    def report(self, step: int, steps: int, **metrics: float) -> None:
        """Record `step` of `steps`; at most twice a second, but the last always."""
        now = time.monotonic()
        if self.began is None:
            self.began = now, step
        if step < steps and now - self.written < 0.5:
            return
        self.written = now
        began, first = self.began
        rate = (step - first) / (now - began) if now > began else 0.0
        state = {"step": step, "steps": steps, **metrics}
        if rate:
            state["seconds_left"] = (steps - step) / rate
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(self.path)
