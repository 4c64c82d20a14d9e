"""What is drawn follows the scores: tokens as a slow reference says, digits all within their steps."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litchi.model.sampling import CERTAIN, Past, adjust, euler, reveal, sample_token, score, truncate
from litchi.schema.arrays import MASK
from litchi.schema.request import SamplingParams
from litchi.schema.spelling import Spellings

laws = settings(max_examples=50, deadline=None, derandomize=True)
scores = st.lists(st.integers(-40, 40), min_size=1, max_size=12).map(lambda xs: [x / 8 for x in xs])


MIN_P = st.sampled_from([0.0, 0.07, 0.61])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_shares(values: list[float], params: SamplingParams) -> list[float]:
    """Probabilities by the book: heat, sort, keep the best few, keep the best mass, share what is left."""
    heated = [math.exp(v / params.temperature) for v in values]
    least = params.min_p * max(heated) / sum(heated)
    share = [h / sum(heated) for h in heated]
    kept, mass = [], 0.0
    for index in sorted(range(len(values)), key=lambda i: (-share[i], i)):
        if mass >= params.top_p or (params.top_k and len(kept) == params.top_k) or share[index] < least:
            break
        kept.append(index)
        mass += share[index]
    return [share[i] / mass if i in kept else 0.0 for i in range(len(values))]


@laws
@given(scores, st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0.05, 0.5, 0.83, 1.0]), st.integers(0, 5), MIN_P)
def test_truncation_is_what_the_slow_reference_says(
    values, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    heated = torch.tensor(values).log_softmax(-1) / temperature
    found = truncate(heated, params)
    expected = torch.tensor(slow_shares(values, params))
    best = heated.softmax(-1).sort(descending=True).values.cumsum(-1)
    if bool(((best - top_p).abs() < 1e-5).any()):
        return  # whether mass has reached top_p is then a question of rounding
    shares = heated.softmax(-1)
    if bool(((shares - min_p * shares.max()).abs() < 1e-6).any()) and 0 < min_p < 1:
        return  # and here whether a share has reached min_p
    torch.testing.assert_close(found / found.sum(), expected, rtol=1e-4, atol=1e-6)


def test_tokens_are_drawn_as_often_as_their_shares_say() -> None:
    values, params = [1.0, 0.0, 2.0, -1.0], SamplingParams(temperature=0.7, top_k=3)
    rng = generator()
    drawn = [sample_token(torch.tensor(values), params, rng)[0] for _ in range(4000)]
    for index, share in enumerate(slow_shares(values, params)):
        # four standard deviations of a share of 4000 draws
        assert drawn.count(index) / 4000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))


@laws
@given(scores, st.integers(0, 3))
def test_greedy_takes_the_first_of_the_best_and_needs_no_randomness(values, top_k: int) -> None:
    rng = generator()
    before = rng.get_state()
    index, _ = sample_token(torch.tensor(values), SamplingParams(temperature=0.0, top_k=top_k), rng)
    assert index == values.index(max(values)) and torch.equal(rng.get_state(), before)


@laws
@given(scores, st.sampled_from([0.0, 0.5, 2.0]))
def test_the_logprob_is_that_of_the_unchanged_scores(values, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.9)
    index, logprob = sample_token(torch.tensor(values), params, generator())
    total = math.log(sum(math.exp(v) for v in values))
    assert logprob == pytest.approx(values[index] - total, abs=1e-4)


@laws
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.sampled_from([0.0, 1.0]), st.integers(0, 99))
def test_every_digit_is_shown_within_its_steps_and_stays(n: int, c: int, steps: int, heat: float, seed: int) -> None:
    rng = generator(seed)
    value = torch.full((n, c), MASK)
    for step in range(steps):
        shown = value != MASK
        scores_NCL = 3 * torch.randn(n, c, 5, generator=rng)
        params = SamplingParams(temperature=heat)
        after = reveal(value, scores_NCL, steps_left=steps - step, params=params, generator=rng)
        assert torch.equal(after[shown], value[shown]), "a shown digit never changes"
        assert bool((after[after != MASK] % 1 == 0).all()) and float(after.max()) < 5
        value = after
    assert not bool((value == MASK).any())


@laws
@given(st.integers(0, 99), st.sampled_from([0.0, 1.0, 5.0]))
def test_certain_digits_come_first_and_as_what_they_are(seed: int, heat: float) -> None:
    draw = random.Random(seed)
    certain = [i for i in range(12) if draw.random() < 0.4]
    scores_NCL = torch.zeros(3, 4, 5)
    for i in certain:
        scores_NCL[i // 4, i % 4, i % 5] = 20.0
    assert bool((scores_NCL.softmax(-1).amax(-1).flatten()[certain] >= CERTAIN).all())
    hidden = torch.full((3, 4), MASK)
    params = SamplingParams(temperature=heat)
    shown = reveal(hidden, scores_NCL, steps_left=4, params=params, generator=generator(seed)).flatten()
    assert [int(shown[i]) for i in certain] == [i % 5 for i in certain]
    assert int((shown != MASK).sum()) == len(certain) + math.ceil((12 - len(certain)) / 4)


def test_digits_outside_the_nucleus_are_never_shown() -> None:
    scores_NCL = torch.tensor([0.6, 0.3, 0.1]).log().expand(4, 4, 3)
    params = SamplingParams(temperature=1.0, top_p=0.85)
    drawn = [
        reveal(torch.full((4, 4), MASK), scores_NCL, steps_left=1, params=params, generator=generator(seed))
        for seed in range(20)
    ]
    assert set(torch.stack(drawn).flatten().tolist()) == {0.0, 1.0}


def test_what_is_shown_by_chance_is_anywhere() -> None:
    found = set()
    for seed in range(40):
        hidden, level = torch.full((2, 2), MASK), torch.zeros(2, 2, 3)
        shown = reveal(hidden, level, steps_left=4, params=SamplingParams(), generator=generator(seed))
        found.add(int((shown != MASK).flatten().nonzero()[0, 0]))
    assert found == {0, 1, 2, 3}


@laws
@given(st.integers(1, 20))
def test_a_flow_that_knows_the_answer_arrives_at_it(steps: int) -> None:
    clean, value = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.3, 0.4]])
    for step in range(steps):
        value = euler(value, clean, step / steps, 1 / steps)
    torch.testing.assert_close(value, clean)


# ---- penalties and bias -------------------------------------------------------------------------------------------


@laws
@given(
    scores,
    st.lists(st.integers(0, 11), max_size=6),
    st.lists(st.integers(0, 11), max_size=6),
    st.sampled_from([(1.0, 0.0, 0.0), (1.5, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, -0.4), (0.5, 0.3, 0.2)]),
    st.sampled_from([(), ((0, 5.0),), ((0, -100.0),)]),
)
def test_penalties_are_what_the_slow_reference_says(values, read, said, penalties, bias) -> None:
    repetition, frequency, presence = penalties
    read, said = ([i for i in ids if i < len(values)] for ids in (read, said))
    params = SamplingParams(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias
    )
    past = Past.of(read, len(values))
    for index in said:
        past.say(index)
    expected = []
    for index, value in enumerate(values):
        if index in {*read, *said}:
            value = value / repetition if value > 0 else value * repetition
        value -= frequency * said.count(index) + presence * (index in said)
        expected.append(value + dict(bias).get(index, 0.0))
    given_V = torch.tensor(values)
    torch.testing.assert_close(adjust(given_V, params, past), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert given_V.tolist() == torch.tensor(values).tolist(), "the scores themselves stay as they are"


class Plain(Spellings):
    """Ids spelled by their numbers."""

    def __init__(self) -> None:
        self.known = {index: str(index).encode() for index in range(12)}


@laws
@given(scores, st.integers(0, 4), st.data())
def test_scored_tokens_are_ranked_among_all(values, count: int, data) -> None:
    index = data.draw(st.integers(0, len(values) - 1))
    [found] = score(torch.tensor([values]), [index], count, Plain())
    total = math.log(sum(map(math.exp, values)))
    assert found.logprob == pytest.approx(values[index] - total, abs=1e-4) and found.spelling == str(index).encode()
    assert found.rank == 1 + sum(value > values[index] for value in values)
    assert [each.rank for each in found.top] == list(range(1, min(count, len(values)) + 1))
    best = sorted(values, reverse=True)
    for each, value in zip(found.top, best, strict=False):
        assert each.logprob == pytest.approx(value - total, abs=1e-4) and values[each.token] == value
