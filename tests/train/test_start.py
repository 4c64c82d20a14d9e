"""A run may begin with the weights of a checkpoint and leave some of them as they are, and still resumes to the bit."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from litchi.config import BadInput
from litchi.model.network import Flow, Mask
from litchi.model.weights import load
from litchi.schema.sample import Sample
from litchi.train.pictures import SEARCHED
from litchi.train.run import newest_checkpoint, run
from tests.train.runs import CONFIG, MODEL, PROCESSOR, RUN, sample, train

TEXT = replace(MODEL, modalities={"action": Flow(3)})


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("start"))


def test_what_is_frozen_stays_and_what_is_not_learns(start: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, num_steps=2, start=start, frozen=("layers.", "embed_tokens."))
    before, after = load(start).model.state_dict(), load(train(tmp_path, config)).model.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.startswith(("layers.", "embed_tokens."))} != set()


def test_what_the_start_lacks_begins_at_its_first_values(start: Path, tmp_path: Path) -> None:
    wider = replace(MODEL, modalities={**MODEL.modalities, "video": Mask(digits=4, levels=9)})
    config = replace(CONFIG, num_steps=1, start=start, optimizer=replace(CONFIG.optimizer, lr=0.0, matrix_lr=0.0))
    after = load(run(config, wider, PROCESSOR, sample, tmp_path, RUN)).model.state_dict()
    before = load(start).model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.split(".")[1] for name in after.keys() - before.keys()} == {"video"}


def test_a_start_that_does_not_fit_is_named(start: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the network has none: start from another"):
        run(replace(CONFIG, start=start), TEXT, PROCESSOR, sample, tmp_path, RUN)
    with pytest.raises(BadInput, match="no parameter begins with 'trunk.'"):
        train(tmp_path, replace(CONFIG, frozen=("trunk.",)))
    with pytest.raises(BadInput, match="nothing to learn"):
        train(tmp_path, replace(CONFIG, frozen=("",)))


def test_rows_longer_than_the_network_reads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="row=96, but this network reads 64 tokens: lower it to 64"):
        run(CONFIG, replace(MODEL, max_length=64), PROCESSOR, sample, tmp_path, RUN)


def test_a_frozen_run_resumes_to_the_bit(start: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, start=start, frozen=("layers.0.",))
    train(tmp_path / "whole", config)
    left = SEARCHED + 40  # sample pictures are looked for first

    def interrupted(position: int) -> Sample:
        nonlocal left
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGINT)
        return sample(position)

    processor = PROCESSOR
    with pytest.raises(KeyboardInterrupt):
        run(config, MODEL, processor, interrupted, tmp_path / "cut", RUN)
    assert json.loads((newest_checkpoint(tmp_path / "cut") / "meta.json").read_text())["step"] < config.num_steps
    train(tmp_path / "cut", config)
    for name in ("model/model.safetensors", "resume/weights.safetensors", "resume/optimizer.safetensors"):
        ours, theirs = (load_file(newest_checkpoint(tmp_path / each) / name) for each in ("whole", "cut"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    kept = load_file(newest_checkpoint(tmp_path / "whole") / "resume/weights.safetensors")
    assert kept and not any(name.startswith("layers.0.") for name in kept)
