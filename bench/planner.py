"""What the planner predicts beside what is measured, for layouts and sizes that one machine can run.

    python bench/planner.py            about six minutes on two cores that do nothing else

The machine is measured in the same run. It writes the table of docs/planner.md, in both languages.
"""

from __future__ import annotations

import gc
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from bench.row import append, hardware
from litchi.model.network import ModelConfig
from litchi.parallel.anatomy import Workload, text_batch
from litchi.parallel.crew import Crew
from litchi.parallel.gauge import gauge
from litchi.parallel.hardware import Machine
from litchi.parallel.mesh import DATA, Layout, join, resolve
from litchi.parallel.meter import Meter
from litchi.parallel.plan import build, initialise
from litchi.parallel.planner import Choice, foretell, legal, say
from litchi.schema.sequence import Batch
from litchi.train.optimizer import OptimizerConfig, build_optimizers
from litchi.train.run import average, tame_memory
from litchi.train.state import State
from litchi.train.step import find_gradient, step_optimizers

SMALL = ModelConfig(1024, width=256, num_layers=4, num_heads=4, num_kv_heads=4, head_width=64, mlp_width=768)
DEEP = replace(SMALL, num_layers=8, width=192, num_heads=6, num_kv_heads=2, head_width=32, mlp_width=512)
WIDE = ModelConfig(
    16384, width=384, num_layers=2, num_heads=6, num_kv_heads=2, head_width=64, mlp_width=1024, tied=False
)
STEPS = 5
PAGES = (Path("docs/planner.md"), Path("docs/zh/planner.md"))
HEADS = {
    "en": "| model | layout | ranks | predicted MB | measured | error | RSS grew | predicted s | measured | error |",
    "zh": "| 模型 | 布局 | 进程 | 预测 MB | 实测 | 误差 | 实测 RSS | 预测 s | 实测 | 误差 |",
}
TABLE = re.compile(r"(<!-- errors -->\n).*?(<!-- /errors -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Case:
    model: str
    w: Workload
    layout: Layout
    ranks: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one rank: peak bytes of tensors, growth of the process's own peak, seconds of a step."""

    peak: int
    resident: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Row:
    case: Case
    predicted: Choice
    peak: int
    resident: int
    seconds: float

    @property
    def memory_error(self) -> float:
        return self.predicted.memory.peak / self.peak - 1

    @property
    def time_error(self) -> float:
        return self.predicted.time.step / self.seconds - 1


def main() -> None:
    found: list[Row] = []
    torch.set_num_threads(1)  # as ranks do, so that the rows say so
    with Crew(4) as crew:
        for ranks in (1, 2, 4):
            crew.run(tame_memory)
            machine = gauge(crew, (ranks,))
            for case in cases(ranks):
                found.append(row_of(crew, case, machine))
                print(line(found[-1]), flush=True)
    memory, seconds = (median(abs(getattr(r, f"{what}_error")) for r in found) for what in ("memory", "time"))
    if "--keep" not in sys.argv:
        for page in PAGES:
            write(page, found, memory, seconds)
        append("planner", f"median error of peak memory, {len(found)} layouts", 100 * memory, "%")
        append("planner", f"median error of a step's time, {len(found)} layouts", 100 * seconds, "%")
    print(f"median error: memory {memory:.1%}, time {seconds:.1%}")


def cases(ranks: int) -> Iterator[Case]:
    """Sizes and layouts; every axis is there, and pairs."""
    small, wide = Workload(SMALL, 4, 128, 4), Workload(WIDE, 4, 128, 4)
    deep = Workload(DEEP, 2, 256, 8)
    plain = replace(small, dtype="float32", muon=False)
    chosen = {
        1: [
            ("small", small, Layout()),
            ("small", plain, Layout()),
            ("small", replace(small, recompute="full"), Layout()),
            ("wide", wide, Layout()),
            ("wide", replace(wide, chunk=128), Layout()),
            ("deep", deep, Layout()),
        ],
        2: [
            ("small", small, Layout(zero=1)),
            ("small", small, Layout(zero=0, exact=False)),
            ("wide", wide, Layout()),
            ("deep", deep, Layout(tensor=2)),
            ("deep", deep, Layout(pipeline=2)),
            ("small", small, Layout(context=2, zero=0)),
        ],
        4: [
            ("small", small, Layout()),
            ("small", plain, Layout(zero=2)),
            ("small", small, Layout(exact=False)),
            ("wide", wide, Layout(zero=0)),
            ("wide", wide, Layout(replicate=2)),
            ("deep", deep, Layout(tensor=2)),
            ("small", small, Layout(tensor=4, sequence=False)),
            ("small", small, Layout(context=2, attention="gather")),
            ("deep", deep, Layout(pipeline=2)),
            ("deep", deep, Layout(pipeline=4, schedule="gpipe")),
            ("deep", deep, Layout(pipeline=2, tensor=2)),
            ("deep", deep, Layout(pipeline=2, schedule="interleaved")),
        ],
    }
    for model, w, layout in chosen[ranks]:
        yield Case(model, w, layout, ranks)


def row_of(crew: Crew, case: Case, machine: Machine) -> Row:
    reason = legal(case.w, case.layout, case.ranks)
    assert reason is None, reason
    predicted = foretell(case.w, replace(machine, ranks=case.ranks), resolve(case.layout, case.ranks))
    ranks = crew.run(measure, case.w, case.layout, STEPS, size=case.ranks)
    peak, resident, seconds = (max(getattr(m, name) for m in ranks) for name in ("peak", "resident", "seconds"))
    return Row(case, predicted, peak, resident, seconds)


# ---- on each rank -------------------------------------------------------------------------------------------------


def measure(w: Workload, layout: Layout, steps: int) -> Measured:
    """Train a few steps of a workload on this rank."""
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    world = join(layout, torch.device("cpu"))
    placed = build(w.model, world, again=w.recompute)
    initialise(placed, 0)
    learned = placed.learned()
    held = {leaf.name: leaf.local.detach().clone() for leaf in learned} if w.average else {}
    optimizers = build_optimizers(learned, OptimizerConfig(matrix_lr=4e-3 if w.muon else 0.0))
    state = State(0, placed, held, optimizers, [])
    batches = [tokens(w, m) for m in range(world.index(*DATA), w.microbatches, world.degree(*DATA))]

    def step() -> None:
        dtype = getattr(torch, w.dtype)
        found = find_gradient(placed, batches, scale={}, dtype=dtype, draw=(0, state.step), chunk=w.chunk)
        step_optimizers(placed, optimizers, found, clip_at=1.0)
        if w.average:
            average(state, 0.998)
        state.step += 1

    step()
    gc.collect()
    meter = Meter(x for x in gc.get_objects() if isinstance(x, Tensor))
    with meter.lasting():
        step()
    took = []
    for _ in range(steps):
        if world.size > 1:
            dist.barrier()
        began = time.perf_counter()
        step()
        took.append(time.perf_counter() - began)
    return Measured(meter.peak, resident("VmHWM") - before, median(took))


def tokens(w: Workload, m: int) -> Batch:
    generator = torch.Generator().manual_seed(m)
    ids = torch.randint(w.model.vocab_size, (w.tokens,), generator=generator)
    return replace(text_batch(w.rows, w.row), tokens=ids, labels=ids)


def resident(name: str) -> int:
    """Bytes of this process that are in memory, or were at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


# ---- the table ----------------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    c, p = row.case, row.predicted
    w, layout = c.w, resolve(c.layout, c.ranks)
    how = [say(layout), w.dtype, "Muon" if w.muon else "AdamW"]
    how += [f"recompute {w.recompute}"] if w.recompute != "none" else []
    how += [f"chunk {w.chunk}"] if w.chunk else []
    how += [] if layout.exact else ["sums of the library"]
    how += ["tokens not shared"] if layout.tensor > 1 and not layout.sequence else []
    how += [layout.attention] if layout.context > 1 else []
    sizes = f"{p.memory.peak / 1e6:.1f} | {row.peak / 1e6:.1f} | {row.memory_error:+.1%}"
    times = f"{p.time.step:.3f} | {row.seconds:.3f} | {row.time_error:+.1%}"
    return f"| {c.model} | {', '.join(how)} | {c.ranks} | {sizes} | {row.resident / 1e6:.0f} | {times} |"


def write(page: Path, found: Sequence[Row], memory: float, seconds: float) -> None:
    """Put the table where the page has its marks; the worst rows are named under it."""
    text = page.read_text(encoding="utf-8")
    chinese = "zh" in page.parts
    head = HEADS["zh" if chinese else "en"]
    worst = [max(found, key=lambda r: abs(getattr(r, f"{what}_error"))) for what in ("memory", "time")]
    errors = worst[0].memory_error, worst[1].time_error
    names = [say(resolve(r.case.layout, r.case.ranks)) for r in worst]
    said = (
        f"误差中位数：内存 {memory:.1%}，时间 {seconds:.1%}。最差：内存 {errors[0]:+.1%}（{names[0]}），"
        f"时间 {errors[1]:+.1%}（{names[1]}）。{hardware()}。"
        if chinese
        else f"Median error: memory {memory:.1%}, time {seconds:.1%}. Worst: memory {errors[0]:+.1%} ({names[0]}), "
        f"time {errors[1]:+.1%} ({names[1]}). {hardware()}."
    )
    body = "\n".join([head, "|---" * 10 + "|", *map(line, found), "", said])
    page.write_text(TABLE.sub(lambda m: f"{m[1]}{body}\n{m[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
