"""Verbs about layouts and steps: what `litchi certify` and `litchi train --replay` do and print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from litchi.config import BadInput
from litchi.record import Progress, table

if TYPE_CHECKING:
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
