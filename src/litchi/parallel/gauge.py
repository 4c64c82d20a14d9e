"""Measures a machine by a crew of its own ranks, all at work at once: that is how a step will find it.

Every figure is the least of a few tries on one rank, and the mean over ranks.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, product

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from litchi.model.network import ModelConfig
from litchi.parallel.anatomy import Workload, dissect, text_batch
from litchi.parallel.collectives import all_gather, all_reduce, reduce_scatter
from litchi.parallel.context import swap
from litchi.parallel.crew import Crew
from litchi.parallel.gradient import backward
from litchi.parallel.hardware import Link, Machine, Point, Product, Rates
from litchi.parallel.mesh import Layout, join
from litchi.parallel.plan import Placed, build, initialise
from litchi.record import table

TRY_SECONDS = 0.01
TRIES = 3
SIDES = (128, 512, 2048)
MOST = 1 << 30
"""Multiplications of the largest product that is tried."""
PASSES = (3e4, 3e5, 3e6, 3e7, 1.2e8)
"""Bytes that are read and written."""
COLD = 4e7
"""Bytes of all that is read in turn: more than caches hold."""
MESSAGES = (1 << 12, 1 << 18, 1 << 21, 1 << 24)
TINY = ModelConfig(vocab_size=64, width=16, num_layers=4, num_heads=2, num_kv_heads=2, head_width=8, mlp_width=32)
"""A network so small that what it takes is what operations take that do nothing."""


def gauge(crew: Crew, sizes: Sequence[int] = (1, 2, 4)) -> Machine:
    """This machine, with so many ranks at work."""
    ops = tiny_ops()
    rates = []
    for size in sizes:
        found = crew.run(rank_rates, ops, size=size)
        rates.append(mean(found))
    links = [link for size in sizes if size > 1 for link in crew.run(rank_links, size=size)[0]]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    source = f"measured on {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {crew.threads} a rank"
    return Machine("cpu", "measured", source, "cpu", max(sizes), float(memory), tuple(rates), tuple(links))


def tiny_ops() -> float:
    """Operations of one microbatch of the tiny network, a view counted as half of one."""
    anatomy = dissect(tiny_workload(), Layout(data=1))
    count = 0.0
    for part, times in ((anatomy.start, 1), (anatomy.layer, TINY.num_layers), (anatomy.end, 1)):
        for op in (*part.forward, *part.backward):
            count += times * (0.5 if op.kind == "view" else 1.0)
    return count


def tiny_workload() -> Workload:
    return Workload(TINY, 1, 16, 1, dtype="bfloat16")


def show(machine: Machine) -> None:
    """Print the gist of a measured machine."""
    rows = []
    for r in machine.rates:
        best = {d: max(p.rate for p in r.products if p.dtype == d) / 1e9 for d in ("float32", "bfloat16")}
        size, seconds = r.plain[-1]
        speed = f"{size / seconds / 1e9:.1f}"
        rows.append((r.busy, f"{best['float32']:.0f}", f"{best['bfloat16']:.0f}", speed, f"{r.overhead * 1e6:.1f}"))
    columns = ("ranks at work", "fp32 Gflop/s", "bf16 Gflop/s", "memory GB/s", "us an operation")
    table(f"{machine.source}; each rank", columns, rows)
    links = [(x.name, x.ranks, x.busy, f"{x.alpha * 1e6:.0f}", f"{x.beta / 1e9:.2f}") for x in machine.links]
    table("collectives", ("", "ranks", "at work", "alpha us", "beta GB/s"), links)


# ---- work ---------------------------------------------------------------------------------------------------------


def rank_rates(ops: float) -> Rates:
    """What this rank can compute while the others do the same."""
    world = join(Layout(), torch.device("cpu"))
    overhead = tiny_step(Layout(zero=0)) / ops
    unit = 0.0
    if world.size > 1:
        unit = max(0.0, (tiny_step(Layout()) - overhead * ops) / (TINY.num_layers + 1))
    adamw, norm, average = steps()
    return Rates(
        busy=world.size,
        products=tuple(products()),
        plain=passes(lambda x, y: x * y, 3),
        smooth=passes(lambda x, _: F.silu(x), 2),
        attention=(attend(4, 128),),
        overhead=overhead,
        unit=unit,
        adamw=adamw,
        norm=norm,
        average=average,
    )


def tiny_step(layout: Layout) -> float:
    """Seconds of a microbatch of the tiny network, forwards and backwards."""
    w = tiny_workload()
    world = join(replace(layout, exact=False), torch.device("cpu"))
    placed: Placed = build(w.model, world)
    initialise(placed, 0)
    batch = text_batch(w.rows, w.row)
    return least(lambda: backward(placed, [(batch, batch)], {"text": 1.0}, {}, torch.bfloat16))


def products() -> list[Product]:
    """The three products of a linear layer, taken together, for each size and type."""
    found = []
    for dtype, rows, columns, depth in product((torch.float32, torch.bfloat16), SIDES, SIDES, SIDES):
        if rows * columns * depth > MOST:
            continue
        count = max(1, int(COLD / 8 / (rows * depth + columns * depth)))
        a, b = (torch.randn(count, side, depth).to(dtype) for side in (rows, columns))
        pairs = cycle(list(zip(a, b, strict=True)))
        turned = cycle([(x.view(depth, rows), y.view(depth, columns)) for x, y in zip(a, b, strict=True)])
        seconds = (
            least(lambda pairs=pairs: next(pairs)[0] @ next(pairs)[1].T)
            + least(lambda pairs=pairs, turned=turned: next(pairs)[0] @ next(turned)[1])
            + least(lambda turned=turned: next(turned)[0].T @ next(turned)[1])
        ) / 3
        name = str(dtype).removeprefix("torch.")
        found.append(Product(name, rows, columns, depth, 2.0 * rows * columns * depth / seconds))
    return found


def passes(act: Callable[[Tensor, Tensor], object], touched: int) -> tuple[Point, ...]:
    """Seconds by bytes, beyond those of an operation on one value; what is read was last touched long ago."""
    one = torch.ones(1)
    nothing = least(lambda: act(one, one))
    points = []
    for size in PASSES:
        many = torch.rand(max(2, int(COLD / size * touched)), int(size / touched / 4))
        pairs = cycle(list(zip(many, many.roll(1, 0), strict=True)))
        points.append((size, max(1e-9, least(lambda pairs=pairs: act(*next(pairs))) - nothing)))
    return tuple(points)


def attend(rows: int, row: int, heads: int = 4, width: int = 64) -> tuple[float, float, float]:
    q, k, v = (torch.randn(rows, heads, row, width, requires_grad=True) for _ in range(3))
    mask = torch.zeros(rows, 1, row, row).masked_fill_(torch.ones(row, row).triu(1).bool(), float("-inf"))
    flops = 4.0 * rows * heads * row * row * width
    forwards = least(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    gradient = torch.ones_like(out)
    back = least(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True))
    return float(row), flops / forwards, 2.5 * flops / back


def steps(count: int = 1 << 20) -> tuple[float, float, float]:
    """Seconds of a weight: AdamW's step, its part of the norm, its averaging."""
    p = torch.nn.Parameter(torch.randn(8, count // 8))
    p.grad = torch.randn_like(p)
    adamw = torch.optim.AdamW([p], lr=1e-6, foreach=True)
    held = torch.randn_like(p)

    def norm() -> Tensor:
        return p.grad.double().square().flatten(1).sum(1)

    took = [least(adamw.step), least(norm), least(lambda: torch._foreach_lerp_([held], [p.detach()], 0.1))]
    return took[0] / count, took[1] / count, took[2] / count


def least(act: Callable[[], object]) -> float:
    """Seconds of one call: the least of a few tries, each of them many calls."""
    act()
    began = time.perf_counter()
    act()
    count = max(1, int(TRY_SECONDS / max(1e-9, time.perf_counter() - began)))
    tries = []
    for _ in range(TRIES):
        began = time.perf_counter()
        for _ in range(count):
            act()
        tries.append((time.perf_counter() - began) / count)
    return sorted(tries)[TRIES // 2]


def mean(found: Sequence[Rates]) -> Rates:
    """One for all ranks."""
    first = found[0]

    def over(name: str) -> float:
        return sum(getattr(r, name) for r in found) / len(found)

    def points(name: str) -> tuple[Point, ...]:
        return tuple(
            (p[0], sum(getattr(r, name)[i][1] for r in found) / len(found)) for i, p in enumerate(getattr(first, name))
        )

    rates = [sum(r.products[i].rate for r in found) / len(found) for i in range(len(first.products))]
    forwards, backwards = (sum(r.attention[0][way] for r in found) / len(found) for way in (1, 2))
    return Rates(
        busy=first.busy,
        products=tuple(replace(p, rate=rate) for p, rate in zip(first.products, rates, strict=True)),
        plain=points("plain"),
        smooth=points("smooth"),
        attention=((first.attention[0][0], forwards, backwards),),
        overhead=over("overhead"),
        unit=over("unit"),
        adamw=over("adamw"),
        norm=over("norm"),
        average=over("average"),
    )


# ---- exchange -----------------------------------------------------------------------------------------------------


def rank_links() -> list[Link]:
    """Alpha and beta of each collective among all ranks, and in groups of two of them at once."""
    world = join(Layout(tensor=2), torch.device("cpu"))
    size = world.size
    links = []
    for ranks, group in ((size, world.everyone()), (2, world.group("tensor"))):
        if group is None or (ranks == 2 and size == 2 and links):
            continue
        for name, act in ACTS.items():
            times = [(float(n), settled(act, torch.ones(n // 4), group)) for n in MESSAGES]
            links.append(Link(name, ranks, size, *fit(times)))
    return links


def send(x: Tensor, group: dist.ProcessGroup) -> None:
    """To a neighbour and from it: first one way, then the other."""
    rank = dist.get_rank(group)
    if rank > 1:
        return
    if rank == 0:
        dist.send(x, group=group, group_dst=1)
        dist.recv(x, group=group, group_src=1)
    else:
        dist.recv(x, group=group, group_src=0)
        dist.send(x, group=group, group_dst=0)


ACTS: dict[str, Callable[[Tensor, dist.ProcessGroup], object]] = {
    "all_gather": lambda x, group: all_gather(x[: len(x) // group.size()], group),
    "reduce_scatter": reduce_scatter,
    "all_reduce": all_reduce,
    "all_to_all": swap,
    "send": send,
}
"""What each does with a tensor whose bytes are the larger of what goes in and comes out."""


def settled(act: Callable, x: Tensor, group: dist.ProcessGroup) -> float:
    """Seconds of a collective once it is warm, the same number of calls on every rank."""
    count = 3 if x.numel() > 1 << 20 else 10
    act(x, group)
    tries = []
    for _ in range(TRIES):
        dist.barrier()
        began = time.perf_counter()
        for _ in range(count):
            act(x, group)
        tries.append((time.perf_counter() - began) / count)
    took = sorted(tries)[TRIES // 2]
    return took / 2 if act is send else took


def fit(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Alpha and beta whose relative errors are least in squares."""
    rows = torch.tensor([[1 / t, n / t] for n, t in times], dtype=torch.float64)
    alpha, per_byte = (
        torch.linalg.lstsq(rows, torch.ones(len(times), 1, dtype=torch.float64)).solution.flatten().tolist()
    )
    return max(alpha, 1e-7), 1 / max(per_byte, 1e-13)
