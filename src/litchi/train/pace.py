"""A clock of what a watcher has seen, which stands still while the watcher does.

Patience is for a rank that does not move while others do. Where a whole machine stood still, as a suspended job or a
virtual machine that is moved does, nobody has hung, and nobody may be ended for the time that went by.
"""

from __future__ import annotations

import time


class Pace:
    """Seconds between looks, each counted up to `longest`. One thread looks; any may read `seconds`."""

    def __init__(self, longest: float) -> None:
        self.longest, self.seconds = longest, 0.0
        self.looked = time.monotonic()

    def look(self) -> float:
        """The seconds seen so far."""
        now = time.monotonic()
        self.seconds += min(now - self.looked, self.longest)
        self.looked = now
        return self.seconds
