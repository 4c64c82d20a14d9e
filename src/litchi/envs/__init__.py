"""The floor of real simulators, which other packages provide: an optional extra."""

import os

from litchi.record import need

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # minigrid imports pygame, which greets on stdout
need("rooms", "minigrid")
