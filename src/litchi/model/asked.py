"""A foreign configuration, read with its errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from litchi.config import BadInput

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A foreign configuration, read with its errors."""

    config: Json
    family: str

    def number(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadInput(f"{self.family}: config.json must give {key} as a number above 0, not {value!r}")
        return value

    def divided(self, width: int, heads: int) -> int:
        if width % heads:
            raise BadInput(f"{self.family}: a width of {width} does not divide into {heads} heads")
        return width // heads

    def only(self, key: str, default: Any, *can: Any) -> None:
        if (value := self.config.get(key, default)) not in can:
            raise BadInput(f"{self.family}: {key}={value!r} cannot be computed here; {can[0]!r} can")
