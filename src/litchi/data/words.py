"""How things are called in English."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from litchi.envs.scene import Thing

NUMBERS = ("no", "one", "two", "three", "four")
PLURALS = {"ball": "balls", "key": "keys", "box": "boxes"}


def a(name: str) -> str:
    """A name with its article; no kind or colour here begins with a vowel."""
    return f"a {name}"


def the(thing: Thing) -> str:
    return f"the {thing.name}"


def place(row: int, column: int) -> str:
    return f"row {row}, column {column}"


def listing(names: Sequence[str]) -> str:
    """ "x", "x and y", "x, y and z"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def pick(rng: np.random.Generator, options: Sequence):
    """One of the options; unlike `rng.choice` it does not turn them into arrays."""
    return options[int(rng.integers(len(options)))]
