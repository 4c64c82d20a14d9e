"""The demo goes through every stage to a table and an address, and goes on where it was killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.held import STEP
from tests.house.sources import ROOT

pytest.importorskip("minigrid", reason="pip install 'litchi[rooms]'")
pytest.importorskip("uvicorn", reason="pip install 'litchi[serve]'")

SOURCES = ("talk", "describe", "draw", "foresee", "play", "watch", "act")
TESTED = ("talk", "describe", "draw", "foresee", "watch")
SMALL = {
    "data.train": {source: 12 for source in SOURCES},
    "data.test": {source: 2 for source in TESTED},
    "data.workers": 1,
    "fit.vocab_size": 330,
    "fit.phrases": 8,
    "model.width": 16,
    "model.num_layers": 1,
    "model.num_heads": 1,
    "model.num_kv_heads": 1,
    "model.head_width": 16,
    "model.mlp_width": 16,
    "train.num_steps": 3,
    "train.save_every": 1,
    "train.batches.rows": 1,
    "train.batches.row": 448,
    "train.batches.lookahead": 2,
    "train.dtype": "float32",
    "train.threads": 1,
    "eval.talk": 1,
    "eval.describe": 1,
    "eval.draw": 2,
    "eval.foresee": 1,
    "eval.watch": 1,
    "eval.act": 1,
    "eval.drift_steps": 0,
    "act.max_steps": 4,
}
"""The demo's own stages, each as small as it can be."""


def demo(folder: Path, program: str = "litchi.cli") -> list[str]:
    settings = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}".replace("'", '"'))]
    return [sys.executable, "-m", program, "demo", "--folder", str(folder), *settings]


@pytest.mark.slow
def test_the_demo_ends_with_six_abilities_and_an_address_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    command, pipe = demo(tmp_path, "tests.held"), subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT
    ) as first:
        assert first.stdout is not None
        next(line for line in first.stdout if line == STEP.encode())  # training begins
        first.kill()
    assert first.returncode == -signal.SIGKILL, "it ended before it could be killed"
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.parquet")}

    again = subprocess.run(demo(tmp_path), env=environment, capture_output=True, text=True, timeout=1800)
    assert again.returncode == 0, again.stderr
    said = again.stdout
    assert made and all(path.stat().st_mtime_ns == then for path, then in made.items()), "shards were made again"
    assert "codec:" not in said, "the processor was fitted again"
    assert said.count("Asked over HTTP") == 1
    for ability in ("talk", "describe", "draw", "foresee", "watch", "act"):
        assert len(re.findall(rf"^\W*{ability}\b.*\d\.\d\d\d to \d\.\d\d\d", said, re.M)) == 1, ability
    assert re.search(r"The page: http://127\.0\.0\.1:\d+/", said)
    assert "Traceback" not in said + again.stderr
