"""Megatron-core's GPT is Llama, Qwen2 or Qwen3 under other names: its layers in a stack, its projections in one matrix.

What is read: `--ckpt-format torch_dist` (layers stacked, or each under its number) of models with RMSNorm, SwiGLU and
rotary positions. The configuration is the config.json of a Hugging Face model beside it, or the arguments that
Megatron-LM saved; where both are there they must agree. Sources: megatron/core/models/gpt, transformer/attention.py
(`get_query_key_value_tensors`), transformer/mlp.py (`apply_swiglu_sharded_factory`), training/checkpointing.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model.distcheckpoint import Distributed
from litchi.model.families import Asked, Grouped, Link, Padded, read_config
from litchi.model.network import ModelConfig
from litchi.model.pickled import Made
from litchi.model.tensorfile import Entry, TensorFile, map_file, show
from litchi.model.torchzip import kind_of, open_archive

ANCHOR = "embedding.word_embeddings.weight"
COMMON, COMMON_STATE = "common.pt", "common_state/shard_0_1"
"""Where the arguments are: a file or, since 2026, a blob under this name."""

STACK, MAX_LAYERS = "decoder.layers.", 4096
"""What is in a layer begins so; a stack that claims more layers is left with layers that nothing reads."""

UNSEEN = ("theta", "scaling", "epsilon", "num_heads", "num_kv_heads", "head_width", "qk_norm", "tied")
"""What shapes do not tell, so that the arguments and a config.json must agree on it."""


@dataclass(frozen=True, slots=True)
class Where:
    """The tensor under which one is stored, and its row there if it is a layer of a stack."""

    stored: str
    row: int | None


class Layers(TensorFile):
    """The weights of a checkpoint one layer at a time, without the prefix of whoever saved them."""

    metadata: Mapping[str, Any] = {}

    def __init__(self, file: Distributed, stored: Mapping[str, str]) -> None:
        """`stored`: Megatron's own name of a weight -> the name under which the checkpoint has it."""
        self.path, self._file = file.path, file
        self._where = dict(rows_of(file, stored))
        self.entries = {name: sliced(name, file.entries[w.stored], w.row) for name, w in self._where.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        where = self._where.get(name, Where(name, None))
        if where.row is None:
            return self._file.read(where.stored, dtype)
        return self._file.read_row(where.stored, where.row, dtype)

    def close(self) -> None:
        self._file.close()


def rows_of(file: Distributed, stored: Mapping[str, str]) -> Iterator[tuple[str, Where]]:
    """A stack of layers is as many weights; what has a number in its name, or is in no layer, is one."""
    seen: set[str] = set()
    for name, at in stored.items():
        inner, shape = name.removeprefix(STACK), file.entries[at].shape
        if name.startswith(STACK) and not inner.partition(".")[0].isdigit() and shape:
            found = [(f"{STACK}{row}.{inner}", Where(at, row)) for row in range(min(shape[0], MAX_LAYERS))]
        else:
            found = [(name, Where(at, None))]
        if twice := seen & {each for each, _ in found}:
            raise BadInput(f"{file.path} holds {show(min(twice))} twice, in a stack of layers and by itself")
        seen |= {each for each, _ in found}
        yield from found


def sliced(name: str, entry: Entry, row: int | None) -> Entry:
    return Entry(name, entry.shape if row is None else entry.shape[1:], entry.dtype, 0, 0)


# ---- tensors ------------------------------------------------------------------------------------------------------


def megatron_links(c: ModelConfig, entries: Mapping[str, Entry]) -> list[Link]:
    """Every weight of the network under Megatron's names; `entries` tell which of two names a checkpoint uses."""
    found = [Link(ANCHOR, ("embed_tokens.weight",), padding(c, entries, ANCHOR))]
    for i in range(c.num_layers):
        found += layer_links(c, entries, f"{STACK}{i}.", f"layers.{i}.experts.0.")
    found.append(Link("decoder.final_layernorm.weight", ("norm.weight",)))
    if not c.tied:
        found.append(Link("output_layer.weight", ("lm_head.weight",), padding(c, entries, "output_layer.weight")))
    return found


def layer_links(c: ModelConfig, entries: Mapping[str, Entry], theirs: str, ours: str) -> list[Link]:
    attention, mlp = f"{ours}self_attn.", f"{ours}mlp."
    found = [
        Link(norm(entries, theirs, "self_attention.linear_qkv", "input_layernorm"), (f"{ours}input_layernorm.weight",)),
        Link(norm(entries, theirs, "mlp.linear_fc1", "pre_mlp_layernorm"), (f"{ours}post_attention_layernorm.weight",)),
    ]
    if c.qk_norm:
        found += [
            Link(f"{theirs}self_attention.{p}_layernorm.weight", (f"{attention}{p}_norm.weight",)) for p in ("q", "k")
        ]
    for kind, qkv, out, inner in (("weight", True, True, True), ("bias", c.qkv_bias, c.out_bias, c.mlp_bias)):
        if qkv:
            fused = tuple(f"{attention}{p}_proj.{kind}" for p in "qkv")
            found.append(Link(f"{theirs}self_attention.linear_qkv.{kind}", fused, Grouped(c.num_heads, c.num_kv_heads)))
        if out:
            found.append(Link(f"{theirs}self_attention.linear_proj.{kind}", (f"{attention}o_proj.{kind}",)))
        if inner:
            gate, up = f"{mlp}gate_proj.{kind}", f"{mlp}up_proj.{kind}"
            if (apart := f"{theirs}mlp.linear_fc1.{kind}_w") in entries:
                found += [Link(apart, (gate,)), Link(f"{theirs}mlp.linear_fc1.{kind}_v", (up,))]
            else:
                found.append(Link(f"{theirs}mlp.linear_fc1.{kind}", (gate, up)))
            found.append(Link(f"{theirs}mlp.linear_fc2.{kind}", (f"{mlp}down_proj.{kind}",)))
    return found


def norm(entries: Mapping[str, Entry], layer: str, projection: str, alone: str) -> str:
    """A norm is saved with the projection that follows it, as Transformer Engine has it, or by itself."""
    apart = f"{layer}{alone}.weight"
    return apart if apart in entries else f"{layer}{projection}.layer_norm_weight"


def padding(c: ModelConfig, entries: Mapping[str, Entry], name: str) -> Padded | None:
    rows = entries[name].shape[0] if name in entries and entries[name].shape else 0
    return Padded(c.vocab_size, rows) if rows > c.vocab_size else None


# ---- configuration ------------------------------------------------------------------------------------------------


def read_arguments(file: Distributed) -> dict[str, Any] | None:
    """The arguments with which Megatron-LM was started, or None if whoever saved the folder kept none."""
    path = file.path / COMMON
    if path.is_file():
        data = map_file(path)
        tree = open_archive(path, data, 0, len(data), None).tree
    elif (blob := file.blobs.get(COMMON_STATE)) is not None:
        path = file.path / blob.file
        tree = open_archive(path, map_file(path), blob.begin, blob.begin + blob.length, None).tree
        tree = tree[0] if isinstance(tree, list) and tree else None
    else:
        return None
    found = tree.get("args") if isinstance(tree, dict) else None
    state = found.state if isinstance(found, Made) else found
    return {str(key): plain(value) for key, value in state.items()} if isinstance(state, dict) else None


def plain(value: Any) -> Any:
    """What is neither text nor a number says only what it is: nothing here asks more of it."""
    small = isinstance(value, int | float) and abs(value) < 1 << 62
    return value if value is None or small or isinstance(value, str) else kind_of(value)


def said_config(args: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that says what Megatron's arguments say. Raises BadInput for what the network cannot compute."""
    asked = Asked(args, "Megatron")
    for key, default, can in COMPUTED:
        asked.only(key, default, *can)
    normed, biased, qkv = (bool(args.get(key)) for key in ("qk_layernorm", "add_bias_linear", "add_qkv_bias"))
    if normed and (biased or qkv):
        raise BadInput("Megatron: qk_layernorm with biases is no family that can be read: Qwen3 has none")
    heads = args.get("num_attention_heads")
    return {
        "model_type": "qwen3" if normed else "qwen2" if qkv and not biased else "llama",
        "architectures": ["Qwen3ForCausalLM" if normed else "Qwen2ForCausalLM" if qkv and not biased else LLAMA],
        "vocab_size": args.get("vocab_size") or args.get("padded_vocab_size"),
        "hidden_size": args.get("hidden_size"),
        "num_hidden_layers": args.get("num_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": args.get("num_query_groups") if args.get("group_query_attention") else heads,
        "head_dim": args.get("kv_channels"),
        "intermediate_size": args.get("ffn_hidden_size"),
        "max_position_embeddings": args.get("max_position_embeddings") or 0,
        "rms_norm_eps": args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5)),
        "rope_theta": float(args.get("rotary_base") or 10_000),
        "rope_scaling": said_scaling(args),
        "hidden_act": "silu",
        "tie_word_embeddings": not args.get("untie_embeddings_and_output_weights", False),
        "attention_bias": biased,
        "mlp_bias": biased,
    }


LLAMA = "LlamaForCausalLM"
COMPUTED: tuple[tuple[str, Any, tuple], ...] = (
    ("normalization", "LayerNorm", ("RMSNorm",)),
    ("swiglu", False, (True,)),
    ("position_embedding_type", "learned_absolute", ("rope",)),
    ("rotary_percent", 1.0, (1.0, 1)),
    ("rotary_interleaved", False, (False, None)),
    ("apply_layernorm_1p", False, (False, None)),
    ("num_experts", None, (None,)),
    ("multi_latent_attention", False, (False, None)),
    ("mtp_num_layers", None, (None, 0)),
    ("window_size", None, (None,)),
    ("no_rope_freq", None, (None,)),
    ("qk_l2_norm", False, (False, None)),
    ("attention_output_gate", False, (False, None)),
    ("softmax_type", "vanilla", ("vanilla", None)),
    ("hybrid_layer_pattern", None, (None,)),
    ("hybrid_override_pattern", None, (None,)),
    ("heterogeneous_layers_config_path", None, (None,)),
)
"""Arguments that change what is computed, Megatron's default, and what of each this network computes."""


def said_scaling(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """Llama 3's stretching has one free number in Megatron; the others stand in rotary_pos_embedding.py."""
    factor = args.get("rotary_seq_len_interpolation_factor")
    if args.get("use_rope_scaling"):
        ends = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        return {"rope_type": "llama3", "factor": float(args.get("rope_scaling_factor", 8.0))} | ends
    return {"rope_type": "linear", "factor": float(factor)} if factor not in (None, 1) else None


def check_agreement(file: Distributed, args: Mapping[str, Any], original: Mapping[str, Any]) -> None:
    """Raises BadInput where config.json and the arguments would compute differently with the same shapes."""
    told, said = read_config(original), read_config(said_config(args))
    for field in UNSEEN:
        if (a := getattr(told, field)) != (b := getattr(said, field)):
            raise BadInput(
                f"{file.path}: config.json gives {field} as {a}, Megatron's own arguments as {b}: correct config.json,"
                f" or take {COMMON} away if it is of another model"
            )
