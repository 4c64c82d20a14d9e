"""The floor of real simulators, which other packages provide: an optional extra.

It is looked for here and imported by the modules that need it: names of rooms are known without it.
"""

import os

from litchi.record import require

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # minigrid imports pygame, which greets on stdout
require("rooms", "minigrid", "gymnasium")
