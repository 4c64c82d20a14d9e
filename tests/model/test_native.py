"""The native trunk says what the network says, and the same bits whoever is read together."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model import compiled, native
from litchi.model.moe import Mixture
from litchi.model.native import Trunk
from litchi.model.network import Model, ModelConfig
from litchi.model.packing import Format, dequantise, logical_keys, logical_values, pack, quantise
from litchi.model.rope import rotations
from litchi.model.vision import Tower
from litchi.schema.sequence import Batch, TokenSequence
from litchi.schema.sequence import pack as pack_documents
from tests.model.test_packing import given_back

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="needs a C++ compiler")

SMALL = ModelConfig(
    vocab_size=75, width=96, num_layers=2, num_heads=6, num_kv_heads=2, head_width=32, mlp_width=160, qk_norm=True
)
PLAIN = ("-DLITCHI_PLAIN",)
"""The loops without intrinsics, which any CPU runs."""
HALVES = ("-march=haswell",) if " avx512f " in compiled.machine() else ()
"""AVX2, and no AVX-512 whatever this CPU has."""

FORMATS: tuple[Format, ...] = ("bfloat16", "float32", "int8", "int4", "w8a8", "w4a8")


def network(c: ModelConfig, seed: int = 0) -> Model:
    """Weights large enough that attention is far from even, and biases and norms that are not their neutral values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Model(c).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() < 2:
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
        elif "embed" not in name:
            p.mul_(4)
        else:
            p.mul_(40)
    return model


def document(length: int, seed: int, span: tuple[int, int] = (0, 0)) -> TokenSequence:
    """Random tokens, of which those from span[0] to span[1] read each other."""
    ids = torch.randint(0, 75, (length,), generator=torch.Generator().manual_seed(seed))
    spans = torch.arange(length)
    spans[span[0] : span[1]] = span[0]
    return causal(ids, spans)


def causal(ids: Tensor, spans: Tensor) -> TokenSequence:
    length = len(ids)
    positions = torch.arange(length)[:, None].expand(-1, 3).contiguous()
    return TokenSequence(
        tokens=ids,
        labels=torch.full((length,), -100),
        weights=torch.zeros(length),
        positions=positions,
        spans=spans,
        readable=torch.ones(length, dtype=torch.bool),
        vectors={},
    )


@dataclass
class Reading:
    """Documents read in calls of any kind, in pages of any order, which hold NaN where nothing was written."""

    trunk: Subject
    documents: list[TokenSequence]
    page: int = 32
    seed: int = 0
    hidden: list[list[Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.max_pages = max(-(-len(d) // self.page) for d in self.documents)
        total = self.max_pages * len(self.documents) + 3
        nothing = -1 if self.trunk.dtype == torch.int8 else float("nan")  # the scale of -1 in all bytes is NaN as well
        self.keys, self.values = (pages.fill_(nothing) for pages in self.trunk.pages(total, self.page))
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))
        self.tables = order[: self.max_pages * len(self.documents)].view(-1, self.max_pages).int().contiguous()
        self.hidden = [[] for _ in self.documents]
        self.table = self.trunk.table

    def read(self, *pieces: tuple[int, int, int]) -> None:
        """One call; a piece is (document, start, stop)."""
        c = self.trunk.config
        parts = [self.documents[d] for d, *_ in pieces]
        tokens = torch.cat([p.tokens[a:b] for p, (_, a, b) in zip(parts, pieces, strict=True)])
        positions = torch.cat([p.positions[a:b] for p, (_, a, b) in zip(parts, pieces, strict=True)])
        end = torch.cat([ends(p)[a:b] for p, (_, a, b) in zip(parts, pieces, strict=True)])
        slot = torch.cat([torch.arange(a, b) for _, a, b in pieces])
        sequence = torch.cat([torch.full((b - a,), d) for d, a, b in pieces])
        rotation = rotations(positions, c.head_width, c.theta, c.scaling, c.sections)
        columns = (sequence.int(), slot.int(), end.int(), self.tables)
        hidden = self.trunk.run(self.table[tokens], rotation, self.keys, self.values, *columns)
        for (d, *_), rows in zip(pieces, hidden.split([b - a for _, a, b in pieces]), strict=True):
            self.hidden[d].append(rows)

    def found(self, index: int) -> Tensor:
        hidden = torch.cat(self.hidden[index])
        scores = torch.full((len(hidden), self.trunk.config.vocab_size), float("nan"))
        return torch.cat([hidden, self.trunk.logits(hidden, scores)], 1)


def ends(document: TokenSequence) -> Tensor:
    """One past the last token of each token's span."""
    return torch.searchsorted(document.spans, document.spans, right=True)


class Subject(Trunk):
    """A trunk with the embedding of its model."""

    def __init__(self, model: Model, *arguments, **named) -> None:
        super().__init__(model, *arguments, **named)
        self.table = model.embed_tokens.weight.detach().float()


def whole(trunk: Subject, documents: list[TokenSequence], **named) -> Reading:
    reading = Reading(trunk, documents, **named)
    for index, d in enumerate(documents):
        reading.read((index, 0, len(d)))
    return reading


CASES = [
    *((form, torch.bfloat16, ()) for form in FORMATS),
    ("float32", torch.float32, ()),
    ("int8", torch.float32, ()),
    *((form, torch.bfloat16, PLAIN) for form in ("bfloat16", "int8", "int4", "w8a8", "w4a8")),
    ("float32", torch.float32, PLAIN),
    *(("bfloat16", torch.int8, flags) for flags in ((), PLAIN)),
]


@pytest.mark.parametrize(("form", "dtype", "flags"), CASES, ids=str)
def test_no_neighbour_cut_page_or_thread_changes_a_bit(form: Format, dtype: torch.dtype, flags: tuple[str, ...]):
    """Read whole, in pieces, token by token, among others, in other pages and on two threads."""
    model = network(SMALL)
    trunk, two = (Subject(model, dtype, form, threads=n, flags=flags) for n in (1, 2))
    long, spanned, short = document(300, 1), document(170, 2, span=(40, 75)), document(7, 3)
    documents = [long, spanned, short]
    wanted = [whole(trunk, documents).found(i) for i in range(3)]
    assert all(bool(w.isfinite().all()) for w in wanted)
    pieces = Reading(two, documents, page=64, seed=1)
    for cut in [(0, 0, 1), (0, 1, 14), (1, 0, 40), (0, 14, 143), (1, 40, 75), (0, 143, 300), (2, 0, 7), (1, 75, 170)]:
        pieces.read(cut)
    together = Reading(two, documents, page=32, seed=2)
    together.read((2, 0, 3), (0, 0, 129), (1, 0, 75))
    together.read((1, 75, 76), (0, 129, 130), (2, 3, 4))
    together.read((0, 130, 300), (2, 4, 7), (1, 76, 170))
    stepped = Reading(trunk, documents, page=96, seed=3)
    stepped.read((0, 0, 240), (1, 0, 75))
    for at in range(60):
        stepped.read((0, 240 + at, 241 + at), (1, 75 + at, 76 + at), *([(2, at, at + 1)] if at < 7 else []))
    alone = Reading(two, documents, seed=4)
    for at in range(300):
        alone.read((0, at, at + 1))
    for other in (pieces, together):
        for index in range(3):
            assert torch.equal(other.found(index), wanted[index])
    assert torch.equal(alone.found(0), wanted[0])
    for index in range(3):
        found = stepped.found(index)
        assert torch.equal(found, wanted[index][: len(found)])


def test_a_long_document_read_in_one_call_is_that_read_token_by_token():
    """Over several chunks of keys, which threads share out where queries are few."""
    model, text = network(SMALL), document(700, 5)
    trunk, two = (Subject(model, torch.bfloat16, "bfloat16", threads=n) for n in (1, 2))
    wanted = whole(two, [text]).found(0)
    stepped = Reading(trunk, [text], seed=1)
    stepped.read((0, 0, 500))
    for at in range(500, 600):
        stepped.read((0, at, at + 1))
    stepped.trunk = two
    for at in range(600, 700):
        stepped.read((0, at, at + 1))
    assert torch.equal(stepped.found(0), wanted)


def test_what_lies_beyond_the_end_counts_for_nothing():
    """A token's past read by it alone, beside keys of later tokens that are not numbers."""
    trunk, text = Subject(network(SMALL)), document(90, 6)
    wanted = whole(trunk, [text]).found(0)
    reading = Reading(trunk, [text])
    reading.read((0, 0, 80))
    reading.table = torch.full_like(trunk.table, float("nan"))
    reading.read((0, 80, 90))
    assert not bool(reading.hidden[0].pop().isfinite().any())
    reading.table = trunk.table
    reading.read((0, 80, 81))
    assert torch.equal(reading.found(0), wanted[:81])


def test_a_neighbour_that_is_no_number_counts_for_nothing():
    """It follows in the same call, so that both are asked about the same block of keys."""
    trunk, text = Subject(network(SMALL)), document(90, 6)
    text.tokens.clamp_(max=73)[-1] = 74
    wanted = whole(trunk, [text]).found(0)
    reading = Reading(trunk, [text])
    reading.table = trunk.table.clone()
    reading.table[74] = float("nan")
    reading.read((0, 0, 90))
    found = reading.found(0)
    assert torch.equal(found[:89], wanted[:89]) and not bool(found[89].isfinite().any())


VARIANTS = {
    "norms of heads": SMALL,
    "biases": replace(SMALL, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=False),
    "own head": replace(SMALL, tied=False, vocab_size=96, sections=(6, 5)),
    "wide heads": replace(SMALL, head_width=128, num_heads=2, num_kv_heads=1),
    "many heads of one key": replace(SMALL, num_heads=26, num_kv_heads=2),
    "a key a head": replace(SMALL, num_heads=3, num_kv_heads=3, head_width=64),
}


def torch_found(model: Model, batch: Batch) -> Tensor:
    return model.logits(model(batch)).float()


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_network(name: str):
    """fp32, with sums in another order; documents with and without spans. oracle: Model.forward"""
    model = network(VARIANTS[name])
    documents = [document(150, 1), document(60, 2, span=(10, 33)), document(1, 3)]
    wanted = torch_found(model, pack_documents(documents)).split([len(d) for d in documents])
    reading = whole(Subject(model, torch.float32, "float32", threads=2), documents)
    for index, scores in enumerate(wanted):
        found = reading.found(index)[:, model.config.width :]
        assert float((found - scores).abs().max() / scores.abs().max()) < 2e-5


@pytest.mark.skipif(" avx2 " not in compiled.machine(), reason="needs a CPU with AVX2")
@pytest.mark.parametrize(("form", "keys"), [*((f, torch.bfloat16) for f in FORMATS), ("float32", torch.int8)], ids=str)
def test_registers_of_half_the_size_give_the_bits_of_the_plain_loops(form: Format, keys: torch.dtype):
    """Of one row, of a tile and a rest, and of many; also where this CPU has larger ones."""
    documents = [document(150, 1, span=(10, 33)), document(5, 2), document(1, 3)]
    halves, plain = (Subject(network(SMALL), keys, form, flags=flags) for flags in (HALVES, PLAIN))
    for together in (documents, documents[1:], documents[2:]):
        found, wanted = whole(halves, together), whole(plain, together)
        for index in range(len(together)):
            assert torch.equal(found.found(index), wanted.found(index))


@pytest.mark.parametrize(("form", "flags"), [(f, x) for f in ("bfloat16", "int8") for x in ((), PLAIN)], ids=str)
def test_it_is_no_further_from_fp32_than_torch_in_bf16(form: Format, flags: tuple[str, ...]):
    model = network(SMALL)
    text = document(200, 1)
    batch = pack_documents([text])
    exact = torch_found(model, batch)
    found = whole(Subject(model, torch.bfloat16, form, flags=flags), [text]).found(0)[:, SMALL.width :]
    theirs = torch_found(network(SMALL).bfloat16(), batch)
    assert (found - exact).pow(2).mean() <= (theirs - exact).pow(2).mean()


@pytest.mark.parametrize("flags", [(), PLAIN], ids=str)
@pytest.mark.parametrize(
    ("form", "head", "near"),
    [("int8", "int8", 1e-4), ("int4", "int8", 1e-4), ("w8a8", "w8a8", 0.05), ("w4a8", "w8a8", 0.05)],
)
def test_only_weights_are_rounded(form: Format, head: Format, near: float, flags: tuple[str, ...]):
    """To so few bits: what layers read keeps 16, or is rounded to 8 where the format says so.

    oracle: Model.forward with the weights that panels stand for
    """
    model, text = network(SMALL), document(200, 1)
    found = whole(Subject(model, torch.float32, form, flags=flags), [text]).found(0)[:, SMALL.width :]
    table = model.embed_tokens.weight.clone()
    for name, p in model.named_parameters():
        if p.dim() == 2 and "embed" not in name:
            p.copy_(given_back(p, form))
    hidden = model(pack_documents([text]))
    model.embed_tokens.weight.copy_(given_back(table, head))
    wanted = model.logits(hidden).float()
    off = float((found - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt())
    assert near / 50 < off < near or off < near == 1e-4


@pytest.mark.parametrize("flags", [(), PLAIN], ids=str)
def test_keys_and_values_in_8_bits_lie_near_the_network(flags: tuple[str, ...]):
    """Over chunks and spans, whatever the heads; a scale that were wrong by a hundredth would be seen.
    oracle: Model.forward"""
    for c in (SMALL, VARIANTS["many heads of one key"], VARIANTS["wide heads"]):
        model, text = network(c), document(300, 1, span=(100, 133))
        model.embed_tokens.weight.div_(40)  # so that what attention adds is most of the rest
        trunk = Subject(model, torch.int8, "float32", threads=2, flags=flags)
        found, wanted = whole(trunk, [text]).found(0)[:, c.width :], torch_found(model, pack_documents([text]))
        assert (found - wanted).pow(2).mean().sqrt() < 0.012 * wanted.pow(2).mean().sqrt()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_is_within_half_a_step(bits: int):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    q, scale, least = quantise(weight, bits)
    step = scale.float().repeat_interleave(32, 1)
    slack = least.float().abs().repeat_interleave(32, 1) * 2**-10  # fp16
    assert bool(((dequantise(q, scale, least) - weight).abs() <= 0.5 * step + slack).all())


def test_pages_can_be_put_in_order():
    """Keys of layer 0 are those that the network makes of the embedding alone."""
    model = network(SMALL)
    text = document(40, 1)
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        reading = whole(Subject(model, dtype, "float32"), [text], page=64)
        expert = model.layers[0].experts[0]
        _, k, v = expert.read(model.embed_tokens(text.tokens))
        for pages, wanted in ((logical_values(reading.values), v), (logical_keys(reading.keys), k)):
            found = pages[0, int(reading.tables[0, 0]), :, :40].transpose(0, 1).float()
            if wanted is k:
                found, wanted = found[:1], wanted[:1]  # the first stands at 0 and is not turned
            assert torch.allclose(found, wanted, atol=close, rtol=close)


def test_a_model_that_nobody_else_needs_is_emptied_as_it_is_packed():
    """All but what the ways in and the norms need, and what is packed is the same."""
    model, text = network(SMALL), document(40, 1)
    wanted = whole(Subject(model, weights="int4"), [text]).found(0)
    taken = Subject(model, weights="int4", take=True)
    assert torch.equal(whole(taken, [text]).found(0), wanted)
    for name, p in model.named_parameters():
        assert p.numel() > 0 or (name.startswith("layers.") and p.dim() == 1), name
    assert sum(p.numel() for p in model.layers.parameters()) < 10 * SMALL.width


def test_indices_that_lie_outside_are_refused():
    trunk = Subject(network(SMALL))
    reading = Reading(trunk, [document(40, 1)])
    reading.tables[0, 1] = len(reading.keys[0]) + 5
    reading.read((0, 0, 32))
    with pytest.raises(BadInput, match="outside of the tables"):
        reading.read((0, 32, 40))
    with pytest.raises(BadInput, match="multiple of 32"):
        trunk.pages(4, page=48)


UNKNOWN = {
    "two experts": replace(SMALL, experts=2),
    "mixtures": replace(SMALL, mixture=Mixture(num_experts=4, num_chosen=2, width=64)),
    "LayerNorm": replace(SMALL, norm="layer"),
    "SwiGLU": replace(SMALL, activation="gelu"),
    "learned": replace(SMALL, places=16),
    "later layers": replace(SMALL, modalities={"vision": Tower(channels=12, deep=(0,))}),
    "multiples of 32": replace(SMALL, head_width=48),
    "wider than 256": replace(SMALL, head_width=288),
}


@pytest.mark.parametrize("reason", UNKNOWN)
def test_it_says_what_it_does_not_know(reason: str):
    assert native.supports(SMALL)
    assert not native.supports(UNKNOWN[reason]) and reason in native.unsupported(UNKNOWN[reason])


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "needs a C++ compiler" in native.unsupported(SMALL)
    with pytest.raises(BadInput, match="no C\\+\\+ compiler"):
        compiled.compile_once(native.SOURCES)


def test_a_library_is_compiled_once_and_again_for_other_source(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "three.cpp"
    for value in (3, 4):
        source.write_text(f'extern "C" int number() {{ return {value}; }}')
        for _ in range(2):
            assert compiled.compile_once([source]).number() == value
    assert len(list((tmp_path / "litchi").iterdir())) == 2
    source.write_text("no C++")
    with pytest.raises(BadInput, match="cannot compile three.cpp"):
        compiled.compile_once([source])


def test_panels_are_read_as_they_are_packed():
    weight = torch.arange(64 * 32).view(64, 32).float()
    assert torch.equal(pack(weight, "float32")[1, 5], weight[32:, 5])
    assert torch.equal(pack(weight, "bfloat16")[1, 2], weight[32:, 4:6].bfloat16())
