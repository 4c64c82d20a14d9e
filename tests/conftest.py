"""What holds for all tests: the same examples of a law on every machine, however slow, and one thread a process."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small products spend more time on meeting their threads than they save

settings.register_profile(
    "certain", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("certain")
