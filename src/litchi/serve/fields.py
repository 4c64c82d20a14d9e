"""Reading a stranger's JSON object field by field, so that every refusal names the field, the fault and the mend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from litchi.config import BadInput

MAX_OBJECTS = 4096
"""Members of one list of objects."""


class Fields:
    """A JSON object at `where` (say `messages[0].`); a field that is absent or null takes its default."""

    def __init__(self, value: Any, where: str = ""):
        if not isinstance(value, dict):
            raise BadInput(f"{where.rstrip('.') or 'the body'} must be an object, got {show(value)}")
        self.value, self.where = value, where

    def known(self, names: Iterable[str]) -> None:
        """Refuse names that mean nothing here: a misspelt parameter must not be ignored silently."""
        names = set(names)
        for name in self.value:
            if name not in names:
                near = get_close_matches(name[:80], names, n=1)  # whose time grows with a stranger's name
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise BadInput(f"{self.where}{name[:80]}: no such parameter{hint}")

    def get(self, name: str) -> Any:
        return self.value.get(name)

    def text(self, name: str, default: str | None = None) -> str:
        value = self._given(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._given(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def integer(self, name: str, default: int | None, low: int, high: int) -> int:
        value = self._given(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(name, f"an integer from {low} to {high}", value)
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self._given(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, f"a number from {low:g} to {high:g}", value)
        if not low <= value <= high:  # NaN is in no range; integers of any length compare
            raise self._wrong(name, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def choice(self, name: str, default: str | None, among: tuple[str, ...]) -> str:
        value = self._given(name, default)
        if not isinstance(value, str) or value not in among:
            raise self._wrong(name, " or ".join(map(repr, among)), value)
        return value

    def inner(self, name: str) -> Fields:
        """An object, an empty one if it is absent."""
        value = self.value.get(name)
        return Fields({} if value is None else value, f"{self.where}{name}.")

    def neutral(self, known: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse fields that mean something elsewhere, but at the values that change nothing."""
        for name, values in known.items():
            value = self.value.get(name)
            # As JSON has it: true is not 1, though Python's equality says so.
            if value is not None and not any(type(value) is type(each) and value == each for each in values):
                raise BadInput(f"{self.where}{name} is not supported by this server; leave it out")

    def objects(self, name: str) -> list[Fields]:
        """A list of objects with at least one member."""
        value = self._given(name, None)
        if not isinstance(value, list) or not value:
            raise self._wrong(name, "a list of objects, at least one", value)
        if len(value) > MAX_OBJECTS:
            raise BadInput(f"{self.where}{name} has {len(value)} members, at most {MAX_OBJECTS} are read; send fewer")
        return [Fields(each, f"{self.where}{name}[{i}].") for i, each in enumerate(value)]

    def _given(self, name: str, default: Any) -> Any:
        value = self.value.get(name)
        if value is not None:
            return value
        if default is None:
            raise BadInput(f"{self.where}{name} is missing")
        return default

    def _wrong(self, name: str, wanted: str, value: Any) -> BadInput:
        return BadInput(f"{self.where}{name} must be {wanted}, got {show(value)}")


def show(value: Any) -> str:
    """A value as a message quotes it: short, whatever was sent."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    shown = repr(value) if not isinstance(value, int) or abs(value) < 10**18 else "a very large integer"
    return shown if len(shown) <= 60 else shown[:57] + "..."
