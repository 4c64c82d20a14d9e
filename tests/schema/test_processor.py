"""Samples become sequences: who speaks, what is learned, and where a noised copy stands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litchi.config import BadInput
from litchi.schema.arrays import IGNORE
from litchi.schema.processor import Builder, Continuous, Noising, Processor, action_token, draw_time, grid_places
from litchi.schema.sample import Action, Image, Role, Sample, Text
from litchi.schema.sequence import COLUMNS, Modality, TokenSequence
from litchi.schema.tokenizer import END, PATCH, PICTURE
from tests.laws.documents import part, processor, samples

laws = settings(max_examples=40, deadline=None, derandomize=True)
P = processor()
PIXELS = np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3)


def encode(*parts: Text | Image | Action, seed: int = 0) -> TokenSequence:
    return P.encode(Sample(parts, "a", "b"), np.random.default_rng(seed))


def shown(ids: list[int]) -> list[str]:
    """Tokens as they are written, spaces as the byte-level alphabet has them."""
    return [P.tokenizer.backend.id_to_token(i) for i in ids]


CHAT = (
    Text(text="be brief", role=Role.SYSTEM),
    Text(text="where", role=Role.USER),
    Text(text="is it", role=Role.USER),
    Text(text="red", role=Role.ASSISTANT, weight=1.0),
    Text(text="two", role=Role.TOOL),
    Text(text="blue", role=Role.ASSISTANT, weight=0.5),
)


def words(text: str) -> list[str]:
    return shown(P.tokenizer.encode(text))


def test_a_conversation_is_rendered_turn_by_turn() -> None:
    """Neighbouring parts of one role are one turn."""
    assert shown(encode(*CHAT).tokens.tolist()) == [
        *("<|system|>", *words("be brief"), END),
        *("<|user|>", *words("where"), *words("is it"), END),
        *("<|assistant|>", *words("red"), END),
        *("<|tool|>", *words("two"), END),
        *("<|assistant|>", *words("blue"), END),
    ]


def test_the_ids_of_a_conversation_stay_what_they_are() -> None:
    """Golden: control tokens come first, in this order; a checkpoint is worth nothing once they move."""
    control = ("<|pad|>", END, PICTURE, PATCH, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|world|>")
    assert [P.tokenizer.control(name) for name in control] == list(range(9))
    assert [P.tokenizer.control(action_token("grid", i)) for i in range(3)] == [9, 10, 11]
    found = encode(Text(text="red", role=Role.USER), Text(text="blue", role=Role.ASSISTANT, weight=1.0))
    assert found.tokens.tolist() == [5, *P.tokenizer.encode("red"), 1, 6, *P.tokenizer.encode("blue"), 1]
    assert P.tokenizer.encode("!") == [12], "then bytes, in the order of the alphabet"


def test_only_what_the_assistant_says_and_its_end_are_learned() -> None:
    sequence = encode(*CHAT)
    learned = [(i, w) for i, w in zip(sequence.labels.tolist(), sequence.weights.tolist(), strict=True) if i != IGNORE]
    assert shown([i for i, _ in learned]) == [*words("red"), END, *words("blue"), END]
    assert [w for _, w in learned] == [1.0] * (len(words("red")) + 1) + [0.5] * (len(words("blue")) + 1)


@laws
@given(samples())
def test_a_label_is_the_next_token_and_stands_only_where_something_is_learned(sample: Sample) -> None:
    sequence = P.encode(sample, np.random.default_rng(0))
    learned = (sequence.labels != IGNORE).nonzero()[:, 0]
    assert torch.equal(sequence.labels != IGNORE, sequence.weights > 0)
    clean = sequence.readable.nonzero()[:, 0].tolist()
    following = dict(zip(clean, clean[1:], strict=False))
    for i in learned.tolist():
        skipped = sequence.readable[i + 1 : following[i]]
        assert not bool(skipped.any()) and int(sequence.labels[i]) == int(sequence.tokens[following[i]])


@laws
@given(samples())
def test_spans_never_decrease_and_positions_of_text_are_equal_on_all_axes(sample: Sample) -> None:
    sequence = P.encode(sample, np.random.default_rng(0))
    assert bool((sequence.spans.diff() >= 0).all())
    rows = torch.cat([v.index for v in sequence.vectors.values()]) if sequence.vectors else torch.empty(0).long()
    text = torch.ones(len(sequence), dtype=torch.bool)
    text[rows] = False
    t = sequence.positions[text]
    assert bool((t == t[:, :1]).all()) and bool((t[:, 0].diff() > 0).all())
    assert bool((sequence.tokens[rows] == P.tokenizer.patch).all())
    assert sorted(rows.tolist()) == (sequence.tokens == P.tokenizer.patch).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("role", [Role.NONE, Role.ASSISTANT])
def test_a_picture_to_learn_is_a_noised_copy_and_then_a_clean_one_at_the_same_positions(role: Role) -> None:
    picture = Image(pixels=PIXELS, role=role, weight=2.0)
    sequence = encode(picture, Text(text="red", role=role))
    v = sequence.vectors[Modality.IMAGE]
    noised, clean = v.index[:2], v.index[2:]
    assert torch.equal(clean, noised + 2), "the clean copy comes next"
    assert torch.equal(sequence.positions[noised], sequence.positions[clean])
    assert sequence.readable[noised].tolist() == [False] * 2 and sequence.readable[clean].tolist() == [True] * 2
    assert torch.equal(v.value[:2], v.value[2:]), "corruption is the objective's business"
    assert v.weight.tolist() == [2.0, 2.0, 0.0, 0.0] and v.time[2:].tolist() == [1.0, 1.0]
    assert bool((v.time[:2] < 1).all())
    assert len({int(s) for s in sequence.spans[v.index]}) == 2


def test_a_picture_at_the_very_end_has_no_clean_copy_because_nothing_would_read_it() -> None:
    sequence = encode(Text(text="red"), Image(pixels=PIXELS, weight=1.0))
    assert sequence.vectors[Modality.IMAGE].weight.tolist() == [1.0, 1.0]
    assert encode(Text(text="red"), Image(pixels=PIXELS)).vectors[Modality.IMAGE].weight.tolist() == [0.0, 0.0]


def test_the_opening_of_a_picture_is_learned_where_the_assistant_chooses_to_draw() -> None:
    drawn = encode(Text(text="draw", role=Role.USER), Image(pixels=PIXELS, role=Role.ASSISTANT, weight=1.0))
    foreseen = encode(Text(text="go"), Image(pixels=PIXELS, weight=1.0))
    assert P.tokenizer.picture in drawn.labels.tolist() and P.tokenizer.picture not in foreseen.labels.tolist()


def test_an_action_is_learned_where_it_is_chosen() -> None:
    """Its label stands on the last token of the clean frame before it."""
    sequence = encode(Image(pixels=PIXELS, weight=1.0), Action.discrete(2, "grid", weight=1.0))
    last = int(sequence.vectors[Modality.IMAGE].index[-1])
    assert int(sequence.labels[last]) == P.action_id("grid", 2) == int(sequence.tokens[last + 1])
    assert bool(sequence.readable[last])


@laws
@given(st.lists(samples(), min_size=1, max_size=1), st.integers(0, 99))
def test_an_encoding_follows_from_its_sample_and_its_randomness(drawn: list[Sample], seed: int) -> None:
    a, b = (P.encode(drawn[0], np.random.default_rng(seed)) for _ in range(2))
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)
    assert all(torch.equal(v.time, b.vectors[m].time) for m, v in a.vectors.items())


@laws
@given(st.floats(0, 1), st.integers(0, 99))
def test_the_share_of_blank_copies_is_what_the_noising_says(blank: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    times = [draw_time(rng, blank) for _ in range(400)]
    assert all(0 <= t < 1 for t in times)
    # five standard deviations of a share of 400 draws
    assert times.count(0.0) / 400 == pytest.approx(blank, abs=5 * (blank * (1 - blank) / 400) ** 0.5 + 1e-9)


@pytest.mark.parametrize("late", [0.0, 0.5, 1.0])
def test_a_picture_weighs_more_the_less_of_it_is_hidden(late: float) -> None:
    """With late=1 the expected weight of a picture, hidden share times weight, is the same at every time."""
    keen = Processor(P.tokenizer, P.codec, P.spaces, Noising(blank_pictures=0.0, late=late))
    picture = Sample((part("draw", np.random.default_rng(0)),), key="picture", source="test")
    asked = float(picture.parts[0].weight)
    for seed in range(20):
        drawn = keen.encode(picture, np.random.default_rng(seed)).vectors[Modality.IMAGE]
        noised = drawn.weight > 0
        time = float(drawn.time[noised][0])
        if time < 0.95:
            assert drawn.weight[noised].tolist() == pytest.approx([asked / (1 - time) ** late] * int(noised.sum()))
        assert float(drawn.weight.max()) <= asked * 20**late * (1 + 1e-6)


@laws
@given(samples(), st.integers(0, 99))
def test_what_a_server_reads_is_clean_and_supervises_nothing(sample: Sample, seed: int) -> None:
    read = P.prompt(sample.parts).build()
    assert bool((read.labels == IGNORE).all()) and bool(read.readable.all())
    assert all(bool((v.time == 1).all()) and not bool(v.weight.any()) for v in read.vectors.values())


def test_an_answer_begun_is_left_open_and_every_other_turn_is_closed() -> None:
    begun = P.prompt((Text(text="where", role=Role.USER), Text(text="left", role=Role.ASSISTANT))).build()
    asked = P.prompt((Text(text="where", role=Role.USER),)).build()
    assert shown(begun.tokens.tolist())[-1] == words("left")[-1]
    assert shown(asked.tokens.tolist())[-1] == END


# ---- builder ------------------------------------------------------------------------------------------------------


def grow(builder: Builder) -> None:
    builder.token(3, 1.0)
    builder.vectors(Modality.IMAGE, torch.ones(2, 4), torch.ones(2), 0.0, [(0, 0), (0, 1)], 9)
    builder.vectors(Modality.ACTION, torch.ones(1, 3), torch.ones(1), 0.0, [(0, 0)], 9)
    builder.time += 1


@laws
@given(samples())
def test_a_fork_grows_without_the_original(sample: Sample) -> None:
    builder = P.prompt(sample.parts)
    before, fork = builder.build(), builder.fork()
    grow(fork)
    after = builder.build()
    assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in COLUMNS)
    assert {m: len(v.index) for m, v in after.vectors.items()} == {m: len(v.index) for m, v in before.vectors.items()}
    grow(builder)
    assert torch.equal(builder.build().tokens, fork.build().tokens)
    assert torch.equal(builder.build().positions, fork.build().positions)


@laws
@given(st.integers(1, 6), st.integers(1, 6))
def test_places_are_counted_from_the_middle_in_reading_order(rows: int, columns: int) -> None:
    places = grid_places(rows, columns)
    assert places == sorted(places) and len(set(places)) == rows * columns
    assert (0, 0) in places and places[0] == (-(rows // 2), -(columns // 2))


# ---- actions and words --------------------------------------------------------------------------------------------

ARM = Continuous(mean=(0.5, -3.0), deviation=(0.1, 20.0), channels=4, chunk=2)
numbers = st.floats(-1e3, 1e3, width=32)


@laws
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4))
def test_continuous_actions_come_back(values: list[tuple[float, float]]) -> None:
    given_ = np.array(values, np.float32)
    rows = ARM.normalise(given_)
    assert rows.shape == (len(values), 4) and not bool(rows[:, 2:].any())
    # one rounding to fp32 on the way in and one on the way out, of numbers up to 1e3 with deviations from 0.1
    np.testing.assert_allclose(ARM.restore(rows), given_, rtol=1e-5, atol=1e-3)


def test_actions_are_measured_in_deviations_from_the_mean() -> None:
    rows = ARM.normalise(np.array([[0.5, -3.0], [0.6, 17.0]], np.float32))
    np.testing.assert_allclose(rows[:, :2].numpy(), [[0, 0], [1, 1]], atol=1e-5)


@laws
@given(st.text(max_size=40))
def test_any_text_comes_back(text: str) -> None:
    ids = P.tokenizer.encode(text)
    assert P.tokenizer.decode(ids) == text
    assert not set(ids) & P.controls, "typed text is never a control token"


@pytest.mark.parametrize("name", [END, PICTURE, PATCH, "<|assistant|>", "<|grid:1|>"])
def test_a_control_token_that_is_typed_stays_text(name: str) -> None:
    sequence = encode(Text(text=f"red{name}blue", role=Role.ASSISTANT, weight=1.0))
    text = [i for i in sequence.tokens.tolist() if i not in P.controls]
    assert P.tokenizer.decode(text) == f"red{name}blue"


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_an_unknown_space_names_those_that_are_known() -> None:
    with pytest.raises(BadInput, match="unknown action space 'leg'; this processor knows: grid, arm"):
        encode(Action.discrete(0, "leg"))


def test_continuous_actions_have_no_tokens() -> None:
    with pytest.raises(BadInput, match="the actions of 'arm' are continuous"):
        P.action_ids("arm")


def test_a_picture_without_a_codec_is_refused() -> None:
    bare = Processor(P.tokenizer, None, {}, Noising())
    with pytest.raises(BadInput, match="has no codec"):
        bare.prompt((Image(pixels=PIXELS),))


def test_weights_do_not_change_what_is_read() -> None:
    parts = (Text(text="red", role=Role.ASSISTANT, weight=1.0), Image(pixels=PIXELS, role=Role.ASSISTANT))
    silent = tuple(replace(part, weight=0.0) for part in parts)
    assert torch.equal(encode(*parts).tokens, encode(*silent).tokens)
