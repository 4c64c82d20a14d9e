"""The same weights, bit for bit, whatever the number of ranks that read, and however often it changes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from litchi.parallel.collectives import Counter, tree_sum
from litchi.parallel.crew import Crew
from litchi.parallel.mesh import Layout
from litchi.train.optimizer import OptimizerConfig
from tests.train.runs import CONFIG, CtrlC, sample, train

RUN = replace(CONFIG, num_accumulate=4, num_steps=6, save_every=2, optimizer=OptimizerConfig(lr=1e-2, clip=0.5))
"""Clipping, AdamW and Muon, words with pictures and actions."""


def go(folder: Path, layout: Layout, until: int = 0) -> None:
    """The run, or a part of it: it is interrupted after so many documents."""
    try:
        train(folder, replace(RUN, layout=layout), samples=CtrlC(until) if until else sample)
    except KeyboardInterrupt:
        assert until


def weights(folder: Path, step: int = 6) -> str:
    digest = hashlib.sha256()
    for name in ("model/model", "resume/weights", "resume/optimizer"):
        digest.update((folder / f"step_{step:07d}" / f"{name}.safetensors").read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("alone")
    train(folder, RUN)
    return weights(folder)


@pytest.mark.parametrize("layout", [Layout(zero=0), Layout(zero=1), Layout(zero=3), Layout(replicate=2)], ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_ends_with_the_same_bits(crew: Crew, alone: str, tmp_path: Path, layout: Layout, size: int):
    crew.run(go, tmp_path, layout, size=size)
    assert weights(tmp_path) == alone


def test_four_then_two_then_four_ranks_end_with_the_same_bits(crew: Crew, alone: str, tmp_path: Path):
    for size, until in ((4, 10), (2, 40), (4, 0)):
        crew.run(go, tmp_path, Layout(), until, size=size)
    assert weights(tmp_path) == alone


def test_sums_of_the_library_do_not_have_that(crew: Crew, alone: str, tmp_path: Path):
    """So that the tests above could fail."""
    crew.run(go, tmp_path, Layout(exact=False))
    assert weights(tmp_path) != alone


def test_a_counter_adds_as_a_tree_does():
    parts = list(torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)).unbind())
    for count in (1, 2, 4, 8):
        counter = Counter()
        for part in parts[:count]:
            counter.push([part.clone(), None])
        assert torch.equal(counter.total()[0], tree_sum(parts[:count]))
