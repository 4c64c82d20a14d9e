"""Laws are tried on the same examples by every run and every machine, however slow it is at that moment."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "certain", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("certain")
