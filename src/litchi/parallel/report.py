"""What `litchi plan` shows: the table of layouts, why the best is best, JSON, a dry run, and a ladder of sizes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from litchi.config import BadInput, from_json
from litchi.model.families import parameters
from litchi.model.layout import pieces
from litchi.model.network import ModelConfig
from litchi.model.presets import preset
from litchi.parallel.anatomy import Workload
from litchi.parallel.dryrun import DryRun, first_rank_of, rehearse
from litchi.parallel.hardware import PRICE, Machine, load, published
from litchi.parallel.memory import PARTS
from litchi.parallel.mesh import Layout
from litchi.parallel.planner import Choice, Plan, Rung, climb, explain, foretell, legal, plan, resolve, room
from litchi.record import table

STEP_TOKENS = 1 << 22
"""Tokens of a step of a model by name, where nothing is said of microbatches; large models are trained with as many."""
HARDWARE = Path("runs/hardware.json")
"""Where `litchi bench hardware` writes, and where "cpu" is read from."""
LADDER = (8, 32, 128, 512, 2048, 10_000)
COLUMNS = ("layout", "GB", "weights", "activations", "buffers", "s a step", "work", "exchange", "waiting", "optimizer")
MORE = ("tokens/s", "$ a 1e9 tokens", "fits")


def show_pieces(args: argparse.Namespace) -> int:
    """What each rank would hold by tensor and pipeline parallelism: names and sizes."""
    config = preset(args.preset)
    found = list(pieces(config, tensor=args.tensor, pipeline=args.pipeline))
    if args.json:
        print(json.dumps([asdict(piece) for piece in found]))
        return 0
    total = sum(shape.numel() for shape in parameters(config).values())
    print(f"{args.preset}: {total:,} parameters, {total * 2 / 1e9:.2f} GB in bfloat16")
    for stage in range(args.pipeline):
        for rank in range(args.tensor):
            held = [piece for piece in found if (piece.stage, piece.rank) == (stage, rank)]
            size = sum(piece.size for piece in held)
            print(f"stage {stage} rank {rank}: {len(held)} tensors, {size:,} parameters, {size * 2 / 1e9:.3f} GB")
    return 0


# ---- a cluster ----------------------------------------------------------------------------------------------------


def show_plan(args: argparse.Namespace, given: Workload | None, like: Layout) -> int:
    """Plan, print, and draw. `given` is a recipe's work; None is that of a model by name."""
    machine, nodes = cluster(args.cluster, args.machine, PRICE if args.price is None else args.price)
    ranks = nodes * machine.ranks
    w = workload(args, given, machine, ranks)
    found = only(w, machine, ranks, from_json(Layout, args.layout)) if args.layout else plan(w, machine, ranks, like)
    ladder = climb(w, machine, LADDER, max(1, w.microbatches // ranks)) if args.scale else []
    ran = dry_run(found) if args.dry_run else None
    if args.json:
        print(json.dumps(as_json(found, ladder, ran), indent=1))
    else:
        show(found, args.top)
        show_ladder(ladder)
        show_dry_run(ran)
    if args.picture:
        from litchi.parallel.picture import draw

        draw(found, ladder, args.picture)
    return 0


def cluster(text: str, file: Path | None, price: float) -> tuple[Machine, int]:
    """ "h200:8x8" as a machine and a number of nodes. Raises BadInput for what is not of that form."""
    name, _, size = text.partition(":")
    nodes, _, ranks = size.partition("x")
    if not nodes.isdigit() or not ranks.isdigit() or not int(nodes) * int(ranks):
        raise BadInput(f"--cluster {text}: write machine:NODESxRANKS, such as h200:8x8 or cpu:1x4")
    if file is None and name != "cpu":
        return published(name, int(ranks), price), int(nodes)
    machine = load(file or HARDWARE)
    if int(ranks) > machine.ranks or (int(nodes) > 1 and not machine.network):
        raise BadInput(
            f"{machine.name} was measured with up to {machine.ranks} ranks of one node: measure it with more"
        )
    return replace(machine, ranks=int(ranks), price=price if machine.device == "cuda" else 0.0), int(nodes)


def workload(args: argparse.Namespace, given: Workload | None, machine: Machine, ranks: int) -> Workload:
    """The recipe's or the model's work with what the command line says of it."""
    w = given or by_name(preset(args.preset), ranks, args.row)
    named = {name: getattr(args, name) for name in ("rows", "row", "microbatches") if getattr(args, name)}
    asked = {name: getattr(args, name) for name in ("recompute", "chunk") if getattr(args, name) is not None}
    w = replace(w, **named, **asked, device=machine.device)
    if given is None and not args.microbatches and args.rows:
        w = replace(w, microbatches=whole_steps(w.tokens, ranks))
    return w


def by_name(c: ModelConfig, ranks: int, row: int) -> Workload:
    row = row or min(c.max_length or 4096, 8192)
    return Workload(c, 1, row, whole_steps(row, ranks), muon=False, average=False)


def whole_steps(tokens: int, ranks: int) -> int:
    """Microbatches of a step: about STEP_TOKENS, and as many for each rank."""
    return max(1, round(STEP_TOKENS / tokens / ranks)) * ranks


def only(w: Workload, machine: Machine, ranks: int, layout: Layout) -> Plan:
    """A plan of one layout. Raises BadInput with the reason if it is not legal."""
    if reason := legal(w, layout, ranks):
        raise BadInput(reason)
    return Plan(w, machine, ranks, (foretell(w, machine, resolve(layout, ranks)),), {})


def dry_run(found: Plan) -> DryRun:
    best = found.best
    return rehearse(found.workload, best.layout, rank=first_rank_of(best.layout, best.memory.stage))


# ---- text ---------------------------------------------------------------------------------------------------------


def show(found: Plan, top: int) -> None:
    machine, w = found.machine, found.workload
    figures = "a simulation from published figures" if machine.kind == "published" else "from measured figures"
    print(f"{machine.name} x {found.ranks}: {figures} ({machine.source})")
    if machine.shares:
        said = ", ".join(f"{name} {value:g}" for name, value in machine.shares.items())
        print(f"assumed of published peaks: {said}; ${machine.price:g} a rank and hour")
    print(
        f"a step: {w.microbatches} microbatches of {w.rows} x {w.row} tokens, {w.dtype}, recompute {w.recompute}, "
        f"chunk {w.chunk}; {room(machine) / 1e9:.1f} GB for tensors"
    )
    table(f"{len(found.choices)} legal layouts", (*COLUMNS, *MORE), [row(found, c) for c in found.choices[:top]])
    for line in explain(found):
        print(line)


def row(found: Plan, c: Choice) -> tuple[object, ...]:
    m, t = c.memory, c.time
    state = m.parameters + m.averages + m.optimizer + m.gradients
    sizes = [gigabytes(x) for x in (m.peak, state, m.activations, m.buffers)]
    times = [f"{x:.3g}" for x in (t.step, t.compute, t.exchange, t.waiting, t.optimizer)]
    rate, dollars = f"{found.tokens_per_second(c):,.0f}", f"{found.dollars(c):.2f}"
    return (c.name, *sizes, *times, rate, dollars, "yes" if c.fits else "no")


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}" if count >= 1e10 else f"{count / 1e9:.3f}"


def show_ladder(ladder: Sequence[Rung]) -> None:
    if ladder:
        rows = [
            (f"{r.ranks:,}", r.choice.name, gigabytes(r.choice.memory.peak), f"{r.choice.time.step:.3g}")
            + (f"{r.tokens_per_second:,.0f}", f"{100 * r.efficiency:.1f} %")
            for r in ladder
        ]
        table("simulated, not measured", ("ranks", "layout", "GB", "s a step", "tokens/s", "of the first rate"), rows)


def show_dry_run(ran: DryRun | None) -> None:
    if ran is None:
        return
    print(
        f"dry run: rank {ran.rank} of {ran.ranks} fake ranks, {ran.microbatches} microbatches: {ran.parameters:,} "
        f"parameters, {ran.peak / 1e9:.2f} GB without the optimizer, {ran.operations:,} operations; "
        f"{ran.seconds:.1f} s and {ran.resident / 1e9:.2f} GB here"
    )
    rows = [(name, count, gigabytes(size)) for name, (count, size) in ran.collectives.items()]
    table("what that rank exchanges", ("collective", "times", "GB"), rows)


def as_json(found: Plan, ladder: Sequence[Rung], ran: DryRun | None) -> Mapping[str, Any]:
    machine = found.machine
    return {
        "machine": machine.name,
        "ranks": found.ranks,
        "figures": machine.kind,
        "source": machine.source,
        "assumed": machine.shares,
        "room": found.room,
        "why": explain(found),
        "choices": [choice_json(found, c) for c in found.choices],
        "refused": found.refused,
        "simulated": [
            {
                "ranks": r.ranks,
                "layout": r.choice.name,
                "tokens_per_second": r.tokens_per_second,
                "efficiency": r.efficiency,
            }
            for r in ladder
        ],
        "dry_run": None if ran is None else asdict(ran),
    }


def choice_json(found: Plan, c: Choice) -> Mapping[str, Any]:
    sizes = {part: getattr(c.memory, part) for part in PARTS}
    times = {part: getattr(c.time, part) for part in ("compute", "exchange", "waiting", "optimizer")}
    return {
        "name": c.name,
        "layout": asdict(c.layout),
        "fits": c.fits,
        "bytes": {**sizes, "peak": c.memory.peak, "moment": c.memory.moment},
        "seconds": {**times, "step": c.time.step},
        "tokens_per_second": found.tokens_per_second(c),
        "utilisation": found.utilisation(c),
        "dollars_a_1e9_tokens": found.dollars(c),
    }
