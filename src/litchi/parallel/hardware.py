"""What a machine can do: seconds of products, of passes over memory and of collectives, measured or published.

A machine that was measured is a JSON file that `litchi bench hardware` writes. Published figures are sales figures:
they are lowered by shares that are stated here, and a plan made of them says so.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from litchi.config import BadInput, from_json, to_json
from litchi.parallel.meter import Op

Point = tuple[float, float]
"""A size and what it took in seconds, beyond what the smallest size took."""


@dataclass(frozen=True, slots=True)
class Product:
    """Matrix products of one size: rows, columns, depth, and floating-point operations a second."""

    dtype: str
    rows: int
    columns: int
    depth: int
    rate: float


@dataclass(frozen=True, slots=True)
class Rates:
    """What one rank can compute while so many ranks of its machine are at work."""

    busy: int
    products: tuple[Product, ...]
    plain: tuple[Point, ...]
    """Bytes read and written, seconds: sums, copies, casts."""
    smooth: tuple[Point, ...]
    """The same of exponentials and their like."""
    attention: tuple[tuple[float, float, float], ...]
    """Length of a row, operations a second forwards, and backwards."""
    overhead: float
    """Seconds of one operation that does nearly nothing, with what Python and autograd do around it."""
    unit: float = 0.0
    """Seconds that FSDP2 takes to gather and reduce a layer of nearly nothing, in one step."""
    adamw: float = 0.0
    """Seconds of a weight's step."""
    norm: float = 0.0
    """Seconds of a gradient's part in the norm."""
    average: float = 0.0
    """Seconds of a weight's averaging."""


@dataclass(frozen=True, slots=True)
class Link:
    """A collective among so many ranks while `busy` are at work: `alpha` seconds, and a byte takes 1/`beta`."""

    name: str
    ranks: int
    busy: int
    alpha: float
    beta: float


@dataclass(frozen=True, slots=True)
class Machine:
    """One node. `source` says where figures are from."""

    name: str
    kind: Literal["measured", "published"]
    source: str
    device: Literal["cpu", "cuda"]
    ranks: int
    """GPUs of a node, or the most ranks that were measured."""
    memory: float
    """Bytes of one GPU, or of the whole node where ranks share it."""
    rates: tuple[Rates, ...]
    links: tuple[Link, ...] = ()
    nvlink: float = 0.0
    """Bytes a second out of a GPU to others of its node."""
    network: float = 0.0
    """Bytes a second out of a GPU to other nodes."""
    latency: float = 0.0
    """Seconds of each doubling of the ranks of a collective."""
    overlaps: bool = False
    """Whether what is exchanged travels beside work that does not wait for it."""
    price: float = 0.0
    """Of one rank for an hour, in dollars."""
    shares: dict[str, float] = field(default_factory=dict)
    """What was assumed of published figures."""

    # ---- work

    def seconds(self, op: Op, busy: float) -> float:
        """Of one operation while `busy` ranks are at work; between measured numbers it is interpolated."""
        return between([(r.busy, price(r, op)) for r in self.rates], busy)

    def rate(self, name: str, busy: float) -> float:
        """A field of `Rates`."""
        return between([(r.busy, getattr(r, name)) for r in self.rates], busy)

    # ---- exchange

    def collective(self, name: str, num_bytes: float, group: Group, busy: float) -> float:
        """Seconds. `num_bytes` are those of the larger of what goes in and what comes out, on one rank."""
        if group.ranks == 1:
            return 0.0
        if self.kind == "published":
            return self.foretell(name, num_bytes, group)
        links = [link for link in self.links if link.name == name] or [x for x in self.links if x.name == "all_reduce"]
        nearest = min(abs(math.log(link.ranks / group.ranks)) for link in links)
        near = [x for x in links if abs(math.log(x.ranks / group.ranks)) == nearest]
        return between([(x.busy, x.alpha + num_bytes / x.beta) for x in near], busy)

    def foretell(self, name: str, num_bytes: float, group: Group) -> float:
        """From bandwidths: NVLink inside a node, and between nodes as many cards as the group has GPUs in one."""
        n, inside = group.ranks, min(group.ranks, group.inside)
        nodes = n / inside
        times = 2 if name == "all_reduce" else 1
        if name == "send":
            return self.latency + num_bytes / (self.nvlink if group.extent <= self.ranks else self.network)
        if name == "all_to_all":
            near, far = num_bytes * (inside - 1) / n, num_bytes * (n - inside) / n
            return self.latency * math.log2(n) + max(near / self.nvlink, far / self.network)
        near, far = num_bytes * (1 - 1 / inside) if inside > 1 else 0.0, num_bytes * (1 - 1 / nodes)
        return times * (self.latency * math.log2(n) + max(near / self.nvlink, far / (self.network * inside)))


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks of a collective: how many, and over how many neighbouring ranks of the world they stretch."""

    ranks: int
    extent: int
    inside: int
    """How many of them a node has."""


# ---- prices -------------------------------------------------------------------------------------------------------


def price(rates: Rates, op: Op) -> float:
    match op.kind:
        case "view":
            return rates.overhead / 2
        case "product":
            return rates.overhead + op.flops / product_rate(rates.products, op.dtype, op.shape)
        case "attention":
            way = 2 if "backward" in op.name else 1
            return rates.overhead + op.flops / rates.attention[0][way]
        case "smooth":
            return rates.overhead + beyond(rates.smooth, op.num_bytes)
        case "plain":
            return rates.overhead + beyond(rates.plain, op.num_bytes)
    return 0.0


def product_rate(products: Sequence[Product], dtype: str, shape: tuple[int, ...]) -> float:
    """Interpolated in the logarithms of the sizes, by nearness."""
    known = [p for p in products if p.dtype == dtype] or list(products)
    total = weight = 0.0
    for p in known:
        gaps = (math.log2(max(1, a) / b) for a, b in zip(shape, (p.rows, p.columns, p.depth), strict=True))
        near = 1 / (0.01 + sum(gap * gap for gap in gaps)) ** 1.5
        total, weight = total + near * math.log(p.rate), weight + near
    return math.exp(total / weight)


def beyond(points: Sequence[Point], size: float) -> float:
    """Seconds of a size: linear between those that were measured, and in proportion beyond them."""
    sizes = [p[0] for p in points]
    place = bisect_left(sizes, size)
    if place == 0:
        return points[0][1] * size / max(1.0, sizes[0])
    if place == len(points):
        return points[-1][1] * size / sizes[-1]
    (a, x), (b, y) = points[place - 1], points[place]
    return x + (y - x) * (size - a) / (b - a)


def between(points: Sequence[Point], at: float) -> float:
    points = sorted(points)
    if at <= points[0][0]:
        return points[0][1]
    for (a, x), (b, y) in zip(points, points[1:], strict=False):
        if at <= b:
            return x + (y - x) * (at - a) / (b - a)
    return points[-1][1]


# ---- published ----------------------------------------------------------------------------------------------------

SHARES = {"products": 0.70, "memory": 0.85, "links": 0.80}
"""Of published peaks, what large products, passes over memory and collectives reach here. An assumption."""

PRICE = 2.5
"""Dollars of a GPU hour where none is given; asked prices of 2026 lie between 2 and 4."""

PUBLISHED = {
    # name: dense bf16, dense tf32 operations a second; bytes; bytes a second of memory, NVLink one way, network
    "h100": (989e12, 495e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": (989e12, 495e12, 141e9, 4.8e12, 450e9, 50e9),
    "a100": (312e12, 156e12, 80e9, 2.04e12, 300e9, 25e9),
}
SOURCES = {
    "h100": "NVIDIA H100 SXM datasheet; DGX H100: eight 400 Gb/s cards",
    "h200": "NVIDIA H200 SXM datasheet; DGX H200: eight 400 Gb/s cards",
    "a100": "NVIDIA A100 80GB SXM datasheet; DGX A100: eight 200 Gb/s cards",
}


def published(name: str, ranks: int = 8, price: float = PRICE) -> Machine:
    """A GPU by its name. Raises BadInput for one that is not known."""
    if name not in PUBLISHED:
        known = ", ".join(PUBLISHED)
        raise BadInput(f"no figures of {name!r}: name one of {known}, or measure it there by `litchi bench hardware`")
    bf16, tf32, memory, bandwidth, nvlink, network = PUBLISHED[name]
    pass_ = SHARES["memory"] * bandwidth
    products = tuple(
        Product(dtype, n, n, n, SHARES["products"] * peak * n / (n + 400))
        for dtype, peak in (("bfloat16", bf16), ("float32", tf32))
        for n in (128, 512, 2048, 8192)
    )
    steps = tuple((size, size / pass_) for size in (1e3, 1e9))
    flash = 0.55 * bf16
    rates = Rates(
        1, products, steps, steps, ((1024, flash, 0.75 * flash),), 2e-6, 0.0, 28 / pass_, 4 / pass_, 12 / pass_
    )
    shares = SHARES | {"attention": 0.55, "launch": 2e-6}
    link = SHARES["links"]
    return Machine(
        name,
        "published",
        SOURCES[name],
        "cuda",
        ranks,
        memory,
        (rates,),
        nvlink=link * nvlink,
        network=link * network,
        latency=5e-6,
        overlaps=True,
        price=price,
        shares=shares,
    )


def load(path: Path) -> Machine:
    """A machine that was measured. Raises BadInput if the file is none."""
    if not path.is_file():
        raise BadInput(f"{path} is missing: measure this machine by `litchi bench hardware`")
    return from_json(Machine, path.read_text(encoding="utf-8"))


def save(machine: Machine, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(machine), encoding="utf-8")
