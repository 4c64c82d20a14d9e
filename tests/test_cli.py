"""The command line refuses bad input in one line that names the mend, damages nothing, and goes on after Ctrl-C."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.held import STEP
from tests.house.sources import ROOT

pytest.importorskip("minigrid", reason="pip install 'litchi[rooms]'")

SMALL = {
    "data.train": '{"talk": 40}',
    "data.test": '{"talk": 4}',
    "data.workers": "1",
    "mixture": '{"talk": 1.0}',
    "fit.vocab_size": "320",
    "model.width": "16",
    "model.num_layers": "1",
    "model.num_heads": "1",
    "model.num_kv_heads": "1",
    "model.mlp_width": "16",
    "train.num_steps": "30",
    "train.batches.rows": "1",
    "train.batches.row": "384",
    "train.save_every": "30",
    "train.log_every": "1",
    "train.dtype": "float32",
    "train.compile": "false",
    "train.threads": "1",
    "train.device": "cpu",
}
"""The tiny recipe, small enough for a test."""
SETTINGS = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
from litchi.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line where a module is not installed."""


def litchi(*words: str | Path, cwd: Path, without: str = "") -> subprocess.CompletedProcess[str]:
    program = ["-c", BLOCKED.format(module=without)] if without else ["-m", "litchi.cli"]
    command = [sys.executable, *program, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def refused(answer: subprocess.CompletedProcess[str], *said: str | Path) -> bool:
    """Exit code 2, and one line on stderr that begins with "error: " and says all of it."""
    assert answer.returncode == 2, answer.stdout + answer.stderr
    assert answer.stderr.startswith("error: ") and len(answer.stderr.splitlines()) == 1, answer.stderr
    assert all(str(words) in answer.stderr for words in said), answer.stderr
    return True


def prints(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of one small recipe in it, from seeds to a checkpoint."""
    home = tmp_path_factory.mktemp("home")
    for verb in ("data", "train"):
        answer = litchi(verb, "tiny", *SETTINGS, "--folder", home / "run", cwd=home)
        assert answer.returncode == 0, answer.stderr
    return home


@pytest.fixture(scope="module")
def checkpoint(home: Path) -> Path:
    return home / "run" / "train" / "step_0000030"


class Changed:
    """One byte of a file changed while the block runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.whole = path, path.read_bytes()

    def __enter__(self) -> None:
        middle = len(self.whole) // 2
        self.path.write_bytes(self.whole[:middle] + bytes([self.whole[middle] ^ 1]) + self.whole[middle + 1 :])

    def __exit__(self, *_: object) -> None:
        self.path.write_bytes(self.whole)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "tinny"], ["no recipe 'tinny'", "tiny"]),
        (["train", "tiny", "--set", "train.optimiser.lr=1"], ["did you mean train.optimizer.lr?"]),
        (["train", "tiny"], ["manifest.json is missing: run `litchi data"]),
        (["chat", "nowhere"], ["no checkpoint at 'nowhere'", "litchi train"]),
    ],
)
def test_what_is_misspelt_or_missing_is_refused(words: Sequence[str], said: Sequence[str], tmp_path: Path) -> None:
    assert refused(litchi(*words, cwd=tmp_path), *said)


def test_damage_is_refused_by_name_and_made_no_worse(home: Path, checkpoint: Path) -> None:
    before = prints(home)
    weights = checkpoint / "model" / "model.safetensors"
    with Changed(weights):
        assert refused(litchi("chat", checkpoint, cwd=home), weights, "has changed since it was saved")
    shard = home / "run" / "data" / "train" / "talk-00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert refused(litchi("train", "tiny", *SETTINGS, "--folder", home / "run", cwd=home), shard, "is broken: delete")
    shard.write_bytes(whole)
    assert prints(home) == before


def test_a_file_that_is_no_picture_is_refused(home: Path, checkpoint: Path) -> None:
    words = home / "words.png"
    words.write_text("no picture")
    assert refused(litchi("chat", checkpoint, "--image", words, cwd=home), words, "give a PNG or JPEG file")


@pytest.mark.parametrize(("module", "extra"), [("fastapi", "serve"), ("minigrid", "rooms")])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    home: Path, checkpoint: Path, module: str, extra: str
) -> None:
    answer = litchi("serve", checkpoint, "--set", "serve.port=0", cwd=home, without=module)
    assert refused(answer, module, f"pip install 'litchi[{extra}]'")


def test_a_finished_run_is_not_trained_again(home: Path, checkpoint: Path) -> None:
    before = prints(home / "run" / "train")
    answer = litchi("train", "tiny", *SETTINGS, "--folder", home / "run", cwd=home)
    assert answer.returncode == 0 and answer.stdout.splitlines()[-1] == str(checkpoint)
    assert prints(home / "run" / "train") == before


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(home: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Interrupted in its first step, the run ends in the weights of the run that nobody stopped."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("data", "processor"):
        (folder / name).symlink_to(home / "run" / name)
    words = [sys.executable, "-m", "tests.held", "train", "tiny", *SETTINGS, "--folder", str(folder)]
    environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("supervised weight")
        assert process.stdout.readline() == STEP
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()  # closes its stdin, so that the step begins
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "interrupted; the same command goes on from here"
    stopped = [p.name for p in (folder / "train").glob("step_*")]
    assert stopped and stopped[0] < checkpoint.name
    answer = litchi("train", "tiny", *SETTINGS, "--folder", folder, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    ours, theirs = (
        load_file(place / "resume" / "weights.safetensors")
        for place in (folder / "train" / checkpoint.name, checkpoint)
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
