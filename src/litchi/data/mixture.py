"""A mixture becomes one global order of samples; how many processes read it, and who reads what, is left to others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from litchi.config import BadInput


def plan_epoch(
    counts: Mapping[str, int], mixture: Mapping[str, float], seed: int, num_samples: int, *, epoch: int = 0
) -> list[tuple[str, int]]:
    """(source, index) of `num_samples` samples: pure, so that any position of any epoch can be found again.

    Each epoch holds the same number of each source, in proportion to its weight. A source deals all its samples in a
    random order before it deals any of them again, across epochs. Raises BadInput for weights that nothing can fill.
    """
    shares = quotas(counts, mixture, num_samples)
    order = [pair for source, share in shares.items() for pair in deal(source, counts[source], share, seed, epoch)]
    shuffle = generator(seed, "order", epoch).permutation(len(order))
    return [order[i] for i in shuffle]


def quotas(counts: Mapping[str, int], mixture: Mapping[str, float], num_samples: int) -> dict[str, int]:
    """How many samples of each source; the largest remainders get what rounding leaves."""
    for source, weight in mixture.items():
        if weight < 0 or (weight > 0 and not counts.get(source)):
            have = ", ".join(s for s, n in counts.items() if n) or "none"
            raise BadInput(f"the mixture gives {source!r} weight {weight}, but samples are there of: {have}")
    total = sum(mixture.values())
    if total <= 0:
        raise BadInput("the mixture has no weight above 0: name at least one source")
    exact = {source: num_samples * weight / total for source, weight in sorted(mixture.items()) if weight > 0}
    shares = {source: int(number) for source, number in exact.items()}
    by_remainder = sorted(exact, key=lambda source: shares[source] - exact[source])
    for source in by_remainder[: num_samples - sum(shares.values())]:
        shares[source] += 1
    return shares


def deal(source: str, count: int, share: int, seed: int, epoch: int) -> list[tuple[str, int]]:
    """The next `share` samples of a source, as if all epochs dealt from one endless row of shuffled decks."""
    dealt: list[tuple[str, int]] = []
    position = epoch * share
    while len(dealt) < share:
        deck, place = divmod(position + len(dealt), count)
        cards = generator(seed, source, deck).permutation(count)[place : place + share - len(dealt)]
        dealt += [(source, int(card)) for card in cards]
    return dealt


def generator(seed: int, name: str, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, number, *name.encode()])
