"""A start does beside each other what need not wait: files are checked while torch is imported, the door while weights
are packed.

Nothing here needs torch: whoever imports this has not waited for it yet.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from litchi.model.seal import Check

TURN = 0.0001
"""Seconds that a thread keeps the interpreter while another waits: who only starts the next call of C++ has it soon."""


@contextmanager
def starting(folder: Path) -> Iterator[Check]:
    """Within it files of a checkpoint are being checked, and no garbage is collected, among what is made later neither.

    Looking for some takes a tenth of a start, and finds none: modules and weights stay.
    """
    collects, turn = gc.isenabled(), sys.getswitchinterval()
    gc.disable()
    sys.setswitchinterval(TURN)
    check = Check(folder)
    try:
        yield check
        gc.freeze()
    finally:
        check.leave()
        sys.setswitchinterval(turn)
        if collects:
            gc.enable()


def import_door() -> None:
    """In a thread of its own. What is missing is told when it is needed."""
    threading.Thread(target=import_all, name="litchi-imports").start()


def import_all() -> None:
    with suppress(ImportError):
        import pydantic.v1  # noqa: F401 (FastAPI asks for it at its first route)
        import uvicorn  # noqa: F401

        from litchi.serve import http, patience  # noqa: F401
