"""Attention over pages for a GPU, which likes few calls on tensors whose shapes return: all pieces of a step at once.

Queries lie in lanes of `WIDTH`, each of which looks at the pages of one document; what a query may not see is masked.
Where no token reads ahead of itself (a network of words only) FlashAttention walks the pages instead. A step's shapes
are rounded up, so that a graph that was captured for them serves many steps.

T tokens, N lanes, W queries of a lane, S pages of the longest document, M keys on them, B pieces, H query heads, G
key-value heads, R query heads to a key-value head, K head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from litchi.serve.pages import Pages

WIDTH = 16
"""Queries of a lane: as many as a tensor core takes at least."""
SMALL = 64
"""Tokens up to which a step's number is rounded up to a power of two, above to a multiple of this."""


class Laid(Protocol):
    """As much of a piece as reading it takes."""

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...

    @property
    def pages(self) -> Sequence[int]: ...

    @property
    def ends(self) -> list[int]: ...

    @property
    def adapter(self) -> str: ...


def rounded(count: int, least: int = 1) -> int:
    """The next power of two, and above `SMALL` the next multiple of it."""
    if count > SMALL:
        return -(-count // SMALL) * SMALL
    return max(least, 1 << (count - 1).bit_length())


def places_of(pieces: Sequence[Laid], length: int, size: int) -> dict[str, Tensor]:
    """Where the keys of `length` tokens go: page and offset, and whether there is a token at all."""
    places = [(piece.pages[at // size], at % size, 1) for piece in pieces for at in range(piece.start, piece.stop)]
    page_T, offset_T, live_T = torch.tensor(places + [(0, 0, 0)] * (length - len(places))).unbind(1)
    return {"page_T": page_T, "offset_T": offset_T, "live_T": live_T.bool()}


class Slots:
    """What the layers take for a cache: keys go to the pages of their documents. Page 0 stays zeros."""

    def __init__(self, pages: Pages, laid: dict[str, Tensor]) -> None:
        self.pages, self.laid = pages, laid
        self.nobody = ~laid["live_T"][:, None, None]

    def extend(self, layer: int, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.pages.keys[layer], self.pages.values[layer]
        page, offset = self.laid["page_T"], self.laid["offset_T"]
        for kept, fresh in ((keys, k_TGK), (values, v_TGK)):
            kept[page, :, offset] = fresh.to(kept.dtype).masked_fill(self.nobody, 0)
        return keys, values

    def attend(self, q_THK: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        raise NotImplementedError


class Lanes(Slots):
    """Any rule of who reads whom: each query has its own number of keys."""

    @staticmethod
    def lay(pieces: Sequence[Laid], length: int, size: int) -> dict[str, Tensor]:
        """The step as tensors; equal shapes for steps of about the same size."""
        lanes: list[list[int]] = []
        stops: list[list[int]] = []
        tables: list[Sequence[int]] = []
        back, at = [0] * length, 0
        for piece in pieces:
            count, ends = piece.stop - piece.start, piece.ends
            for first in range(0, count, WIDTH):
                last = min(first + WIDTH, count)
                back[at + first : at + last] = range(len(lanes) * WIDTH, len(lanes) * WIDTH + last - first)
                lanes.append([*range(at + first, at + last), *[0] * (WIDTH - last + first)])
                stops.append([*ends[first:last], *[1] * (WIDTH - last + first)])
                tables.append(piece.pages[: -(-max(stops[-1]) // size)])
            at += count
        missing = rounded(len(lanes)) - len(lanes)
        most = rounded(max(len(table) for table in tables))
        return places_of(pieces, length, size) | {
            "query_NW": torch.tensor(lanes + [[0] * WIDTH] * missing),
            "stop_NW": torch.tensor(stops + [[1] * WIDTH] * missing),
            "table_NS": torch.tensor([[*t, *[0] * (most - len(t))] for t in [*tables, *[[]] * missing]]),
            "lane_T": torch.tensor(back),
        }

    def __init__(self, pages: Pages, laid: dict[str, Tensor]) -> None:
        super().__init__(pages, laid)
        keys = torch.arange(laid["table_NS"].shape[1] * pages.size, device=laid["table_NS"].device)
        self.seen_NWM = keys < laid["stop_NW"][..., None]

    def attend(self, q_THK: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """oracle: attend_dense"""
        lanes, table, groups = self.laid["query_NW"], self.laid["table_NS"], keys.shape[1]
        repeat = q_THK.shape[1] // groups
        # Heads that share keys are more queries to them: then every kernel knows how.
        q_NGQK = q_THK.to(keys.dtype)[lanes].unflatten(2, (groups, repeat)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        k_NGMK, v_NGMK = (x[table].transpose(1, 2).flatten(2, 3) for x in (keys, values))
        seen = self.seen_NWM.repeat(1, repeat, 1)[:, None]
        o_NGQK = F.scaled_dot_product_attention(q_NGQK, k_NGMK, v_NGMK, attn_mask=seen)
        o_NWHK = o_NGQK.unflatten(2, (repeat, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        return o_NWHK.flatten(0, 1)[self.laid["lane_T"]]


class Flash(Slots):
    """Each token reads itself and what stands before it, by FlashAttention (Dao 2023) over pages."""

    splits: int | None = 1
    """Into how many parts keys are cut for the sake of speed: one, so that sums do not depend on neighbours."""

    @staticmethod
    def lay(pieces: Sequence[Laid], length: int, size: int) -> dict[str, Tensor]:
        num = rounded(len(pieces))
        counts = [piece.stop - piece.start for piece in pieces]
        starts = torch.tensor([0, *counts, *[0] * (num - len(pieces))]).cumsum(0)
        most = rounded(max(-(-piece.stop // size) for piece in pieces))
        tables = [[*piece.pages[:most], *[0] * (most - len(piece.pages))] for piece in pieces]
        return places_of(pieces, length, size) | {
            "start_B1": starts.int(),
            "used_B": torch.tensor([*(piece.stop for piece in pieces), *[1] * (num - len(pieces))]).int(),
            "table_BS": torch.tensor(tables + [[0] * most] * (num - len(pieces))).int(),
            "most": torch.empty(
                rounded(max(counts)), 0
            ),  # a number that is known without asking the device: its length
        }

    def attend(self, q_THK: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """oracle: attend_dense"""
        from torch.nn.attention.varlen import varlen_attn

        table = self.laid["table_BS"]
        found = varlen_attn(
            q_THK.to(keys.dtype),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            self.laid["start_B1"],
            None,
            len(self.laid["most"]),
            table.shape[1] * self.pages.size,
            window_size=(-1, 0),
            enable_gqa=True,
            seqused_k=self.laid["used_B"],
            block_table=table,
            num_splits=self.splits,
        )
        assert isinstance(found, Tensor)
        return found


class SplitFlash(Flash):
    """The same with keys in as many parts as is fast, which depends on neighbours."""

    splits = None


def flash_works(keys: Tensor, heads: int) -> bool:
    """Whether this PyTorch and this device have FlashAttention for pages like `keys` (P, G, size, K): it is tried."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    if "block_table" not in inspect.signature(varlen_attn).parameters or keys.dtype != torch.bfloat16:
        return False
    _, groups, size, width = keys.shape
    few = torch.zeros(2, size, groups, width, dtype=keys.dtype, device=keys.device).transpose(1, 2)
    laid = {
        "live_T": torch.ones(1, dtype=torch.bool, device=keys.device),
        "start_B1": torch.tensor([0, 1], dtype=torch.int32, device=keys.device),
        "used_B": torch.ones(1, dtype=torch.int32, device=keys.device),
        "table_BS": torch.zeros(1, 1, dtype=torch.int32, device=keys.device),
        "most": torch.empty(1, 0),
    }
    try:
        found = Flash(Pages(few[None], few[None]), laid).attend(few.new_zeros(1, heads, width), few, few)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return bool(found.isfinite().all())
