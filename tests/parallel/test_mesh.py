"""Axes: every rank has a place, neighbours are nearest along the last axis, and what does not fit is named."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from litchi.config import BadInput
from litchi.parallel.crew import Crew
from litchi.parallel.mesh import DATA, SHARD, Layout, join, resolve


def where(layout: Layout) -> tuple[int, int, int, list[int]]:
    world = join(layout, torch.device("cpu"))
    group = world.group("tensor")
    return world.rank, world.index(*DATA), world.index(*SHARD), dist.get_process_group_ranks(group) if group else []


def test_ranks_of_tensor_parallelism_are_neighbours(crew: Crew):
    places = crew.run(where, Layout(tensor=2))
    assert places == [(0, 0, 0, [0, 1]), (1, 0, 0, [0, 1]), (2, 1, 1, [2, 3]), (3, 1, 1, [2, 3])]


def test_fewer_ranks_form_a_world_of_their_own(crew: Crew):
    assert [place[1] for place in crew.run(where, Layout(), size=2)] == [0, 1]


def broken(_: Layout) -> None:
    world = join(Layout(), torch.device("cpu"))
    if world.rank == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()


def test_a_failure_of_one_rank_is_told_and_does_not_hang(crew: Crew):
    with pytest.raises(RuntimeError, match="rank 1 has had enough"):
        crew.run(broken, Layout())
    assert len(crew.run(where, Layout())) == 4


@pytest.mark.parametrize(
    ("layout", "size", "said"),
    [
        (Layout(tensor=3), 4, "start a multiple of 3"),
        (Layout(replicate=3), 4, "lower one of them"),
        (Layout(data=4, tensor=2), 4, "set train.layout.data=0"),
        (Layout(pipeline=0), 4, "train.layout.pipeline=0"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout: Layout, size: int, said: str):
    with pytest.raises(BadInput, match=said):
        resolve(layout, size)
