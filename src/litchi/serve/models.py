"""The models that requests may name: the network, and the network with one of its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from litchi.config import BadInput
from litchi.model.adapters import Adapter, read_adapter
from litchi.model.network import Model
from litchi.schema.request import Request

MAX_ADAPTERS, MAX_NAME = 256, 80


@dataclass(frozen=True, slots=True)
class Models:
    """Names; the base is the first."""

    base: str
    adapters: tuple[str, ...] = ()

    @classmethod
    def of(cls, base: str, settings: Sequence[str]) -> Models:
        return cls(base, tuple(folders(base, settings)))

    @property
    def names(self) -> tuple[str, ...]:
        return (self.base, *self.adapters)

    def adapter(self, name: str) -> str:
        """The adapter that a model is made with; empty for the base."""
        return "" if name == self.base else name

    def told(self, requests: Sequence[Request]) -> str:
        """The name by which a response calls what answered, which is one for all its requests."""
        return requests[0].adapter or self.base

    def __str__(self) -> str:
        few = ", ".join(map(repr, self.names[:8]))
        return few if len(self.names) <= 8 else f"{few} and {len(self.names) - 8} more"


def folders(base: str, settings: Sequence[str]) -> dict[str, Path]:
    """Where adapters lie, by name. Raises BadInput for a setting that is not NAME=FOLDER, or whose name is taken."""
    found: dict[str, Path] = {}
    for setting in settings:
        name, sign, folder = setting.partition("=")
        if not sign or not folder or not 0 < len(name) <= MAX_NAME or not name.isprintable() or "/" in name:
            raise BadInput(
                f"serve.adapters: {setting[:120]!r} is not NAME=FOLDER with a name of up to {MAX_NAME} characters and "
                "no slash: write poet=runs/poet"
            )
        if name == base or name in found:
            raise BadInput(f"serve.adapters: the name {name!r} is taken: give each adapter a name of its own")
        found[name] = Path(folder)
    if len(found) > MAX_ADAPTERS:
        raise BadInput(f"serve.adapters names {len(found)} adapters, at most {MAX_ADAPTERS} are loaded: serve fewer")
    return found


def read_adapters(model: Model, base: str, settings: Sequence[str]) -> list[Adapter]:
    """What `serve.adapters` names. Raises BadInput for a folder that does not fit the network."""
    return [read_adapter(folder, name, model) for name, folder in folders(base, settings).items()]
