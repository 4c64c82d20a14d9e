"""Verbs about layouts, steps and speed: what `litchi certify`, `plan`, `bench` and `train --replay` do and print."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from litchi.config import BadInput
from litchi.record import Progress, table

if TYPE_CHECKING:
    from litchi.parallel.anatomy import Workload
    from litchi.run import Run
    from litchi.serve.crowd import Report
    from litchi.train.certify import Finding
    from litchi.train.replay import Replay


def certify(args: argparse.Namespace) -> int:
    """Compare loss and every gradient of each layout with one process, on local ranks; 1 if any differs."""
    from litchi.parallel.crew import Crew
    from litchi.train.certify import KINDS, TOLERANCE, cases
    from litchi.train.certify import certify as findings_of

    asked = [case for case in cases() if args.case in case.name]
    if not asked:
        raise BadInput(f"no layout is named like {args.case!r}: `litchi certify` without it lists them all")
    findings = []
    with Crew(4) as crew, Progress(len(KINDS) * len(asked), "certify") as progress:
        for finding in findings_of(crew, asked):
            findings.append(finding)
            progress.advance(note=finding.case)
    rows = [[f.case, f.kind, f.loss, f.gradient, f.worst, "passes" if f.passes else "FAILS"] for f in findings]
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings]))
    elif args.markdown:
        print(markdown(findings))
    else:
        table("Relative difference from one process, fp32", ["layout", "batch", "loss", "gradient", "of", ""], rows)
    failed = sum(not finding.passes for finding in findings)
    print(f"{len(findings) - failed} of {len(findings)} within {TOLERANCE:g}", file=sys.stderr)
    return 1 if failed else 0


def markdown(findings: Sequence[Finding]) -> str:
    """One row a layout: the largest difference of any gradient for each kind of batch."""
    kinds = list(dict.fromkeys(finding.kind for finding in findings))
    lines = [f"| layout | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for case in dict.fromkeys(finding.case for finding in findings):
        gaps = {f.kind: max(f.gradient, f.loss) for f in findings if f.case == case}
        cells = ("same bits" if gaps[kind] == 0 else f"{gaps[kind]:.1e}" for kind in kinds)
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def show_replay(found: Replay) -> int:
    """Say whether a step that was taken again found what the run found; 1 if not."""
    rows = [[name, str(found.then.get(name)), str(value)] for name, value in found.now.items()]
    table(f"Step {found.step}, taken again from step {found.begun}", ["figure", "then", "now"], rows)
    if found.reason:
        print(f"its gradient was dropped: {found.reason}")
    sources = [source for source, _ in found.documents]
    counts = ", ".join(f"{sources.count(source)} of {source}" for source in sorted(set(sources)))
    print(f"it read {len(sources)} documents: {counts}")
    print("the same to the last digit" if found.same else "not the same")
    return 0 if found.same else 1


# ---- plans --------------------------------------------------------------------------------------------------------


def plan_layouts(args: argparse.Namespace, run: Run | None) -> int:
    """Plan a model by name, or the training of a Run; without a cluster, say what tensor and pipeline ranks hold."""
    from litchi.parallel.mesh import Layout
    from litchi.parallel.report import show_pieces, show_plan

    if not args.cluster:
        return show_pieces(args)
    return show_plan(args, None, Layout()) if run is None else show_plan(args, workload_of(run), run.train.layout)


def workload_of(run: Run) -> Workload:
    """What a Run trains. A vocabulary that is still to be learned is taken to be as large as it may become."""
    from dataclasses import replace

    from litchi.parallel.anatomy import Workload

    c, train = run.model, run.train
    model = replace(c, vocab_size=c.vocab_size or run.fit.vocab_size + run.fit.phrases)
    return Workload(
        model,
        train.batches.rows,
        train.batches.row,
        train.num_accumulate,
        dtype=train.dtype,
        muon=train.optimizer.matrix_lr > 0,
        chunk=train.chunk,
        recompute=train.recompute,
    )


def bench(args: argparse.Namespace) -> int:
    """Measure this machine (hardware) for `litchi plan`, or a server (serve) that speaks as OpenAI's does."""
    return args.measure(args)


def bench_hardware(args: argparse.Namespace) -> int:
    """Measure this machine for `litchi plan`: products, passes over memory, and what its ranks exchange."""
    from litchi.parallel.crew import Crew
    from litchi.parallel.gauge import gauge, show
    from litchi.parallel.hardware import save
    from litchi.train.run import tame_memory

    with Crew(max(args.ranks)) as crew:
        crew.run(tame_memory)
        machine = gauge(crew, sorted(args.ranks))
    save(machine, args.out)
    show(machine)
    print(f"{args.out}: read by `litchi plan --cluster cpu:1x{machine.ranks}`, or anywhere with --machine")
    return 0


def bench_serve(args: argparse.Namespace) -> int:
    """Send a crowd of clients to a server, and say how long they waited; 1 if any was not answered."""
    from litchi.serve.crowd import Plan, crowd, read_bodies

    for name in ("requests", "concurrency", "prompt_tokens", "max_tokens"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.rate < 1e6:
        raise BadInput("--rate must be visitors a second, or 0 for a closed loop")
    plan = Plan(
        url=args.url,
        model=args.model,
        key=args.key,
        requests=args.requests,
        concurrency=args.concurrency,
        rate=args.rate,
        prompt_tokens=args.prompt_tokens,
        max_tokens=args.max_tokens,
        bodies=read_bodies(args.prompts) if args.prompts else (),
        ignore_eos=args.ignore_eos,
        seed=args.seed,
    )
    with Progress(plan.requests, "answers") as progress:
        found = crowd(plan, lambda visit: progress.advance(note=visit.error))
    row = json.dumps(asdict(found) | {"plan": {name: getattr(plan, name) for name in ASKED}})
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(row + "\n")
    if args.json:
        print(row)
    else:
        show_crowd(found)
    return 0 if found.answered == found.requests else 1


ASKED = ("requests", "concurrency", "rate", "prompt_tokens", "max_tokens", "ignore_eos", "seed")
"""What of a plan stands in a row: not the key."""


def show_crowd(found: Report) -> None:
    kinds = {"first piece": found.first, "from piece to piece": found.between, "a token": found.per_token}
    rows = []
    for name, spreads in (kinds | {"whole answer": found.whole}).items():
        cells = ["-" if s is None else f"{1000 * s.value:.1f}" for s in spreads.values()]
        ranges = ["-" if s is None else f"{1000 * s.low:.1f} to {1000 * s.high:.1f}" for s in spreads.values()]
        rows.append([name, cells[0], ranges[0], cells[1], ranges[1]])
    table(f"{found.model} at {found.url}, milliseconds", ["", "p50", "95 % within", "p99", "95 % within"], rows)
    counted = "" if found.counted else " (pieces: the server does not count)"
    print(f"{found.answered} of {found.requests} answered in {found.seconds:.1f} s", end="")
    print("".join(f"; {kind}: {count}" for kind, count in found.errors.items()))
    print(f"{found.tokens} tokens{counted} for {found.prompt_tokens} of prompts: ", end="")
    print(f"{found.tokens_per_second:.1f} tokens/s, {found.requests_per_second:.2f} answers/s")


def add_plan_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("preset", help="a well-known model, such as yi-34b, or a recipe")
    sub.add_argument("--cluster", default="", help="machine:NODESxRANKS, such as h200:8x8 or cpu:1x4")
    sub.add_argument("--machine", type=Path, metavar="FILE", help="what `litchi bench hardware` wrote there")
    sub.add_argument("--price", type=float, help="dollars of a rank for an hour (default 2.5, of a CPU 0)")
    sub.add_argument("--rows", type=int, default=0, help="rows of a microbatch (a model by name: 1)")
    sub.add_argument("--row", type=int, default=0, help="tokens of a row (a model by name: what it reads, up to 8192)")
    sub.add_argument("--microbatches", type=int, default=0, help="of a step, over all ranks (default about 4 M tokens)")
    sub.add_argument("--recompute", choices=("none", "selective", "full"), help="what layers compute again")
    sub.add_argument("--chunk", type=int, help="tokens whose scores of the vocabulary exist at once")
    sub.add_argument("--layout", default="", metavar="JSON", help='this one only, such as {"tensor": 8, "pipeline": 4}')
    sub.add_argument("--top", type=int, default=12, help="rows of the table (default 12)")
    sub.add_argument("--picture", type=Path, metavar="FILE", help="draw memory and time, as PNG or SVG")
    sub.add_argument("--dry-run", action="store_true", help="build the best layout on fake ranks and step through it")
    sub.add_argument("--scale", action="store_true", help="simulate clusters of up to 10,000 ranks")
    sub.add_argument("--json", action="store_true", help="print everything as JSON; without --cluster every piece")
    sub.add_argument("--tensor", type=int, default=1, help="without --cluster: ranks that divide each matrix")
    sub.add_argument("--pipeline", type=int, default=1, help="without --cluster: stages that divide the layers")


def add_bench_arguments(sub: argparse.ArgumentParser) -> None:
    measures = sub.add_subparsers(dest="what", required=True, metavar="WHAT")
    hardware = measures.add_parser("hardware", help=first_line(bench_hardware), description=bench_hardware.__doc__)
    hardware.set_defaults(measure=bench_hardware)
    hardware.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks (default 1 2 4)")
    hardware.add_argument("--out", type=Path, default=Path("runs/hardware.json"), help="the file to write")
    serve = measures.add_parser("serve", help=first_line(bench_serve), description=bench_serve.__doc__)
    serve.set_defaults(measure=bench_serve)
    serve.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is (default %(default)s)")
    serve.add_argument("--model", default="", help="its name there (default the first that the server names)")
    serve.add_argument("--key", default=os.environ.get("OPENAI_API_KEY", ""), help="default $OPENAI_API_KEY")
    serve.add_argument("--requests", type=int, default=100, help="how many questions (default 100)")
    serve.add_argument("--concurrency", type=int, default=8, help="how many at once, in a closed loop (default 8)")
    serve.add_argument("--rate", type=float, default=0.0, help="visitors a second, at random; instead of the loop")
    serve.add_argument("--prompt-tokens", type=int, default=64, help="of a question, about (default 64)")
    serve.add_argument("--max-tokens", type=int, default=64, help="of an answer, at most (default 64)")
    serve.add_argument("--prompts", type=Path, metavar="FILE", help="questions as JSON lines, asked in turn")
    serve.add_argument(
        "--ignore-eos", action="store_true", help="answers as long as they may be, where servers know it"
    )
    serve.add_argument("--seed", type=int, default=0, help="of words and arrivals")
    serve.add_argument("--out", type=Path, metavar="FILE", help="append a row of JSON")
    serve.add_argument("--json", action="store_true", help="print the row instead of the table")


def first_line(function: Callable[[argparse.Namespace], int]) -> str:
    return (function.__doc__ or "").split("\n")[0]
