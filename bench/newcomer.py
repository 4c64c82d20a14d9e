"""How long a newcomer waits: `make check`, `make test` and `make demo` on a fresh clone, the install in the first.

Takes twenty minutes. Name targets to time only those: `python bench/newcomer.py check`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.row import append

ROOT = Path(__file__).resolve().parents[1]
BOUNDS = {"check": 2.0, "test": 15.0, "demo": 15.0}
"""Minutes that each target may take."""


def main(targets: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
        for first, target in enumerate(targets):
            began = time.monotonic()
            subprocess.run(["make", target], cwd=folder, check=True, stdin=subprocess.DEVNULL)
            what = f"make {target}, " + ("installed before" if first else "install included")
            minutes = (time.monotonic() - began) / 60
            append("newcomer", what, minutes, "minutes", peer="bound", peer_figure=BOUNDS[target])


if __name__ == "__main__":
    main(sys.argv[1:] or list(BOUNDS))
