"""The language models that people already have: their configurations as ours, their tensors as ours, and both back.

A family is a translation and nothing else: no layer is written twice. Sources are the configurations and weight names
of transformers (one class a family) and, for GGUF, of llama.cpp's converter. What a configuration asks for and the
network cannot compute is refused, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litchi.config import BadInput
from litchi.model.asked import Asked, Json
from litchi.model.moe import Mixture
from litchi.model.network import Model, ModelConfig
from litchi.model.rope import Linear, Llama3, Scaling

LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
"""Families that share Llama's names; Yi and SmolLM2 are Llamas."""

CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


# ---- tensors ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Transposed:
    """A matrix that its owner multiplies from the other side."""

    def theirs(self, ours: Tensor) -> Tensor:
        return ours.T

    ours = theirs


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Rows of heads whose rotary pairs are neighbours (i, i + 1), where ours are half a head apart."""

    heads: int

    def theirs(self, ours: Tensor) -> Tensor:
        return ours.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def ours(self, theirs: Tensor) -> Tensor:
        return theirs.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True, slots=True)
class Patches:
    """A convolution over patches, channels first, where ours is a matrix over pixels with their channels last.

    With `frames` theirs also goes over so many frames, which ours has one after another.
    """

    frames: int = 0

    def theirs(self, ours: Tensor) -> Tensor:
        side = math.isqrt(ours.shape[1] // 3 // max(self.frames, 1))
        over = (self.frames, side, side, 3) if self.frames else (side, side, 3)
        return ours.unflatten(1, over).movedim(-1, 1)

    def ours(self, theirs: Tensor) -> Tensor:
        return theirs.movedim(1, -1).flatten(1)


@dataclass(frozen=True, slots=True)
class Cells:
    """A table behind a leading dimension of one."""

    def theirs(self, ours: Tensor) -> Tensor:
        return ours[None]

    def ours(self, theirs: Tensor) -> Tensor:
        return theirs[0]


@dataclass(frozen=True, slots=True)
class Row:
    """One row behind two leading dimensions of one."""

    def theirs(self, ours: Tensor) -> Tensor:
        return ours[None, None]

    def ours(self, theirs: Tensor) -> Tensor:
        return theirs[0, 0]


@dataclass(frozen=True, slots=True)
class Stacked:
    """The matrices of all experts in one tensor (Qwen3-VL's mixtures), as we have them or turned.

    The Hub's are multiplied from the other side; transformers 5 saves them as we have them, and reads both by shape.
    """

    experts: int
    rows: int
    """Of one expert of ours."""
    turned: bool

    def theirs(self, ours: Tensor) -> Tensor:
        matrices = ours.unflatten(0, (self.experts, -1))
        return matrices.transpose(1, 2) if self.turned else matrices

    def ours(self, theirs: Tensor) -> Tensor:
        return (theirs.transpose(1, 2) if self.turned else theirs).flatten(0, 1)

    def found(self, shape: Sequence[int]) -> Stacked:
        """As in a file; a square is not turned, as transformers has it."""
        return replace(self, turned=len(shape) == 3 and shape[1] != self.rows)


@dataclass(frozen=True, slots=True)
class Grouped:
    """Three projections in one, key-value head by key-value head: its queries, its key, its value (Megatron)."""

    heads: int
    groups: int

    def theirs(self, ours: Tensor) -> Tensor:
        width = ours.shape[0] // (self.heads + 2 * self.groups)
        parts = ours.split([self.heads * width, self.groups * width, self.groups * width])
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], 1).flatten(0, 1)

    def ours(self, theirs: Tensor) -> Tensor:
        rows = theirs.unflatten(0, (self.groups, self.heads // self.groups + 2, -1))
        return torch.cat([part.flatten(0, 2) for part in (rows[:, :-2], rows[:, -2:-1], rows[:, -1:])])


@dataclass(frozen=True, slots=True)
class Padded:
    """A table whose last rows no token has: ranks share the vocabulary evenly (Megatron)."""

    rows: int
    """Of ours."""
    padded: int

    def theirs(self, ours: Tensor) -> Tensor:
        return F.pad(ours, (0, 0, 0, self.padded - self.rows))

    def ours(self, theirs: Tensor) -> Tensor:
        return theirs[: self.rows]


Form = Transposed | Interleaved | Patches | Cells | Row | Stacked | Grouped | Padded


@dataclass(frozen=True, slots=True)
class Link:
    """One tensor of theirs is one or more of ours, one under the other, in another form."""

    theirs: str
    ours: tuple[str, ...]
    form: Form | None = None

    def export(self, ours: Iterable[Tensor]) -> Tensor:
        joined = torch.cat(list(ours)) if len(self.ours) > 1 else next(iter(ours))
        return joined if self.form is None else self.form.theirs(joined).contiguous()

    def adopt(self, theirs: Tensor, rows: Iterable[int]) -> list[Tensor]:
        """Ours, of so many rows each."""
        joined = theirs if self.form is None else self.form.ours(theirs)
        return list(joined.split(list(rows)))


def links(c: ModelConfig, family: str) -> list[Link]:
    """Every tensor of a checkpoint in the family's own names."""
    if family == "gpt2":
        return gpt2_links(c)
    if family == "gguf":
        return gguf_links(c)
    head = [] if c.tied else [Link("lm_head.weight", ("lm_head.weight",))]
    names = [name for name in parameters(c) if name != "lm_head.weight"]
    return [Link(llama_name(name), (name,)) for name in names] + head


def parameters(c: ModelConfig) -> dict[str, torch.Size]:
    """The names and shapes of ours; nothing is allocated."""
    with torch.device("meta"):
        return {name: p.shape for name, p in Model(c).named_parameters()}


def llama_name(ours: str) -> str:
    return f"model.{ours.replace('.experts.0.', '.', 1)}" if ours.startswith("layers.") else f"model.{ours}"


def gpt2_links(c: ModelConfig) -> list[Link]:
    """Fused, transposed projections (Conv1D), as `GPT2LMHeadModel` saves them."""
    pairs = [("wte.weight", ("embed_tokens.weight",), False), ("wpe.weight", ("embed_positions.weight",), False)]
    for i in range(c.num_layers):
        theirs, ours = f"h.{i}.", f"layers.{i}.experts.0."
        for kind in ("weight", "bias"):
            fused = tuple(f"{ours}self_attn.{p}_proj.{kind}" for p in "qkv")
            flip = kind == "weight"
            pairs += [
                (f"{theirs}ln_1.{kind}", (f"{ours}input_layernorm.{kind}",), False),
                (f"{theirs}attn.c_attn.{kind}", fused, flip),
                (f"{theirs}attn.c_proj.{kind}", (f"{ours}self_attn.o_proj.{kind}",), flip),
                (f"{theirs}ln_2.{kind}", (f"{ours}post_attention_layernorm.{kind}",), False),
                (f"{theirs}mlp.c_fc.{kind}", (f"{ours}mlp.up_proj.{kind}",), flip),
                (f"{theirs}mlp.c_proj.{kind}", (f"{ours}mlp.down_proj.{kind}",), flip),
            ]
    pairs += [(f"ln_f.{kind}", (f"norm.{kind}",), False) for kind in ("weight", "bias")]
    return [Link(f"transformer.{theirs}", ours, Transposed() if flip else None) for theirs, ours, flip in pairs]


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_links(c: ModelConfig) -> list[Link]:
    """llama.cpp's names. Its llama architecture turns neighbouring pairs; qwen2 and qwen3 turn halves, as we do."""
    turned = not (c.qkv_bias or c.qk_norm)
    found = []
    for name in parameters(c):
        stem, _, kind = name.rpartition(".")
        match stem.split("."):
            case ["layers", layer, _, _, *rest]:
                inner = ".".join(rest)
                heads = {"self_attn.q_proj": c.num_heads, "self_attn.k_proj": c.num_kv_heads}.get(inner)
                form = Interleaved(heads) if turned and heads else None
                found.append(Link(f"blk.{layer}.{GGUF_NAMES[inner]}.{kind}", (name,), form))
            case _:
                outer = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[stem]
                found.append(Link(f"{outer}.{kind}", (name,)))
    return found


# ---- configurations: in -------------------------------------------------------------------------------------------


def family_of(config: Json) -> str:
    family = config.get("model_type")
    if family not in CLASSES:
        raise BadInput(f"model_type {family!r} is not one that can be read; these are: {', '.join(CLASSES)}")
    return family


def read_config(config: Json) -> ModelConfig:
    """The `config.json` of transformers as ours. Raises BadInput for what the network cannot compute."""
    family = family_of(config)
    return read_gpt2(config) if family == "gpt2" else read_llama(config, family)


def read_gpt2(config: Json) -> ModelConfig:
    asked = Asked(config, "gpt2")
    asked.only("activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    asked.only("scale_attn_weights", True, True)
    asked.only("scale_attn_by_inverse_layer_idx", False, False)
    asked.only("add_cross_attention", False, False)
    width, heads = asked.number("n_embd"), asked.number("n_head")
    return ModelConfig(
        vocab_size=asked.number("vocab_size"),
        width=width,
        num_layers=asked.number("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_width=asked.divided(width, heads),
        mlp_width=config.get("n_inner") or 4 * width,
        qk_norm=False,
        tied=bool(config.get("tie_word_embeddings", True)),
        epsilon=config.get("layer_norm_epsilon", 1e-5),
        places=asked.number("n_positions"),
        norm="layer",
        activation="gelu",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        max_length=asked.number("n_positions"),
    )


def read_llama(config: Json, family: str) -> ModelConfig:
    asked = Asked(config, family)
    asked.only("hidden_act", "silu", "silu")
    width, heads = asked.number("hidden_size"), asked.number("num_attention_heads")
    bias = bool(config.get("attention_bias", False))
    theta, scaling = read_rope(config, family)
    return ModelConfig(
        vocab_size=asked.number("vocab_size"),
        width=width,
        num_layers=asked.number("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_width=config.get("head_dim") or asked.divided(width, heads),
        mlp_width=asked.number("intermediate_size"),
        theta=theta,
        scaling=scaling,
        qk_norm=family in ("qwen3", "qwen3_moe"),
        tied=bool(config.get("tie_word_embeddings", False)),
        epsilon=config.get("rms_norm_eps", 1e-6),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias and family != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)),
        mixture=read_mixture(asked) if family == "qwen3_moe" else None,
        max_length=read_length(config, family),
    )


def read_rope(config: Json, family: str) -> tuple[float, Scaling | None]:
    """The base and the stretching; `rope_parameters` since transformers 5, two keys before."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return float(theta), None
        case "linear":
            return float(theta), Linear(float(rope["factor"]))
        case "llama3":
            factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
            return float(theta), Llama3(factor, low, high, int(rope["original_max_position_embeddings"]))
        case other:
            raise BadInput(
                f"{family}: rotary positions of type {other!r} cannot be computed; default, linear, llama3 can"
            )


def read_mixture(asked: Asked) -> Mixture:
    asked.only("decoder_sparse_step", 1, 1)
    asked.only("mlp_only_layers", [], [], None)
    return Mixture(
        num_experts=asked.number("num_local_experts" if "num_local_experts" in asked.config else "num_experts"),
        num_chosen=asked.number("num_experts_per_tok"),
        width=asked.number("moe_intermediate_size"),
        renormalise=bool(asked.config.get("norm_topk_prob", False)),
    )


def read_length(config: Json, family: str) -> int:
    """A text up to a sliding window is read the same without one; a longer one is refused when it comes."""
    length = config.get("max_position_embeddings", 0)
    sliding = config.get("use_sliding_window", family == "mistral") and config.get("sliding_window")
    return min(length or sliding, sliding) if sliding else length


def read_gguf(metadata: Json, tensors: Mapping[str, Any]) -> ModelConfig:
    """The metadata of a GGUF file as our configuration; `tensors` are its entries, whose presence tells flags."""
    family = metadata.get("general.architecture")
    if family not in ("llama", "qwen2", "qwen3"):
        raise BadInput(f"a GGUF of architecture {family!r} cannot be read; llama, qwen2 and qwen3 can")
    asked = Asked({key.removeprefix(f"{family}."): value for key, value in metadata.items()}, f"GGUF {family}")
    if (kind := asked.config.get("rope.scaling.type", "none")) not in (
        "none",
        "linear",
    ) or "rope_freqs.weight" in tensors:
        raise BadInput(f"GGUF {family}: scaled rotary positions ({kind}) cannot be read; convert the original folder")
    factor = asked.config.get("rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    width, heads = asked.number("embedding_length"), asked.number("attention.head_count")
    return ModelConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        width=width,
        num_layers=asked.number("block_count"),
        num_heads=heads,
        num_kv_heads=asked.config.get("attention.head_count_kv") or heads,
        head_width=asked.config.get("attention.key_length") or asked.divided(width, heads),
        mlp_width=asked.number("feed_forward_length"),
        theta=float(asked.config.get("rope.freq_base", 10_000.0)),
        scaling=Linear(float(factor)) if factor != 1.0 else None,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        tied="output.weight" not in tensors,
        epsilon=float(asked.config["attention.layer_norm_rms_epsilon"]),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        max_length=asked.config.get("context_length", 0),
    )


# ---- configurations: out ------------------------------------------------------------------------------------------


def fitting_family(c: ModelConfig) -> str:
    """The family that computes what a configuration says. Raises BadInput if none does."""
    if c.experts > 1:
        raise BadInput("no family of transformers has two experts a layer that read each other: export the first")
    if c.places:
        family = "gpt2"
    elif c.mixture:
        family = "qwen3_moe"
    elif c.qk_norm:
        family = "qwen3"
    else:
        family = "qwen2" if c.qkv_bias and not c.out_bias else "llama"
    found = read_config(write_config(c, family))
    ignored = {"modalities": {}, "grid": c.grid, "max_length": c.max_length}
    if differing := [k for k in ModelConfig.__slots__ if getattr(found, k) != ignored.get(k, getattr(c, k))]:
        raise BadInput(f"{CLASSES[family]} is nearest, but it cannot say {', '.join(differing)}")
    return family


def write_config(c: ModelConfig, family: str) -> dict[str, Any]:
    """The `config.json` with which transformers builds the same network."""
    head = {"model_type": family, "architectures": [CLASSES[family]], "vocab_size": c.vocab_size}
    head |= {"tie_word_embeddings": c.tied, "torch_dtype": "float32"}
    if family == "gpt2":
        sizes = {"n_embd": c.width, "n_layer": c.num_layers, "n_head": c.num_heads, "n_inner": c.mlp_width}
        return head | sizes | {"n_positions": c.places, "layer_norm_epsilon": c.epsilon}
    body = {
        "hidden_size": c.width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_width,
        "intermediate_size": c.mlp_width,
        "rms_norm_eps": c.epsilon,
        "hidden_act": "silu",
        "rope_theta": c.theta,
        "rope_scaling": write_scaling(c.scaling),
        "attention_bias": c.out_bias,
        "mlp_bias": c.mlp_bias,
    }
    if c.max_length:
        body["max_position_embeddings"] = c.max_length
    if c.mixture is not None:
        m = c.mixture
        body |= {
            "num_experts": m.num_experts,
            "num_local_experts": m.num_experts,
            "num_experts_per_tok": m.num_chosen,
            "moe_intermediate_size": m.width,
        }
        body |= {"norm_topk_prob": m.renormalise, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return head | body | ({"sliding_window": None} if family == "mistral" else {})


def write_scaling(scaling: Scaling | None) -> dict[str, Any] | None:
    match scaling:
        case Linear(factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3(factor, low, high, length):
            ends = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": length}
            return {"rope_type": "llama3", "factor": factor} | ends
    return None
