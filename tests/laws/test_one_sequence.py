"""The laws of the one sequence: packing, caching, masking and corruption change nothing that they should not."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litchi.model.attention import attend_dense, dense_mask, flex_attend, visible
from litchi.model.cache import Columns, KVCache
from litchi.model.objective import corrupt, loss_of, objective
from litchi.schema.arrays import IGNORE
from litchi.schema.sample import Action, Image, Role, Sample, Text, Video
from litchi.schema.sequence import COLUMNS, Modality, TokenSequence, pack, pack_rows, split, window
from tests.laws.documents import model, processor, samples

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""fp32 sums in another order; the models are two layers of width 32."""

MASKED, FLOWING, SEEING, FILMING = processor(), processor(flow=True), processor(tower=True), processor(film=True)
MODELS = {
    "mask": (MASKED, model(MASKED)),
    "flow": (FLOWING, model(FLOWING, flow=True)),
    "tower": (SEEING, model(SEEING)),
    "film": (FILMING, model(FILMING)),
    "two experts": (MASKED, model(MASKED, experts=2)),
}
laws = settings(max_examples=20, deadline=None, derandomize=True)
kinds = st.sampled_from(sorted(MODELS))


def encode(kind: str, sample: Sample, seed: int = 0) -> TokenSequence:
    return MODELS[kind][0].encode(sample, np.random.default_rng(seed))


def span_ends(s: TokenSequence) -> list[int]:
    """Where a document may be cut: after the last token of a span."""
    return [i + 1 for i in range(len(s)) if i + 1 == len(s) or s.spans[i + 1] != s.spans[i]]


@laws
@given(kinds, st.lists(samples(), min_size=1, max_size=4))
def test_packing_is_invisible(kind: str, documents: list[Sample]) -> None:
    net = MODELS[kind][1]
    sequences = [encode(kind, s) for s in documents]
    with torch.no_grad():
        apart = torch.cat([net(pack([s])) for s in sequences])
        torch.testing.assert_close(net(pack(sequences)), apart, **CLOSE)
        row = max(len(s) for s in sequences) + 3
        batch = pack_rows([[s] for s in sequences], row, MASKED.tokenizer.pad)
        real = torch.cat([torch.arange(len(s)) + i * row for i, s in enumerate(sequences)])
        torch.testing.assert_close(net(batch)[real], apart, **CLOSE)


@laws
@given(kinds, st.lists(samples(), min_size=1, max_size=4))
def test_split_undoes_pack(kind: str, documents: list[Sample]) -> None:
    sequences = [encode(kind, s) for s in documents]
    for before, after in zip(sequences, split(pack(sequences)), strict=True):
        assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in COLUMNS)
        assert {m: v.index.tolist() for m, v in before.vectors.items()} == {
            m: v.index.tolist() for m, v in after.vectors.items()
        }
        assert all(torch.equal(v.value, after.vectors[m].value) for m, v in before.vectors.items())


@laws
@given(kinds, samples(), st.integers(0, 99))
def test_cached_equals_full(kind: str, sample: Sample, seed: int) -> None:
    net, sequence = MODELS[kind][1], encode(kind, sample)
    ends = span_ends(sequence)
    cuts = sorted({*random.Random(seed).sample(ends, k=min(3, len(ends))), len(sequence)})
    cache, pieces = KVCache.empty(2), []
    with torch.no_grad():
        for a, b in zip([0, *cuts], cuts, strict=False):
            pieces.append(net(pack([window(sequence, a, b)]), cache))
        torch.testing.assert_close(torch.cat(pieces), net(pack([sequence])), **CLOSE)


@laws
@given(kinds, st.lists(samples(), min_size=2, max_size=4), st.integers(0, 99))
def test_losses_add_up(kind: str, documents: list[Sample], seed: int) -> None:
    """Sums over a packed batch are the sums over its documents, whatever the corruption."""
    net = MODELS[kind][1]
    whole = pack([encode(kind, s) for s in documents])
    corrupted = corrupt(net, whole, torch.Generator().manual_seed(seed))
    together = loss_of(net, whole, corrupted)
    bounds = whole.cu_seqlens.tolist()
    pieces = [
        loss_of(net, pack([window(whole, a, b)]), pack([window(corrupted, a, b)]))
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    summed = pieces[0]
    for piece in pieces[1:]:
        summed = summed + piece
    for modality, total in together.total.items():
        torch.testing.assert_close(total, summed.total[modality], rtol=1e-4, atol=1e-3)
        assert float(together.weight[modality]) == pytest.approx(float(summed.weight[modality]))


@laws
@given(kinds, samples())
def test_teacher_forcing_is_the_served_context(kind: str, sample: Sample) -> None:
    """With noised copies in between, every clean position reads exactly what a server's context would hold."""
    p, net = MODELS[kind]
    training = p.encode(sample, np.random.default_rng(0))
    served = p.prompt([*sample.parts, Text(text="x", role=Role.TOOL)]).build()
    clean = training.readable.nonzero()[:, 0]
    count = len(clean)
    with torch.no_grad():
        noised = net(corrupt(net, pack([training]), torch.Generator().manual_seed(1)))[clean]
        plain = net(pack([served]))[:count]
    assert torch.equal(training.tokens[clean], served.tokens[:count])
    torch.testing.assert_close(noised, plain, **CLOSE)


@laws
@given(kinds, samples())
def test_every_label_is_read_from_what_serving_reads(kind: str, sample: Sample) -> None:
    """No label stands on a noised copy: the next token is always predicted from a clean context."""
    sequence = encode(kind, sample)
    assert bool(sequence.readable[sequence.labels != IGNORE].all())


@laws
@given(kinds, samples())
def test_decode_undoes_encode(kind: str, sample: Sample) -> None:
    """Parts come back in order: text and actions as they were, pictures as the codec gives them back."""
    p = MODELS[kind][0]
    found = p.decode(p.encode(sample, np.random.default_rng(0)))
    expected = flat(sample.parts)
    assert [type(x) for x in found] == [type(x) for x in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.role is b.role
        match a, b:
            case Text(), Text():
                assert a.text == b.text
            case Image(), Image():
                _, codec = p.codec_for(frame=b.role is Role.NONE, shown=b.role is Role.USER)
                assert np.array_equal(a.pixels, codec.decode(codec.encode(b.pixels), *b.pixels.shape[:2]))
            case Action(), Action():
                assert a.space == b.space
                np.testing.assert_allclose(a.values, b.values, atol=1e-5)


def flat(parts: tuple) -> list:
    """Videos as frames, neighbouring texts of one role as one."""
    out: list = []
    for part in parts:
        if isinstance(part, Video):
            out += [Image(pixels=frame, role=part.role) for frame in part.frames]
        elif isinstance(part, Text) and out and isinstance(out[-1], Text) and out[-1].role is part.role:
            out[-1] = Text(text=out[-1].text + part.text, role=part.role)
        else:
            out.append(part)
    return out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # on a CPU it is only a check
@laws
@given(samples(), samples())
def test_the_forms_of_the_rule_agree(first: Sample, second: Sample) -> None:
    batch = pack([encode("mask", first), encode("mask", second)])
    T, H, G, K = len(batch), 4, 2, 8
    q, k, v = torch.randn(T, H, K), torch.randn(T, G, K), torch.randn(T, G, K)
    columns = Columns.of(batch)
    dense = attend_dense(q, k, v, mask_TM=dense_mask(columns, columns))
    torch.testing.assert_close(flex_attend(columns, columns)(q, k, v), dense, **CLOSE)
    row = T + 2
    laid = pack_rows([[s] for s in split(batch)], row, 0)
    mask = dense_mask(Columns.of(laid), Columns.of(laid))
    blocks = [mask[i : i + row, i : i + row].sum() for i in range(0, len(laid), row)]
    assert int(mask.sum()) == int(sum(blocks))  # nothing is visible across rows


def test_text_alone_is_causal() -> None:
    sequence = encode("mask", Sample((Text(text="the red ball is left of a blue key"),), "a", "b"))
    i, doc = torch.arange(len(sequence)), torch.zeros(1)
    seen = visible(doc, doc, sequence.spans[:, None], sequence.spans[None], sequence.readable[None])
    assert torch.equal(seen, i[:, None] >= i[None])


def test_a_picture_reads_all_of_itself_and_the_past_none_of_it() -> None:
    net = MODELS["flow"][1]
    pixels = np.zeros((8, 8, 3), np.uint8)
    sequence = encode("flow", Sample((Text(text="red"), Image(pixels=pixels), Text(text="ball")), "a", "b"))
    v = sequence.vectors[Modality.IMAGE]
    value = v.value.clone().requires_grad_()
    x_TD = net(pack([replace(sequence, vectors={Modality.IMAGE: replace(v, value=value)})]))
    first = int(v.index[0])
    inside = torch.autograd.grad(x_TD[first].sum(), value, retain_graph=True)[0]
    before = torch.autograd.grad(x_TD[first - 1].sum(), value)[0]
    assert float(inside[-1].abs().sum()) > 0 and float(before.abs().sum()) == 0


def test_an_action_shifted_by_one_step_is_caught() -> None:
    """A frame's noised copy reads the action that led to it, and not the one that follows."""
    net = MODELS["mask"][1]
    frames = [Image(pixels=np.full((8, 8, 3), 40 * i, np.uint8), weight=float(i > 0)) for i in range(3)]

    def hidden(actions: list[int]) -> torch.Tensor:
        moves = [Action.discrete(a, "grid") for a in actions]
        sample = Sample((frames[0], moves[0], frames[1], moves[1], frames[2]), "a", "b")
        sequence = replace_time(encode("mask", sample))
        batch = corrupt(net, pack([sequence]), torch.Generator().manual_seed(0))
        v = batch.vectors[Modality.IMAGE]
        with torch.no_grad():
            return net(batch)[v.index[v.weight > 0]].view(2, -1)

    base, later, earlier = hidden([0, 1]), hidden([0, 2]), hidden([1, 1])
    assert torch.equal(base[0], later[0]), "the first frame reads an action of its future"
    assert not torch.allclose(base[1], later[1]), "the second frame does not read its own action"
    assert not torch.allclose(base[0], earlier[0]), "the first frame does not read its own action"


def replace_time(sequence: TokenSequence) -> TokenSequence:
    """All noised copies fully hidden, so that only what is read can tell frames apart."""
    v = sequence.vectors[Modality.IMAGE]
    time = torch.where(v.weight > 0, 0.0, 1.0)
    return replace(sequence, vectors={Modality.IMAGE: replace(v, time=time)})


def test_two_experts_that_are_copies_equal_one() -> None:
    dense, double = MODELS["mask"][1], model(MASKED, experts=2)
    weights = {}
    for name, tensor in dense.state_dict().items():
        weights[name] = tensor
        if ".experts.0." in name:
            weights[name.replace(".experts.0.", ".experts.1.")] = tensor
    double.load_state_dict(weights)
    pixels = np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3)
    sequence = encode("mask", Sample((Text(text="red"), Image(pixels=pixels, weight=1.0), Text(text="ball")), "a", "b"))
    with torch.no_grad():
        torch.testing.assert_close(double(pack([sequence])), dense(pack([sequence])), **CLOSE)


def test_objective_draws_all_its_randomness_from_the_generator() -> None:
    net = MODELS["flow"][1]
    values = np.ones((2, 2), np.float32)
    sample = Sample((Text(text="go"), Action(values=values, space="arm", weight=1.0)), "a", "b")
    batch = pack([encode("flow", sample)])
    once, again = (objective(net, batch, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(once.total["action"], again.total["action"])
