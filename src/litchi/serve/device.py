"""How a GPU computes a step: all pieces in few calls on shapes that return, small steps as graphs that play again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from litchi.model.lowrank import Adapters
from litchi.model.network import Model
from litchi.schema.sequence import Batch
from litchi.serve.graphs import Graphs
from litchi.serve.lanes import SMALL, Flash, Laid, Lanes, Slots, SplitFlash, flash_works, rounded
from litchi.serve.pages import Pages


class DeviceReader:
    """Computes the hidden states of a step over pages on the device where the network is."""

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype,
        adapters: Adapters,
        *,
        exact: bool,
        graphs: Callable[[Callable[[dict[str, Tensor]], Tensor]], Graphs] | None = Graphs,
    ) -> None:
        """`graphs` makes those that play small steps again; None has every step as it comes."""
        self.model, self.dtype, self.adapters, self.exact = model, dtype, adapters, exact
        self.device = model.embed_tokens.weight.device
        c = model.config
        # Experts are chosen by looking at tokens, for which the CPU would have to wait.
        steady = c.mixture is None and c.experts == 1
        self.make_graphs = graphs if steady else None
        self.graphs: Graphs | None = None
        self.form: type[Slots] = Lanes
        self.pages: Pages | None = None

    @property
    def name(self) -> str:
        """The device and the kernel of attention, which arithmetic depends on."""
        what = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{what} {self.form.__name__.lower()}"

    def room(self, shape: tuple[int, int, int, int, int]) -> tuple[Tensor, Tensor]:
        """Zeros (L, P, G, size, K), laid out as FlashAttention wants them if it is to be had."""
        num_layers, num_pages, groups, size, width = shape
        c, kept = self.model.config, []
        for _ in range(2):
            value = torch.zeros(num_layers, num_pages, size, groups, width, dtype=self.dtype, device=self.device)
            kept.append(value.transpose(2, 3))
        heads = groups * (c.num_heads // c.num_kv_heads)
        flash = Flash if self.exact else SplitFlash
        self.form = flash if not c.modalities and flash_works(kept[0][0], heads) else Lanes
        return kept[0], kept[1]

    def length(self, count: int) -> int:
        """Tokens of a step of so many, padding included."""
        return rounded(count, 8)

    def __call__(self, batch: Batch, pieces: Sequence[Laid], pages: Pages) -> Tensor:
        """Hidden states (T, D), on the device."""
        laid = self.form.lay(pieces, len(batch), pages.size)
        laid = {name: x.to(self.device, non_blocking=True) for name, x in laid.items()}
        if self.make_graphs is None or len(batch) > SMALL or batch.vectors or self.adapters.now:
            return self.compute(batch.to(self.device), self.form(pages, laid))
        if self.graphs is None or self.pages is not pages:  # a graph knows where they lie
            self.pages, self.graphs = pages, self.make_graphs(partial(self.replayable, pages))
        told = {"tokens": batch.tokens.to(self.device), "positions": batch.positions.to(self.device)}
        on_cuda = self.device.type == "cuda"
        with torch.cuda.device(self.device) if on_cuda else nullcontext():  # each thread has a device of its own
            return self.graphs.run(laid | told).clone()

    def replayable(self, pages: Pages, inputs: dict[str, Tensor]) -> Tensor:
        """A step of nothing but words, from tensors alone."""
        tokens = inputs["tokens"]
        nothing = torch.empty(0, device=self.device)
        batch = Batch(
            tokens=tokens,
            positions=inputs["positions"],
            labels=nothing,
            weights=nothing,
            spans=nothing,
            readable=nothing,
            docs=nothing,
            cu_seqlens=nothing,
            vectors={},
        )
        return self.compute(batch, self.form(pages, inputs))

    @torch.no_grad()
    def compute(self, batch: Batch, slots: Slots) -> Tensor:
        narrow = self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=narrow, cache_enabled=False):
            return self.model(batch, slots)
