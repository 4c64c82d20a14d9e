"""Train again and again, each time killed at another touch of a file, until one attempt comes through.

    python -m tests.train.kills FOLDER SEED NUM_KILLS

What is on disk changes only where a file is touched, so that a kill before each touch is a kill at any moment. Each
attempt is a fork, which spares it the imports; `done` is printed when the run is whole.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import torch._dynamo  # noqa: F401  optimizers import it; here it is paid once

import tests.train.runs as runs


def main(folder: Path, seed: int, num_kills: int) -> None:
    draw = random.Random(seed)
    for _ in range(num_kills):
        if attempt(folder, draw.randrange(1, 120)) == 0:
            break
    else:
        assert attempt(folder, 0) == 0
    print("done")


def attempt(folder: Path, fatal: int) -> int:
    """The exit code of one process that is killed at its `fatal`-th touch of a file in `folder`; 0 is never."""
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), f"an attempt ended with {code}"
        print("killed" if code else "through", flush=True)
        return code
    code = 1
    try:
        sys.addaudithook(Reaper(folder, fatal))
        runs.train(folder)
        code = 0
    finally:
        os._exit(code)


class Reaper:
    def __init__(self, folder: Path, left: int) -> None:
        self.prefix, self.left = str(folder), left

    def __call__(self, event: str, args: tuple) -> None:
        if event.startswith(("open", "os.", "shutil.")) and any(str(a).startswith(self.prefix) for a in args):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
