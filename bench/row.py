"""One measurement is one JSON row: what was measured, on which commit and machine, beside whom, and the ratio."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def append(
    script: str,
    measure: str,
    figure: float,
    unit: str,
    *,
    peer: str = "",
    peer_figure: float = 0.0,
    beside: Mapping[str, float] | None = None,
) -> None:
    """Append a row to results/SCRIPT.jsonl and print it. The ratio is ours over the peer's; `beside` is of others."""
    row: dict[str, object] = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "measure": measure,
        "figure": round(figure, 4),
        "unit": unit,
        "peer": peer,
        "peer_figure": round(peer_figure, 4),
        "ratio": round(figure / peer_figure, 3) if peer_figure else None,
    }
    if beside is not None:
        row["beside"] = {name: float(f"{value:.5g}") for name, value in beside.items()}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{script}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


def commit() -> str:
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def hardware() -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")), platform.machine()
    )
    return f"{cpu}, {torch.get_num_threads()} threads"


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
