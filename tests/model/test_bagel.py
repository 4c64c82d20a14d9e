"""BAGEL is one configuration of our network: equal to its published formulas, written out here, and saved whole.

Its own code asks for flash-attn and a GPU, so the oracle is `Reference`: plain loops over the tensors of a random small
checkpoint by their names, after modeling/bagel of ByteDance-Seed/BAGEL.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from litchi.config import BadInput, from_json, to_json
from litchi.model.bagel import bagel_links, load_bagel, open_bagel, read_bagel, save_bagel
from litchi.model.cache import KVCache
from litchi.model.families import parameters
from litchi.model.network import Model, ModelConfig, initialise
from litchi.model.objective import corrupt, loss_of
from litchi.model.sampling import euler
from litchi.model.vision import SineTable
from litchi.model.weights import from_hugging_face, to_hugging_face
from litchi.schema.arrays import IGNORE
from litchi.schema.processor import grid_places
from litchi.schema.sequence import Modality, TokenSequence, Vectors, pack, window
from tests.model.table import digit, record

TOLERANCE = 1e-4
"""Of logits, velocities and latents, fp32: the same sums in another order."""

LLM = {"model_type": "qwen2", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLM |= {"num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 40, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
LLM |= {"max_position_embeddings": 256, "hidden_act": "silu", "layer_module": "Qwen2MoTDecoderLayer"}
VIT = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
VIT |= {"image_size": 24, "patch_size": 6}
SMALL = {"llm_config": LLM, "vit_config": VIT, "vit_max_num_patch_per_side": 4, "max_latent_size": 5}
SMALL |= {"latent_patch_size": 2, "vae_config": {"z_channels": 3, "downsample": 8}, "model_type": "bagel"}
CHANNELS = 12

REAL_LLM = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
REAL_LLM |= {"intermediate_size": 18_944, "vocab_size": 152_064, "rope_theta": 1e6, "max_position_embeddings": 32_768}
REAL_VIT = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
REAL_VIT |= {"image_size": 980, "patch_size": 14}


# ---- a document, as BAGEL lays it out and as we do ----------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Picture:
    """Patches of pixels to understand, or latents with the share of noise in them."""

    rows: Tensor
    shape: tuple[int, int]
    noise: float | None = None
    learned: bool = False


Piece = Words | Picture
BEGIN, END = 30, 31
"""Marks around a picture."""


def document(pieces: list[Piece]) -> TokenSequence:
    tokens, spans, positions, readable = [], [], [], []
    rows: dict[Modality, list[Vectors]] = {}
    time = span = 0
    for piece in pieces:
        match piece:
            case Words(ids):
                tokens += ids
                spans += range(span, span + len(ids))
                positions += [(at, at, at) for at in range(time, time + len(ids))]
                readable += [True] * len(ids)
                span, time = span + len(ids), time + len(ids)
            case Picture(value, shape, noise, learned):
                blocks = rows.setdefault(Modality.VISION if noise is None else Modality.IMAGE, [])
                place = torch.tensor([(len(blocks), r, c) for r, c in grid_places(*shape)])
                index = torch.arange(len(value)) + len(tokens) + 1
                clean, ones = 1 - (noise or 0.0), torch.ones(len(value))
                blocks.append(Vectors(index, place, value, clean * ones, float(learned) * ones))
                tokens += [BEGIN, *[0] * len(value), END]
                spans += [span] * (len(value) + 2)
                inner = [(time, time + r, time + c) for r, c in grid_places(*shape)]  # only the first axis may count
                positions += [(time, time, time), *inner, (time, time, time)]
                readable += [not learned] * (len(value) + 2)
                span, time = span + 1, time + (not learned)
    count = len(tokens)
    return TokenSequence(
        tokens=torch.tensor(tokens),
        labels=torch.full((count,), IGNORE),
        weights=torch.zeros(count),
        positions=torch.tensor(positions),
        spans=torch.tensor(spans),
        readable=torch.tensor(readable),
        vectors={modality: Vectors.join(blocks) for modality, blocks in rows.items()},
    )


class Reference:
    """BAGEL's forward in training form (`Bagel.forward`, `Qwen2MoTDecoderLayer.forward_train`), in fp32."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.w = tensors

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + LLM["rms_norm_eps"]).rsqrt() * self.w[f"{name}.weight"]

    def by_expert(self, drawn: Tensor, part) -> Tensor:
        """A layer's part by one suffix for what is understood, and by the other for what is drawn."""
        return torch.where(drawn.view(-1, *[1] * (part("").dim() - 1)), part("_moe_gen"), part(""))

    def read(self, pieces: list[Piece]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, which rows are latents, and which may be seen by whom, flattened to T."""
        embedded, position, split, noised, drawn = [], [], [], [], []
        time = 0
        for number, piece in enumerate(pieces):
            match piece:
                case Words(ids):
                    embedded.append(self.w["language_model.model.embed_tokens.weight"][list(ids)])
                    position += range(time, time + len(ids))
                    split, noised, drawn = split + [-1] * len(ids), noised + [-1] * len(ids), drawn + [0] * len(ids)
                    time += len(ids)
                case Picture(rows, shape, noise, learned):
                    marks = self.w["language_model.model.embed_tokens.weight"][[BEGIN, END]]
                    inner = self.vit(rows, shape) if noise is None else self.latents(rows, shape, noise)
                    embedded.append(torch.cat([marks[:1], inner, marks[1:]]))
                    count = len(rows) + 2
                    position, split = position + [time] * count, split + [number] * count
                    noised = noised + [number if learned else -1] * count
                    drawn = drawn + [0] + [int(noise is not None)] * len(rows) + [0]
                    time += not learned
        at, split, noised = (torch.tensor(x) for x in (range(len(position)), split, noised))
        causal = at[:, None] >= at[None]
        within = (split[:, None] == split[None]) & (split[:, None] >= 0)
        seen = (causal | within) & ~((noised[None] >= 0) & (noised[:, None] != noised[None]))
        drawn = torch.tensor(drawn).bool()
        return self.trunk(torch.cat(embedded), torch.tensor(position), seen, drawn), drawn, seen

    def trunk(self, x: Tensor, position: Tensor, seen: Tensor, drawn: Tensor) -> Tensor:
        heads, groups = LLM["num_attention_heads"], LLM["num_key_value_heads"]
        width = LLM["hidden_size"] // heads
        inverse = 1.0 / LLM["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
        angle = torch.cat([position[:, None] * inverse] * 2, -1)[:, None]

        def turned(q: Tensor) -> Tensor:
            a, b = q[..., : width // 2], q[..., width // 2 :]
            return q * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

        for i in range(LLM["num_hidden_layers"]):
            at = f"language_model.model.layers.{i}"
            h = self.by_expert(drawn, lambda e, at=at, x=x: self.norm(f"{at}.input_layernorm{e}", x))
            q, k, v = (
                self.by_expert(drawn, lambda e, at=at, h=h, p=p: self.linear(f"{at}.self_attn.{p}_proj{e}", h))
                for p in "qkv"
            )
            q, k, v = (y.view(len(x), -1, width) for y in (q, k, v))
            q = self.by_expert(drawn, lambda e, at=at, q=q: self.norm(f"{at}.self_attn.q_norm{e}", q))
            k = self.by_expert(drawn, lambda e, at=at, k=k: self.norm(f"{at}.self_attn.k_norm{e}", k))
            k, v = (y.repeat_interleave(heads // groups, 1) for y in (turned(k), v))
            o = attended(turned(q), k, v, seen)
            x = x + self.by_expert(drawn, lambda e, at=at, o=o: self.linear(f"{at}.self_attn.o_proj{e}", o))
            h = self.by_expert(drawn, lambda e, at=at, x=x: self.norm(f"{at}.post_attention_layernorm{e}", x))
            x = x + self.by_expert(drawn, lambda e, at=at, h=h: self.mlp(f"{at}.mlp{e}", h))
        return self.by_expert(drawn, lambda e: self.norm(f"language_model.model.norm{e}", x))

    def mlp(self, at: str, h: Tensor) -> Tensor:
        gate = self.linear(f"{at}.gate_proj", h)
        return self.linear(f"{at}.down_proj", gate / (1 + (-gate).exp()) * self.linear(f"{at}.up_proj", h))

    def latents(self, rows: Tensor, shape: tuple[int, int], noise: float) -> Tensor:
        half = 128
        angle = noise * torch.exp(-math.log(10_000) * torch.arange(half).float() / half)
        first = self.linear("time_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()]))
        time = self.linear("time_embedder.mlp.2", first / (1 + (-first).exp()))
        places = self.w["latent_pos_embed.pos_embed"][ids(shape, SMALL["max_latent_size"])]
        return self.linear("vae2llm", rows) + time + places

    def vit(self, patches: Tensor, shape: tuple[int, int]) -> Tensor:
        at, heads = "vit_model.vision_model", VIT["num_attention_heads"]
        place = ids(shape, SMALL["vit_max_num_patch_per_side"])
        x = self.linear(f"{at}.embeddings.patch_embedding", patches)
        x = x + self.w[f"{at}.embeddings.position_embedding.weight"][place]
        for i in range(VIT["num_hidden_layers"] - 1):
            layer = f"{at}.encoder.layers.{i}"
            h = self.layer_norm(f"{layer}.layer_norm1", x)
            q, k, v = (self.linear(f"{layer}.self_attn.{p}_proj", h).view(len(x), heads, -1) for p in "qkv")
            everyone = torch.ones(len(x), len(x)).bool()
            x = x + self.linear(f"{layer}.self_attn.out_proj", attended(q, k, v, everyone))
            h = gelu_tanh(self.linear(f"{layer}.mlp.fc1", self.layer_norm(f"{layer}.layer_norm2", x)))
            x = x + self.linear(f"{layer}.mlp.fc2", h)
        x = self.layer_norm(f"{at}.post_layernorm", x)
        x = self.linear("connector.fc2", gelu_tanh(self.linear("connector.fc1", x)))
        return x + self.w["vit_pos_embed.pos_embed"][place]

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-6)


def ids(shape: tuple[int, int], side: int) -> Tensor:
    return (torch.arange(shape[0])[:, None] * side + torch.arange(shape[1])).flatten()


def attended(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = torch.einsum("qhk,mhk->hqm", q, k) / math.sqrt(q.shape[-1])
    share = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqm,mhk->qhk", share, v).flatten(1)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# ---- a small checkpoint -------------------------------------------------------------------------------------------


def theirs(config: ModelConfig) -> dict[str, Tensor]:
    """Random tensors under BAGEL's names, none of them zero or one, so that each one matters."""
    generator = torch.Generator().manual_seed(0)
    shapes, found = parameters(config), {}
    for link in bagel_links(config):
        shape = link.export([torch.empty(shapes[name], device="meta") for name in link.ours]).shape
        noise = torch.randn(shape, generator=generator)
        found[link.theirs] = 1 + 0.2 * noise if "norm" in link.theirs and len(shape) == 1 else 0.2 * noise
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """As the published one: three configurations and one file of weights."""
    place = tmp_path_factory.mktemp("bagel")
    save_file(theirs(read_bagel(SMALL)), place / "ema.safetensors")
    for key in ("llm_config", "vit_config"):
        (place / f"{key}.json").write_text(json.dumps(SMALL[key]))
    outer = {key: value for key, value in SMALL.items() if not key.endswith("m_config") and key != "vit_config"}
    (place / "config.json").write_text(json.dumps(outer))
    return place


def pieces() -> list[Piece]:
    """Words, a picture to understand, a latent to edit, words, and two latents to learn; pictures of odd shapes."""
    torch.manual_seed(1)
    pixels, latents = (torch.randn(6, 108), torch.randn(8, 108)), [torch.randn(n, CHANNELS) for n in (6, 8, 15)]
    return [
        Words((1, 2, 3)),
        Picture(pixels[0], (3, 2)),
        Words((4, 5)),
        Picture(pixels[1], (2, 4)),
        Picture(latents[0], (2, 3), 0.0),
        Words((6,)),
        Picture(latents[1], (4, 2), 0.7, learned=True),
        Picture(latents[1] + 1, (4, 2), 0.0),
        Words((7, 8)),
        Picture(latents[2], (3, 5), 0.31, learned=True),
    ]


# ---- laws ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_network_is_bagel(folder: Path) -> None:
    """Scores of words and velocities of latents, packed with another document."""
    model, _ = load_bagel(folder)
    reference = Reference(load_file(folder / "ema.safetensors"))
    batch = pack([document([Words((9, 9)), *pieces()[1:2]]), document(pieces())])
    skip = int(batch.cu_seqlens[1])
    found = model(batch)[skip:]
    hidden, drawn, _ = reference.read(pieces())
    gap = float((found - hidden).abs().max())
    told = reference.linear("language_model.lm_head", hidden[~drawn])
    gap = max(gap, float((model.logits(found[~drawn]) - told).abs().max()))
    velocity, v = reference.linear("llm2vae", hidden[drawn]), batch.vectors[Modality.IMAGE]
    clean = model.clean(found[drawn], Modality.IMAGE, v.value, v.time[:, None])
    gap = max(gap, float((clean - (v.value - (1 - v.time[:, None]) * velocity)).abs().max()))
    assert gap <= TOLERANCE
    record("model that sees and draws", "BAGEL", "their formulas, written out in the test", digit(gap), "bit for bit")


@torch.no_grad()
def test_a_picture_is_drawn_as_bagel_draws_it(folder: Path) -> None:
    """From noise, step by step against a cache; theirs reads everything again (`generate_image` without guidance)."""
    model, _ = load_bagel(folder)
    reference = Reference(load_file(folder / "ema.safetensors"))
    before, steps = pieces()[:6], 4
    noise = torch.randn(15, CHANNELS, generator=torch.Generator().manual_seed(2))
    told, times = noise, torch.linspace(1, 0, steps + 1)
    for time, after in zip(times, times[1:], strict=False):
        hidden, drawn, _ = reference.read([*before, Picture(told, (3, 5), float(time))])
        told = told - reference.linear("llm2vae", hidden[drawn][-15:]) * (time - after)
    cache, length = KVCache.empty(2), len(document(before))
    model(pack([document(before)]), cache)
    found = noise
    for step in range(steps):
        whole = document([*before, Picture(found, (3, 5), 1 - step / steps)])
        x_ND = model(pack([window(whole, length, len(whole))]), cache.fork())[1:-1]
        found = euler(found, model.clean(x_ND, Modality.IMAGE, found, step / steps), step / steps, 1 / steps)
    assert (found - told).abs().max() <= TOLERANCE
    assert (found - noise).abs().max() > 0.1


def test_what_is_learned_is_the_velocity(folder: Path) -> None:
    """The loss is the squared error of noise minus clean, and fixed tables are not trained."""
    model, _ = load_bagel(folder)
    batch = pack([document(pieces())])
    corrupted = corrupt(model, batch, torch.Generator().manual_seed(0))
    loss = loss_of(model, batch, corrupted)
    v, noised = batch.vectors[Modality.IMAGE], corrupted.vectors[Modality.IMAGE]
    rows = v.weight > 0
    with torch.no_grad():
        said = model.writers["image"](model(corrupted)[v.index[rows]])
    target = (noised.value - v.value)[rows] / (1 - v.time[rows, None])
    torch.testing.assert_close(loss.total["image"].detach(), (said - target).square().mean(1).sum())
    loss.over({"image": 1.0}, {}).backward()
    assert model.writers["image"].value.weight.grad is not None
    assert all(
        p.grad is None for p in (model.readers["image"].place.weight, model.readers["vision"].tower.sines.weight)
    )


def test_every_tensor_goes_back_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    model, original = load_bagel(folder)
    named = dict(model.named_parameters())
    save_bagel(tmp_path / "out", model.config, lambda name: named[name].detach(), original, dtype=torch.float32)
    saved, back = load_file(folder / "ema.safetensors"), load_file(tmp_path / "out" / "ema.safetensors")
    assert set(saved) == set(back) and all(torch.equal(tensor, saved[name]) for name, tensor in back.items())
    assert open_bagel(tmp_path / "out").config == model.config
    assert from_json(ModelConfig, to_json(model.config)) == model.config
    assert all(from_hugging_face(to_hugging_face(name)) == name for name in parameters(model.config))


def test_the_published_model_has_these_shapes() -> None:
    """BAGEL-7B-MoT by its configurations; nothing is allocated."""
    config = read_bagel({"llm_config": REAL_LLM, "vit_config": REAL_VIT})
    shapes, links, found = parameters(config), bagel_links(config), {}
    for link in links:
        found[link.theirs] = tuple(link.export([torch.empty(shapes[n], device="meta") for n in link.ours]).shape)
    layer = "language_model.model.layers.27"
    expected = {
        f"{layer}.self_attn.q_proj_moe_gen.bias": (3584,),
        f"{layer}.self_attn.k_proj.weight": (512, 3584),
        f"{layer}.self_attn.k_norm_moe_gen.weight": (128,),
        f"{layer}.mlp_moe_gen.down_proj.weight": (3584, 18_944),
        f"{layer}.post_attention_layernorm_moe_gen.weight": (3584,),
        "language_model.model.norm_moe_gen.weight": (3584,),
        "language_model.lm_head.weight": (152_064, 3584),
        "vae2llm.weight": (3584, 64),
        "llm2vae.weight": (64, 3584),
        "time_embedder.mlp.0.weight": (3584, 256),
        "latent_pos_embed.pos_embed": (4096, 3584),
        "vit_pos_embed.pos_embed": (4900, 3584),
        "connector.fc1.weight": (3584, 1152),
        "vit_model.vision_model.embeddings.patch_embedding.weight": (1152, 588),
        "vit_model.vision_model.embeddings.position_embedding.weight": (4900, 1152),
        "vit_model.vision_model.encoder.layers.25.mlp.fc1.weight": (4304, 1152),
    }
    assert {name: found.get(name) for name in expected} == expected
    assert len(links) == len(found) == 28 * 28 + 4 + 26 * 16 + 5 + 12 + 2
    assert set(shapes) == {name for link in links for name in link.ours}
    qwen, tables = 7_615_616_512, 2 * 152_064 * 3584  # Qwen2.5-7B as published; its two tables are not doubled
    tower = sum(math.prod(shape) for name, shape in found.items() if name.startswith("vit_model."))
    layers = sum(math.prod(shape) for name, shape in found.items() if name.startswith("language_model."))
    assert layers == 2 * qwen - tables + 28 * 4 * 128  # and norms of queries and keys, which Qwen2.5 lacks
    assert tower == 26 * (4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 5 * 1152) + (4900 + 588 + 3) * 1152
    assert sum(math.prod(shape) for shape in found.values()) == 14_607_260_128


def test_fixed_tables_are_those_of_dit() -> None:
    """Column first, as `get_2d_sincos_pos_embed` has it; drawing weights leaves them alone."""
    side, width = 5, 48
    frequency = 1.0 / 10_000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
    rows = []
    for r in range(side):
        for c in range(side):
            halves = [np.concatenate([np.sin(x * frequency), np.cos(x * frequency)]) for x in (c, r)]
            rows.append(np.concatenate(halves))
    told = torch.from_numpy(np.array(rows)).float()
    torch.testing.assert_close(SineTable(side, width).weight.detach(), told, rtol=0, atol=1e-7)
    model = Model(read_bagel(SMALL))
    initialise(model, 0)
    torch.testing.assert_close(model.readers["image"].place.weight.detach(), told, rtol=0, atol=1e-7)


def test_what_of_bagel_cannot_be_computed_is_named(folder: Path, tmp_path: Path) -> None:
    for changed, named in (
        ({"interpolate_pos": True}, "interpolate_pos"),
        ({"visual_gen": False}, "visual_gen"),
        ({"connector_act": "relu"}, "connector_act"),
        ({"vit_max_num_patch_per_side": 5}, "one number must place a patch"),
        ({"llm_config": LLM | {"layer_module": "Qwen2DecoderLayer"}}, "layer_module"),
        ({"vit_config": VIT | {"num_hidden_layers": 1}}, "two layers or more"),
    ):
        with pytest.raises(BadInput, match=named):
            read_bagel(SMALL | changed)
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": "bagel"}))
    tensors = load_file(folder / "ema.safetensors")
    save_file(tensors | {"odd": torch.zeros(1)}, tmp_path / "ema.safetensors")
    with pytest.raises(BadInput, match="nothing reads, such as 'odd'"):
        open_bagel(tmp_path)
    tensors.pop("language_model.model.norm_moe_gen.weight")
    save_file(tensors, tmp_path / "ema.safetensors")
    with pytest.raises(BadInput, match="no 'language_model.model.norm_moe_gen.weight'"):
        open_bagel(tmp_path)
