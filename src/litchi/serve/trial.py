"""A stranger's grammar is compiled in a process of its own first, which may crash, swell or hang without us.

The verdict is remembered: the same schema comes again and again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from functools import lru_cache

from litchi.config import BadInput
from litchi.record import need
from litchi.schema.grammar import SIZES, STEPS, written
from litchi.schema.request import Grammar

SECONDS, CPU_SECONDS, BYTES = 20, 4, 4 << 30
COMMAND = ["-m", "litchi.serve.trial"]
MAX_AT_ONCE, WAIT = 2, 5
PLACES = threading.BoundedSemaphore(MAX_AT_ONCE)


@lru_cache(maxsize=256)
def check(grammar: Grammar) -> None:
    """Blocks for as long as that takes.

    Raises BadInput for a grammar that does not compile within the limits, Busy if others are waited for too long.
    """
    need("serve", "llguidance")
    if not PLACES.acquire(timeout=WAIT):
        from litchi.serve.worker import Busy  # here, so that the child starts without torch

        raise Busy(WAIT)
    try:
        command = [sys.executable, *COMMAND]
        told = json.dumps([grammar.kind, grammar.source])
        done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=SECONDS)
        fault = done.stdout.strip() if done.returncode == 0 else "it takes too much to compile"
    except subprocess.TimeoutExpired:
        fault = "it takes too long to compile"
    finally:
        PLACES.release()
    if fault:
        raise BadInput(f"the grammar of the answer does not work ({fault}); make it simpler")


def main() -> None:
    """Print what is wrong with the grammar on standard input, one line, or nothing."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    library = need("serve", "llguidance")
    try:
        text = written(Grammar(*json.load(sys.stdin)))
    except BadInput as error:
        print(error)
        return
    limits = library.LLParserLimits(**STEPS, **SIZES, verbose_errors=False)
    failed, told = library.LLMatcher.validate_grammar_with_warnings(text, None, limits=limits)
    if failed:
        lines = " ".join(told).splitlines()
        print(" ".join(line.strip() for line in lines if line.strip())[:300])


if __name__ == "__main__":
    main()
