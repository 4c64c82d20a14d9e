"""A network that reads with adapters: each row of a batch with its own, beside rows that read with none.

    adapters = Adapters(model, [poet, lawyer])
    with adapters.reading([("poet", 5), ("", 3), ("lawyer", 1)]):  # rows of the batch, one text after another
        x_TD = model(batch)

A projection of a row is W x + up (down x), two products more by `model.product`, so that the rules of `exact` hold for
them as well; a row without an adapter is not touched.

T tokens, I inputs and O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from litchi.config import BadInput, nearest
from litchi.model.adapters import Adapter, Update
from litchi.model.network import Model

Rows = Tensor | slice


class Adapters:
    """What a network may read with. Not for two threads at once: it knows who reads now."""

    def __init__(self, model: Model, adapters: Sequence[Adapter] = ()) -> None:
        """Puts hooks on the projections that some adapter changes; they do nothing but within `reading`."""
        self.model, self.device = model, model.embed_tokens.weight.device
        self.known = {adapter.name: self.placed(adapter) for adapter in adapters}
        self.now: list[tuple[Adapter, Rows]] = []
        for module in sorted({module for adapter in adapters for module in adapter.updates}):
            model.get_submodule(module).register_forward_hook(partial(self.add, module))

    @property
    def digests(self) -> dict[str, str]:
        return {name: adapter.digest for name, adapter in self.known.items()}

    def check(self, name: str) -> None:
        """Raises BadInput for an adapter that is not here."""
        if name and name not in self.known:
            raise BadInput(f"no adapter {name[:80]!r} here{nearest(name[:80], self.known)}; load it by serve.adapters")

    def key(self, name: str) -> str:
        """What tells the keys and values of one adapter from those of others; empty for none."""
        return f"\0{name}\0{self.known[name].digest}" if name else ""

    @contextmanager
    def reading(self, texts: Sequence[tuple[str, int]]) -> Iterator[None]:
        """For each text of a batch the name of its adapter, or "", and how many rows it has."""
        rows: dict[str, list[Tensor]] = {}
        at = 0
        for name, count in texts:
            if name:
                rows.setdefault(name, []).append(torch.arange(at, at + count, device=self.device))
            at += count
        with self.using([(self.known[name], torch.cat(each)) for name, each in rows.items()]):
            yield

    @contextmanager
    def whole(self, name: str) -> Iterator[None]:
        """All rows with one adapter, or with none."""
        self.check(name)
        with self.using([(self.known[name], slice(None))] if name else []):
            yield

    @contextmanager
    def using(self, now: list[tuple[Adapter, Rows]]) -> Iterator[None]:
        before, self.now = self.now, now
        try:
            yield
        finally:
            self.now = before

    def add(self, module: str, _: nn.Module, inputs: tuple[Tensor], y_TO: Tensor) -> None:
        """To what a projection said, in place."""
        for adapter, rows in self.now:
            if (update := adapter.updates.get(module)) is not None:
                narrow = self.narrow(module, inputs[0][rows], update)
                y_TO[rows] = y_TO[rows] + self.model.product(narrow, update.up)

    def narrow(self, module: str, x_TI: Tensor, update: Update) -> Tensor:
        """What `down` makes of what a projection reads."""
        return self.model.product(x_TI, update.down)

    def placed(self, adapter: Adapter) -> Adapter:
        updates = {n: Update(u.down.to(self.device), u.up.to(self.device)) for n, u in adapter.updates.items()}
        return replace(adapter, updates=updates)
