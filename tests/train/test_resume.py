"""Resuming is a continuation, bit for bit, whoever stopped the run and wherever."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from litchi.config import BadInput
from litchi.model.weights import load
from litchi.record import read
from litchi.train.run import newest_checkpoint, run
from tests.house.sources import ROOT
from tests.train.runs import CONFIG, MODEL, PROCESSOR, RUN, CtrlC, sample, train

STATE = (
    "model/model.safetensors",
    "resume/weights.safetensors",
    "resume/optimizer.safetensors",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def assert_same_run(a: Path, b: Path) -> None:
    """Every tensor of the last checkpoints is equal, and so is every row but for its time."""
    last = [newest_checkpoint(folder) for folder in (a, b)]
    assert last[0] is not None and last[1] is not None and last[0].name == last[1].name
    for name in STATE:
        ours, theirs = (load_file(folder / name) for folder in last)
        assert ours.keys() == theirs.keys()
        assert [k for k, t in ours.items() if not torch.equal(t, theirs[k])] == [], name
    assert load(last[0]).meta["batches"] == load(last[1]).meta["batches"]
    assert rows(a) == rows(b)


def rows(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read(folder)]


def forget() -> None:
    """Another process has other global randomness, and none of the run's business is in it."""
    torch.manual_seed(99)
    np.random.seed(99)


@pytest.mark.parametrize(("count", "step"), [(1, 1), (60, 2), (100, 3)])
def test_resuming_is_a_continuation_bit_for_bit(whole: Path, tmp_path: Path, count: int, step: int) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, MODEL, PROCESSOR, CtrlC(count), tmp_path, RUN)
    stopped = newest_checkpoint(tmp_path)
    assert stopped is not None and load(stopped).meta["step"] == step
    assert signal.getsignal(signal.SIGINT) is before, "Ctrl-C must do after training what it did before"
    forget()
    train(tmp_path)
    assert_same_run(whole, tmp_path)


def test_the_run_learns_from_every_modality(whole: Path) -> None:
    seen = {key for row in rows(whole) for key in row}
    assert {"loss/text", "loss/image", "loss/action"} <= seen
    assert [row["step"] for row in rows(whole)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_left_as_it_is(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    train(folder)
    assert_same_run(whole, folder)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_anywhere_the_same_command_loses_nothing(whole: Path, tmp_path: Path, seed: int) -> None:
    """SIGKILL in real processes, at touches of files drawn from a seed: most fall into a save."""
    command = [sys.executable, "-m", "tests.train.kills", str(tmp_path), str(seed), "5"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0 and answer.stdout.endswith("done\n"), answer.stdout + answer.stderr
    assert "killed" in answer.stdout
    assert_same_run(whole, tmp_path)
    kept = sorted(p.name for p in tmp_path.glob("step_*"))
    assert kept == ["step_0000004", "step_0000006"], "as many checkpoints as the configuration keeps"


def test_a_half_written_checkpoint_is_never_taken(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    last = newest_checkpoint(folder)
    assert last is not None
    shutil.copytree(last, folder / ".step_0000008.writing")
    half = Path(shutil.copytree(last, folder / "step_0000009"))
    (half / "meta.json").unlink()
    assert newest_checkpoint(folder) == last


def test_a_checkpoint_of_another_run_is_refused(whole: Path) -> None:
    other = json.dumps({"name": "test", "train": {"num_steps": 7}})
    with pytest.raises(BadInput, match="was trained with another train: give this Run a folder of its own"):
        run(replace(CONFIG, num_steps=7), MODEL, PROCESSOR, sample, whole, other)


def test_a_damaged_checkpoint_is_refused_and_left_alone(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    last = newest_checkpoint(folder)
    assert last is not None
    path = last / "resume" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    metrics = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(BadInput, match=r"resume/optimizer.safetensors is missing or has changed"):
        train(folder)
    assert (folder / "metrics.jsonl").read_bytes() == metrics
