"""The command line, where each step of training says so and waits for a line: whoever comes late finds it there.

python -m tests.held train tiny ...
"""

from __future__ import annotations

import sys

import litchi.train.run as run
from litchi.cli import main

STEP = "a step is about to begin\n"


def take_step(*args, real=run.take_step):
    print(STEP, end="", flush=True)
    sys.stdin.readline()
    return real(*args)


if __name__ == "__main__":
    run.take_step = take_step
    sys.exit(main(sys.argv[1:]))
