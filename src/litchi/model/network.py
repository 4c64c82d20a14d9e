"""The network: every modality meets on one token axis; ways in and heads differ, the trunk does not.

T packed tokens, D width, H query heads, G key-value heads, K head width, F MLP width, N vectors of one modality,
C their channels or digits, L levels of a digit. Submodules carry Hugging Face's names (the trunk is Qwen3's), so that
weights travel. Training, prefill, decode and denoising are the same `forward`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from litchi.model.attention import Attend, attention_for
from litchi.model.cache import KVCache
from litchi.model.moe import Mixture, SparseMLP
from litchi.model.rope import Scaling, rotate, rotations
from litchi.model.vision import SineTable, Tower, VisionTower
from litchi.schema.arrays import MASK
from litchi.schema.sequence import Batch, Modality, Vectors


@dataclass(frozen=True, slots=True)
class Mask:
    """Vectors of discrete digits, corrupted by hiding digits; the head is one softmax a digit."""

    digits: int
    levels: int
    width: int = 64
    """Of the embedding of a level. All digits share one table, so that what is learned about a tile in one place holds
    in all. It reaches the trunk through a map for each digit, which tells places apart, and one map that all share."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Continuous vectors, corrupted by noise (flow matching); the head predicts the clean value."""

    channels: int


@dataclass(frozen=True, slots=True)
class Features:
    """Rows that a network outside made of a picture, brought to the trunk's width; never drawn."""

    channels: int


@dataclass(frozen=True, slots=True)
class Velocity:
    """Continuous vectors, corrupted as those of a flow, as DiT and BAGEL have them: a fixed table of sines places them,
    two layers read how noised they are, and the head predicts the velocity from clean to noise."""

    channels: int
    grid: int
    """Rows and columns of the table; a picture begins in its corner."""


Kind = Mask | Flow | Velocity | Tower | Features


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of the one network.

    `experts=2` gives every layer a second set of weights for what is generated in spans.
    """

    vocab_size: int
    width: int = 192
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 6
    head_width: int = 32
    mlp_width: int = 512
    modalities: dict[str, Kind] = field(default_factory=dict)
    """`Modality` value -> how its vectors are read and written."""
    experts: int = 1
    own_norms: bool = False
    """Whether the second expert also has a last norm of its own (BAGEL)."""
    theta: float = 10_000.0
    qk_norm: bool = True
    tied: bool = True
    """Whether the language head is the embedding table."""
    epsilon: float = 1e-6
    grid: int = 16
    """Rows and columns of the table that places vectors within their picture."""
    scaling: Scaling | None = None
    """How rotary frequencies are stretched to texts longer than those first trained on."""
    sections: tuple[int, int] | None = None
    """Rotary pairs of a head that turn with height and with width; a third each if not given."""
    places: int = 0
    """Rows of a table of learned positions (GPT-2); 0 turns heads by rotary positions instead."""
    norm: Literal["rms", "layer"] = "rms"
    activation: Literal["silu", "gelu"] = "silu"
    """SwiGLU, or GPT-2's two matrices with GELU (its tanh form) between them."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    mixture: Mixture | None = None
    """Experts of the MLP among which each token chooses; None is one MLP."""
    max_length: int = 0
    """Tokens that a document may have, 0 for any number: a table of places, or a sliding window, ends there."""


class Norm(nn.Module):
    """RMSNorm over the last dimension."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.epsilon)


def norm_of(c: ModelConfig) -> nn.Module:
    return Norm(c.width, c.epsilon) if c.norm == "rms" else nn.LayerNorm(c.width, eps=c.epsilon)


class Attention(nn.Module):
    """The projections of one expert; who reads whom is decided outside."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.head_width = c.head_width
        self.q_proj = nn.Linear(c.width, c.num_heads * c.head_width, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.num_kv_heads * c.head_width, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.num_kv_heads * c.head_width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_width, c.width, bias=c.out_bias)
        self.q_norm = Norm(c.head_width, c.epsilon) if c.qk_norm else nn.Identity()
        self.k_norm = Norm(c.head_width, c.epsilon) if c.qk_norm else nn.Identity()

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (p(x_TD).unflatten(-1, (-1, self.head_width)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.q_norm(q), self.k_norm(k), v


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c: ModelConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.width, width, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.width, width, bias=c.mlp_bias)
        self.down_proj = nn.Linear(width, c.width, bias=c.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class PlainMLP(nn.Module):
    """Two matrices and GELU."""

    def __init__(self, c: ModelConfig, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(c.width, width, bias=c.mlp_bias)
        self.down_proj = nn.Linear(width, c.width, bias=c.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_TD), approximate="tanh"))


def mlp_of(c: ModelConfig) -> nn.Module:
    make = partial(MLP if c.activation == "silu" else PlainMLP, c)
    return make(c.mlp_width) if c.mixture is None else SparseMLP(c.mixture, c.width, make)


class Expert(nn.Module):
    """One full set of a layer's weights."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = norm_of(c)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = norm_of(c)
        self.mlp = mlp_of(c)

    def read(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(x_TD))

    def write(self, x_TD: Tensor, o_TO: Tensor) -> Tensor:
        x_TD = x_TD + self.self_attn.o_proj(o_TO)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Layer(nn.Module):
    """One or two experts with joint attention: each token uses its expert's weights, all tokens read each other."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(c) for _ in range(c.experts))

    def forward(
        self,
        x_TD: Tensor,
        *,
        index: int,
        rotation: tuple[Tensor, Tensor] | None,
        attend: Attend,
        route: Sequence[Tensor],
        cache: KVCache | None,
    ) -> Tensor:
        q, k, v = self.ask(x_TD, rotation, route)
        if cache is not None:
            k, v = cache.extend(index, k, v)
        return self.answer(x_TD, attend(q, k, v).flatten(1), route)

    def ask(
        self, x_TD: Tensor, rotation: tuple[Tensor, Tensor] | None, route: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, turned to their positions."""
        if len(self.experts) == 1:
            q, k, v = self.experts[0].read(x_TD)
        else:
            q, k, v = (rejoin(p, route) for p in zip(*(e.read(x_TD[r]) for e, r in self.routed(route)), strict=True))
        return (q, k, v) if rotation is None else (rotate(q, rotation), rotate(k, rotation), v)

    def answer(self, x_TD: Tensor, o_TO: Tensor, route: Sequence[Tensor]) -> Tensor:
        """The tokens with what attention found and what MLPs make of it."""
        if len(self.experts) == 1:
            return self.experts[0].write(x_TD, o_TO)
        return rejoin([e.write(x_TD[r], o_TO[r]) for e, r in self.routed(route)], route)

    def routed(self, route: Sequence[Tensor]) -> zip:
        return zip(self.experts, route, strict=True)


def rejoin(pieces: Sequence[Tensor], route: Sequence[Tensor]) -> Tensor:
    """Put the rows that experts worked on back where they came from."""
    return torch.cat(list(pieces))[torch.cat(list(route)).argsort()]


class Reader(nn.Module):
    """Vectors of one modality into the trunk's width: what they hold, how clean they are, where they lie."""

    def __init__(self, kind: Kind, c: ModelConfig) -> None:
        super().__init__()
        self.kind, self.grid = kind, c.grid
        match kind:
            case Mask(digits, levels, width):
                self.table = nn.Embedding(levels + 1, width)
                self.slots = nn.Linear(digits * width, c.width, bias=False)
                self.anywhere = nn.Linear(width, c.width, bias=False)
            case Flow(channels):
                self.value = nn.Linear(channels, c.width)
            case Velocity(channels, grid):
                self.value, self.place = nn.Linear(channels, c.width), SineTable(grid, c.width)
                self.time = TimeEmbedder(c.width)
                return
            case Tower():
                self.tower = VisionTower(kind, c.width)
                return
            case Features(channels):
                layers = nn.LayerNorm(channels), nn.Linear(channels, c.width), nn.GELU(), nn.Linear(c.width, c.width)
                self.project = nn.Sequential(*layers)
                return
        self.place = nn.Embedding(2 * c.grid, c.width)
        self.time = nn.Linear(len(HARMONICS), c.width, bias=False)

    def forward(self, v: Vectors) -> Float[Tensor, "N D"] | Float[Tensor, "N X D"]:
        match self.kind:
            case Mask(levels=levels):
                digit_NC = torch.where(v.value == MASK, levels, v.value).long()
                held_NCW = self.table(digit_NC)
                x_ND = self.slots(held_NCW.flatten(1)) + self.anywhere(held_NCW.sum(1))
            case Flow():
                x_ND = self.value(v.value)
            case Velocity():
                return self.value(v.value) + self.time(1 - v.time) + self.place(v.place)
            case Tower():
                return self.tower(v.value, v.place)
            case Features():
                return self.project(v.value)
        place_N2 = (v.place[:, 1:] + self.grid // 2).clamp(0, self.grid - 1)
        offset = torch.tensor([0, self.grid], device=place_N2.device)
        harmonic = torch.tensor(HARMONICS, device=v.time.device) * v.time[:, None]
        return x_ND + self.place(place_N2 + offset).sum(1) + self.time(harmonic.cos())


class TimeEmbedder(nn.Module):
    """A share of noise as sines of many frequencies, through two layers (DiT)."""

    def __init__(self, width: int, num_sines: int = 128) -> None:
        super().__init__()
        self.num_sines = num_sines
        self.fc1, self.fc2 = nn.Linear(2 * num_sines, width), nn.Linear(width, width)

    def forward(self, noise_N: Float[Tensor, "N"]) -> Float[Tensor, "N D"]:
        step = torch.arange(self.num_sines, device=noise_N.device, dtype=torch.float32)
        angle = noise_N[:, None].float() * torch.exp(-math.log(10_000) * step / self.num_sines)
        sines = torch.cat([angle.cos(), angle.sin()], 1).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(sines)))


class Writer(nn.Module):
    """The trunk's width to what a vector is when clean: scores of each digit (N, C, L), or values (N, C); or to its
    velocity (N, C)."""

    def __init__(self, kind: Mask | Flow | Velocity, c: ModelConfig) -> None:
        super().__init__()
        self.kind = kind
        match kind:
            case Mask(digits, levels, width):
                self.slots = nn.Linear(c.width, digits * width, bias=False)
                self.table = nn.Linear(width, levels)
            case Flow(channels) | Velocity(channels):
                self.value = nn.Linear(c.width, channels)

    def forward(self, x_ND: Float[Tensor, "N D"]) -> Tensor:
        match self.kind:
            case Mask(digits=digits):
                return self.table(self.slots(x_ND).unflatten(-1, (digits, -1)))
            case Flow() | Velocity():
                return self.value(x_ND)


HARMONICS = tuple(math.pi * f for f in (0.5, 1.0, 2.0, 4.0))
"""Frequencies at which a vector's time is read."""


def drawn(c: ModelConfig) -> dict[str, Mask | Flow | Velocity]:
    """The modalities that the network can write."""
    return {m: kind for m, kind in c.modalities.items() if isinstance(kind, Mask | Flow | Velocity)}


class Model(nn.Module):
    """Tokens and vectors in, hidden states out; `logits` and `clean` are the ways to read them."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        self.attention = attention_for
        """Who reads whom, for a batch; ranks that share out its tokens put their own form here."""
        self.surprise = surprise
        """How unlikely labels are under scores; ranks that share out the vocabulary put their own form here."""
        self.product = F.linear
        """How scores are found."""
        self.embed_tokens = nn.Embedding(c.vocab_size, c.width)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.norm = norm_of(c)
        if c.own_norms:
            self.norm_moe_gen = norm_of(c)
        if c.places:
            self.embed_positions = nn.Embedding(c.places, c.width)
        self.readers = nn.ModuleDict({m: Reader(kind, c) for m, kind in c.modalities.items()})
        self.writers = nn.ModuleDict({m: Writer(kind, c) for m, kind in drawn(c).items()})
        if not c.tied:
            self.lm_head = nn.Linear(c.width, c.vocab_size, bias=False)

    def forward(
        self, batch: Batch, cache: KVCache | None = None, x_TD: Float[Tensor, "T D"] | None = None
    ) -> Float[Tensor, "T D"]:
        """Hidden states (T, D) of a batch, after everything in `cache`, to which the batch is added.

        `x_TD` is what earlier layers made of the batch, where other ranks hold them.
        """
        seen = [] if x_TD is not None else self.see(batch)
        x_TD = self.embed(batch, seen) if x_TD is None else x_TD
        return self.finish(self.think(x_TD, batch, seen, cache), batch)

    def see(self, batch: Batch) -> list[tuple[Int[Tensor, "N"], Float[Tensor, "N X D"]]]:
        """Where vectors stand, and what is read in them: X rows, of which later ones are for the layers (DeepStack)."""
        seen = []
        for modality, v in batch.vectors.items():
            index_N, x_NXD = v.index, self.readers[modality](v)
            if modality == Modality.VISION or isinstance(self.config.modalities[modality], Velocity):
                # rows that stand nowhere only complete their pictures
                stands_N = (index_N >= 0).nonzero()[:, 0]
                index_N, x_NXD = index_N[stands_N], x_NXD[stands_N]
            seen.append((index_N, x_NXD if x_NXD.dim() == 3 else x_NXD[:, None]))
        return seen

    def embed(self, batch: Batch, seen: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, "T D"]:
        """Ids through the table, what `see` gives over their placeholders."""
        x_TD = self.embed_tokens(batch.tokens)
        if self.config.places:
            x_TD = x_TD + self.embed_positions(batch.positions[:, 0])
        for index_N, x_NXD in seen:
            x_TD = x_TD.index_copy(0, index_N, x_NXD[:, 0].to(x_TD.dtype))
        return x_TD

    def think(
        self, x_TD: Float[Tensor, "T D"], batch: Batch, seen: Sequence[tuple[Tensor, Tensor]], cache: KVCache | None
    ) -> Float[Tensor, "T D"]:
        """Through the layers that are here; their numbers are those of the whole network."""
        attend = self.attention(batch, cache)
        c = self.config
        rotation = None if c.places else rotations(batch.positions, c.head_width, c.theta, c.scaling, c.sections)
        route = self.route(batch)
        for name, layer in self.layers.named_children():
            index = int(name)
            x_TD = layer(x_TD, index=index, rotation=rotation, attend=attend, route=route, cache=cache)
            for index_N, x_NXD in seen:
                if index + 1 < x_NXD.shape[1]:
                    x_TD = x_TD.index_add(0, index_N, x_NXD[:, index + 1].to(x_TD.dtype))
        return x_TD

    def finish(self, x_TD: Float[Tensor, "T D"], batch: Batch) -> Float[Tensor, "T D"]:
        """The last norm, of each expert's tokens by its own if it has one."""
        if self.config.own_norms:
            route = self.route(batch)
            return rejoin([self.norm(x_TD[route[0]]), self.norm_moe_gen(x_TD[route[1]])], route)
        return self.norm(x_TD)

    def route(self, batch: Batch) -> list[Tensor]:
        """Which tokens each expert works on: text and understanding first, what is generated in spans second; none are
        named where there is one expert."""
        if self.config.experts == 1:
            return []
        spans_T = torch.zeros_like(batch.tokens, dtype=torch.bool)
        for modality, v in batch.vectors.items():
            if modality != Modality.VISION:
                spans_T[v.index[v.index >= 0]] = True
        return [(~spans_T).nonzero()[:, 0], spans_T.nonzero()[:, 0]]

    def logits(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        """Scores of the next token."""
        return self.product(x_TD, self.embed_tokens.weight) if self.config.tied else self.lm_head(x_TD)

    def clean(self, x_ND: Float[Tensor, "N D"], modality: str, value_NC: Tensor, time: Tensor | float) -> Tensor:
        """What the vectors are without corruption: digit scores (N, C, L) for masks, values (N, C) for flows.

        `value` is what was read, at its `time`, a number or (N, 1).
        """
        said = self.writers[modality](x_ND)
        return value_NC - (1 - time) * said if isinstance(self.config.modalities[modality], Velocity) else said


def surprise(logits_TV: Float[Tensor, "T V"], label_T: Int[Tensor, "T"]) -> Float[Tensor, "T"]:
    """Negative log-likelihood of each label."""
    return F.cross_entropy(logits_TV, label_T, reduction="none")


def initialise(model: Model, seed: int) -> None:
    """Weights from (seed, parameter name) alone, so that no layout or order of construction can change them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # the others are fixed tables
                parameter.copy_(first_value(model.config, name, tuple(parameter.shape), seed))


def first_value(c: ModelConfig, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """What a parameter begins with, in fp32.

    Matrices are normal with deviation 0.02, those that write to the residual stream smaller by sqrt(2 layers); tables
    of digits have deviation 0.1, since a narrow map follows them; what heads of vectors read the trunk through is zero.
    """
    table = name.endswith(".table.weight")
    if (name.startswith("writers.") and not table) or name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) < 2:
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    value = torch.randn(shape, generator=generator) * (0.1 if table else 0.02)
    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
    return value * (1 / math.sqrt(2 * c.num_layers)) if writes else value


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
