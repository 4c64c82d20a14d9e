"""What is known of a pipeline before it runs: the dearest stage is as cheap as can be, and waiting as foretold."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litchi.config import BadInput
from litchi.model.network import ModelConfig
from litchi.model.vision import Tower
from litchi.parallel.mesh import Schedule
from litchi.parallel.stages import (
    SCHEDULES,
    bubble,
    check_microbatches,
    costs,
    cut,
    deal,
    idle,
    order,
    rank_of,
    timeline,
)

SMALL = ModelConfig(vocab_size=100, width=64, num_layers=8, mlp_width=256)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_no_other_cut_has_a_cheaper_dearest_stage(length: int, stages: int, before: int, after: int):
    length = max(length, stages)
    extra = [before, *[0] * (stages - 2), after][:stages]
    found = cut(length, [1] * stages, lambda stage, count: extra[stage] + count)

    def dearest(ends: tuple[int, ...]) -> int:
        starts = (0, *ends)
        return max(extra[i] + b - a for i, (a, b) in enumerate(zip(starts, (*ends, length), strict=True)))

    assert found[-1] == length
    assert dearest(tuple(found[:-1])) == min(dearest(ends) for ends in combinations(range(1, length), stages - 1))


@given(st.integers(4, 40), st.sampled_from([2, 4, 8]))
@settings(max_examples=40, deadline=None)
def test_every_layer_is_dealt_once_and_in_order(layers: int, stages: int):
    config = replace(SMALL, num_layers=max(layers, stages))
    dealt = deal(config, stages)
    assert [index for layers in dealt for index in layers] == list(range(config.num_layers))


def test_layers_alike_are_dealt_evenly():
    assert [len(layers) for layers in deal(SMALL, 4)] == [2, 2, 2, 2]


def test_a_tower_takes_layers_off_the_first_stage_and_may_fill_it():
    def first(width: int) -> int:
        return len(deal(replace(SMALL, modalities={"vision": Tower(48, width=width)}), 4)[0])

    assert [first(32), first(96), first(256)] == [2, 1, 0]


def test_a_wide_vocabulary_takes_layers_off_the_last_stage():
    assert [len(layers) for layers in deal(replace(SMALL, vocab_size=2000), 4)] == [2, 2, 3, 1]
    assert costs(SMALL, 0.5)[2] == 100 * 64


def test_layers_that_read_deep_rows_stay_in_the_first_stage():
    tower = {"vision": Tower(48, width=256, num_layers=8, deep=(1, 3, 5))}
    assert deal(replace(SMALL, modalities=tower), 4)[0] == range(3)
    with pytest.raises(BadInput, match="the first 3 layers read deep rows of a tower and must stay together"):
        deal(replace(SMALL, num_layers=4, modalities=tower), 4)


@pytest.mark.parametrize(
    ("schedule", "ranks", "count", "readers", "said"),
    [
        ("1f1b", 4, 3, 2, "num_accumulate=6 is too few for the schedule 1f1b over 4 ranks: set it to 8 or more"),
        ("dualpipev", 2, 3, 1, "num_accumulate=3 is too few for the schedule dualpipev over 2 ranks: set it to 4"),
        ("zero_bubble", 2, 5, 3, "num_accumulate=15 is not a whole number of rounds .*: set it to 18"),
    ],
)
def test_a_number_of_microbatches_that_does_not_suit_is_refused(
    schedule: Schedule, ranks: int, count: int, readers: int, said: str
):
    with pytest.raises(BadInput, match=said):
        check_microbatches(schedule, ranks, count, readers)


def test_a_v_brings_the_last_stage_to_the_first_rank():
    assert [rank_of(stage, "zbv", 4) for stage in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert [rank_of(stage, "loop", 4) for stage in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bubble_is_what_a_timeline_of_the_schedule_shows(schedule: Schedule):
    for ranks in (2, 3, 4, 8):
        for count in range(1, 4 * ranks + 1):
            try:
                check_microbatches(schedule, ranks, count, 1)
            except BadInput:
                continue
            rows = timeline(order(schedule, ranks, count), lambda action: 2.0 if action.work == "backward" else 1.0)
            span = max(row[-1].stop for row in rows)
            shown = sum(idle(row, 0.0, span) for row in rows) / ranks
            assert bubble(schedule, ranks, count) == pytest.approx(shown)


def test_what_is_refused_torch_refuses_too():
    for schedule in SCHEDULES:
        for ranks in (2, 3):
            for count in range(1, 10):
                try:
                    check_microbatches(schedule, ranks, count, 1)
                except BadInput:
                    if schedule != "1f1b":  # whose order is our own
                        with pytest.raises(ValueError, match="microbatches"):
                            order(schedule, ranks, count)
                else:
                    order(schedule, ranks, count)


def test_one_rank_never_waits_and_more_microbatches_wait_less():
    assert bubble("1f1b", 1, 4) == 0
    assert bubble("1f1b", 4, 8) > bubble("1f1b", 4, 16) > bubble("interleaved", 4, 16) > bubble("zbv", 4, 16) > 0
