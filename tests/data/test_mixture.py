"""One global order whatever the number of readers; every sample is dealt before any is dealt again."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litchi.config import BadInput
from litchi.data.loader import Loader, open_shelves
from litchi.data.mixture import plan_epoch
from litchi.data.run import DataConfig, run

COUNTS = {"talk": 40, "draw": 7, "act": 100}
MIXTURE = {"talk": 2.0, "draw": 1.0, "act": 1.0}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.integers(1, 60), st.integers(0, 5))
def test_the_order_is_pure_and_in_proportion(seed: int, num_samples: int, epoch: int):
    order = plan_epoch(COUNTS, MIXTURE, seed, num_samples, epoch=epoch)
    counts, mixture = dict(reversed(COUNTS.items())), dict(reversed(MIXTURE.items()))
    assert order == plan_epoch(counts, mixture, seed, num_samples, epoch=epoch)
    shares = Counter(source for source, _ in order)
    assert len(order) == num_samples
    assert all(abs(shares[source] - num_samples * weight / 4) < 1 for source, weight in MIXTURE.items())


def test_a_source_deals_all_its_samples_before_any_again():
    dealt = [i for epoch in range(14) for s, i in plan_epoch(COUNTS, MIXTURE, 3, 10, epoch=epoch) if s == "talk"]
    assert len(dealt) == 70
    assert sorted(dealt[:40]) == list(range(40)) and len(set(dealt[40:])) == 30
    draws = [i for s, i in plan_epoch(COUNTS, MIXTURE, 3, 84) if s == "draw"]
    assert Counter(draws) == dict.fromkeys(range(7), 3)


def test_seeds_and_epochs_differ():
    orders = [plan_epoch(COUNTS, MIXTURE, seed, 40, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_a_mixture_that_nothing_fills_is_refused():
    with pytest.raises(BadInput, match="'walk' weight 1.0, but samples are there of: talk"):
        plan_epoch(COUNTS, {"walk": 1.0}, 0, 10)
    with pytest.raises(BadInput, match="no weight above 0"):
        plan_epoch(COUNTS, {"talk": 0.0}, 0, 10)


@pytest.fixture(scope="module")
def shelves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    run(DataConfig(train={"talk": 9, "draw": 7}, test={}, shard_samples=4, workers=1), folder)
    return open_shelves(folder, "train")


def keys(loader: Loader, number: int) -> list[str]:
    return [sample.key for sample in islice(loader, number)]


def test_a_shelf_holds_every_sample_in_order(shelves):
    assert [sample.key for sample in shelves["talk"]] == [f"talk-train-0-{i:06d}" for i in range(9)]
    assert shelves["talk"][-1].key == shelves["talk"][8].key == shelves["talk"][8:][0].key
    with pytest.raises(IndexError):
        shelves["talk"][9]


@pytest.mark.parametrize("stop", [0, 1, 7, 8, 23])
def test_a_loader_resumes_to_the_sample(shelves, stop: int):
    mixture = {"talk": 1.0, "draw": 2.0}
    whole = keys(Loader(shelves, mixture, 5, epoch_samples=8), 40)
    loader = Loader(shelves, mixture, 5, epoch_samples=8)
    assert keys(loader, stop) == whole[:stop]
    again = Loader(shelves, mixture, 5, loader.state(), epoch_samples=8)
    assert keys(again, 40 - stop) == whole[stop:]


def test_any_number_of_readers_reads_the_same_order(shelves):
    loader = Loader(shelves, {"talk": 1.0, "draw": 1.0}, 0, epoch_samples=8)
    whole = keys(loader, 24)
    for world in (1, 2, 3, 4):
        read = {position: loader.at(position).key for rank in range(world) for position in range(rank, 24, world)}
        assert [read[position] for position in range(24)] == whole


def test_a_position_of_other_data_is_refused(shelves):
    state = Loader(shelves, {"talk": 1.0}, 0).state()
    with pytest.raises(BadInput, match="seed was 0, now 1"):
        Loader(shelves, {"talk": 1.0}, 1, state)
