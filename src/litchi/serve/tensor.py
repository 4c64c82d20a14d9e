"""One network over several ranks: each has a slice of every matrix and the keys of its own heads (tensor parallelism).

The first rank has the engine. It tells the others what each step reads, as safetensors over their group, and they read
the same beside it; nothing is unpickled. Parts are summed in one order whatever the number of rows, so that answers are
exact; other numbers of ranks give other bits, and the runner's name says so.

T tokens, D width, V vocabulary, N rows.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed import ProcessGroup

from litchi.model import exact
from litchi.model.adapters import Adapter, Update
from litchi.model.layout import split_dim
from litchi.model.lowrank import Adapters
from litchi.model.network import Model
from litchi.parallel import tensor
from litchi.parallel.collectives import all_gather, tree_sum
from litchi.parallel.mesh import World
from litchi.schema.arrays import IGNORE
from litchi.schema.sequence import Batch, Modality, Vectors
from litchi.serve.device import DeviceReader
from litchi.serve.lanes import Laid
from litchi.serve.pages import Pages
from litchi.serve.placing import placed
from litchi.serve.runner import Piece, TorchRunner

log = logging.getLogger("litchi.serve")

STOP, READ, SCORE = 0, 1, 2
"""What the first rank asks of the others."""


class TensorRunner(TorchRunner):
    """The runner of the first rank, which has the model to itself.

    Raises BadInput, naming the size, for a network that does not divide. What `adapters` add is shared out as well.
    """

    def __init__(self, model: Model, dtype: torch.dtype, world: World, adapters: Sequence[Adapter] = ()) -> None:
        group = world.group("tensor")
        assert group is not None
        own = Slices(placed(model, world.device, dtype), adapters, group)
        reader = None if world.device.type == "cpu" else DeviceReader(model, dtype, own, exact=True, graphs=None)
        super().__init__(model, dtype, steady=True, adapters=own, reader=reader)
        self.group = group
        tensor.apply(model, world, product=exact.product, out=steady_sum)
        self.names = ["", *own.known]
        """Of adapters, which every rank has in this order."""
        self.kv_heads //= group.size()
        self.told += f" over {group.size()} ranks"

    def run(self, pieces: Sequence[Piece], pages: Pages) -> list[Tensor | None]:
        with one_fate():
            return super().run(pieces, pages)

    def read(self, batch: Batch, pieces: Sequence[Laid], pages: Pages) -> Tensor:
        self.tell(READ, step_of(batch, pieces, self.names))
        return super().read(batch, pieces, pages)

    @torch.no_grad()
    def logits(self, x_ND: Tensor) -> Tensor:
        with one_fate():
            self.tell(SCORE, {"x": x_ND.cpu().contiguous()})
            return self.scores(x_ND)

    def scores(self, x_ND: Tensor) -> Tensor:
        """Each rank scores its own words."""
        rows = x_ND if x_ND.dim() == 2 else x_ND[None]
        return (
            all_gather(self.weigh(rows.to(self.device)).T.contiguous(), self.group)
            .T.reshape(*x_ND.shape[:-1], -1)
            .cpu()
        )

    def tell(self, what: int, tensors: dict[str, Tensor]) -> None:
        body = torch.frombuffer(bytearray(save(tensors) if tensors else b" "), dtype=torch.uint8)
        dist.broadcast(torch.tensor([what, len(body)]), 0, group=self.group)
        dist.broadcast(body, 0, group=self.group)

    def dismiss(self) -> None:
        """Let the other ranks end."""
        self.tell(STOP, {})

    # ---- the other ranks ----

    @torch.no_grad()
    def follow(self, keys: Tensor, values: Tensor) -> None:
        """Read whatever the first rank reads, until it says that it is over."""
        pages = Pages(keys, values, clear=False)
        head = torch.zeros(2, dtype=torch.int64)
        while True:
            dist.broadcast(head, 0, group=self.group)
            what, length = head.tolist()
            body = torch.empty(length, dtype=torch.uint8)
            dist.broadcast(body, 0, group=self.group)
            if what == STOP:
                return
            told = load(body.numpy().tobytes())
            if what == SCORE:
                self.scores(told["x"])
                continue
            batch, seats = read_step(told, self.names)
            for seat in seats:  # a page that is written from its beginning is new: nobody's keys stand in it
                for at in range(-(-seat.start // pages.size) * pages.size, seat.stop, pages.size):
                    page = seat.pages[at // pages.size]
                    keys[:, page], values[:, page] = 0, 0
            with self.adapters.reading([(seat.adapter, seat.stop - seat.start) for seat in seats]):
                super().read(batch, seats, pages)


class Slices(Adapters):
    """What a rank needs of adapters beside its slices of the network."""

    def __init__(self, model: Model, adapters: Sequence[Adapter], group: ProcessGroup) -> None:
        super().__init__(model, [sliced(adapter, group) for adapter in adapters])
        self.group = group

    def narrow(self, module: str, x_TI: Tensor, update: Update) -> Tensor:
        x_TR = super().narrow(module, x_TI, update)
        return steady_sum(x_TR, self.group) if by_columns(module) else x_TR


def by_columns(module: str) -> bool:
    """Whether ranks share out what a projection reads, and not what it says."""
    return split_dim(f"{module}.weight", 2) == 1


def sliced(adapter: Adapter, group: ProcessGroup) -> Adapter:
    """A rank's part of each `down` or `up`, as `parallel.tensor` cuts the matrix; known by the digest of the whole."""
    size, index, updates = group.size(), group.rank(), {}
    for module, update in adapter.updates.items():
        if by_columns(module):
            updates[module] = Update(update.down.chunk(size, 1)[index].clone(), update.up)
        else:
            updates[module] = Update(update.down, update.up.chunk(size, 0)[index].clone())
    return replace(adapter, updates=updates)


@contextmanager
def one_fate() -> Iterator[None]:
    """A step that failed on one rank has left each somewhere else in it: the worker ends, and another is asked."""
    try:
        yield
    except Exception:
        log.exception("a step over several ranks failed, and the worker ends with it")
        os._exit(1)


def steady_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of all ranks' parts, in the order of `tree_sum`. oracle: dist.all_reduce"""
    return tree_sum(all_gather(x[None], group).unbind(0))


# ---- a step as tensors ---------------------------------------------------------------------------------------------


def step_of(batch: Batch, pieces: Sequence[Laid], adapters: Sequence[str]) -> dict[str, Tensor]:
    told = {name: getattr(batch, name).contiguous() for name in ("tokens", "positions", "spans", "docs", "cu_seqlens")}
    most = max(len(piece.pages) for piece in pieces)
    told["pages"] = torch.tensor([[*piece.pages, *[-1] * (most - len(piece.pages))] for piece in pieces])
    told["bounds"] = torch.tensor([[piece.start, piece.stop] for piece in pieces])
    told["ends"] = torch.tensor([end for piece in pieces for end in piece.ends])
    told["adapters"] = torch.tensor([adapters.index(piece.adapter) for piece in pieces])
    for modality, v in batch.vectors.items():
        told |= {f"{modality}.{f.name}": getattr(v, f.name).contiguous() for f in fields(Vectors)}
    return told


@dataclass(frozen=True, slots=True)
class Seat:
    """What a rank that has no document knows of a piece."""

    start: int
    stop: int
    pages: list[int]
    ends: list[int]
    adapter: str


def read_step(told: dict[str, Tensor], adapters: Sequence[str]) -> tuple[Batch, list[Seat]]:
    length = len(told["tokens"])
    vectors = {
        Modality(name.removesuffix(".index")): Vectors(
            *(told[name.removesuffix("index") + f.name] for f in fields(Vectors))
        )
        for name in sorted(told)
        if name.endswith(".index")
    }
    batch = Batch(
        tokens=told["tokens"],
        positions=told["positions"],
        spans=told["spans"],
        docs=told["docs"],
        cu_seqlens=told["cu_seqlens"],
        labels=torch.full((length,), IGNORE),
        weights=torch.zeros(length),
        readable=torch.ones(length, dtype=torch.bool),
        vectors=vectors,
    )
    seats, at = [], 0
    for (start, stop), pages, which in zip(*(told[of].tolist() for of in ("bounds", "pages", "adapters")), strict=True):
        ends = told["ends"][at : at + stop - start].tolist()
        seats.append(Seat(start, stop, [page for page in pages if page >= 0], ends, adapters[which]))
        at += stop - start
    return batch, seats
