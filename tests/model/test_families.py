"""Every family equals transformers on a small random model, both ways; what cannot be computed is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from litchi.config import BadInput
from litchi.model.convert import export, load_foreign, open_foreign
from litchi.model.families import parameters, read_config, write_config
from litchi.model.layout import pieces
from litchi.model.network import Model, ModelConfig, initialise
from litchi.model.presets import PRESETS, preset
from litchi.schema.processor import Builder
from litchi.schema.sequence import pack
from tests.model.table import digit, record

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80, "vocab_size": 97}
SIZES |= {"max_position_embeddings": 64, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 10_000.0}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}

MODELS = {
    "GPT-2": ("GPT2", {"n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": 97, "n_positions": 64}),
    "Llama 2": ("Llama", SIZES | {"num_key_value_heads": 4}),
    "Llama 3": ("Llama", SIZES | {"rope_parameters": LLAMA3}),
    "Llama with biases": ("Llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "Yi": ("Llama", SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "rms_norm_eps": 1e-5}),
    "SmolLM2": ("Llama", SIZES | {"tie_word_embeddings": True}),
    "Mistral": ("Mistral", SIZES | {"sliding_window": 64}),
    "Qwen2.5": ("Qwen2", SIZES),
    "Qwen3": ("Qwen3", SIZES | {"head_dim": 16}),
    "Qwen3 MoE": ("Qwen3Moe", SIZES | {"head_dim": 16, "norm_topk_prob": True} | MOE),
}
TOLERANCE = 1e-4
"""Of logits, fp32: the same sums in another order."""


def build(name: str):
    """A random model of transformers; weights far enough from their first values for every part of it to count."""
    family, sizes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**sizes, attn_implementation="eager")
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    net = getattr(transformers, class_of(family))(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net


def class_of(family: str) -> str:
    return "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"


@torch.no_grad()
def scores(model: Model, ids: list[int]) -> torch.Tensor:
    builder = Builder()
    for i in ids:
        builder.token(i)
    return model.logits(model(pack([builder.build()])))


def greedy(model: Model, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(scores(model, ids)[-1].argmax()))
    return ids


@pytest.mark.parametrize("name", MODELS)
def test_a_family_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """Logits, greedy continuations, and the weights written back, bit for bit."""
    theirs = build(name)
    theirs.save_pretrained(tmp_path / "in")
    ours = load_foreign(tmp_path / "in")
    ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        gap = float((scores(ours, ids) - theirs(torch.tensor([ids])).logits[0]).abs().max())
        told = theirs.generate(torch.tensor([ids[:8]]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert gap <= TOLERANCE
    assert greedy(ours, ids[:8], 24) == told[0].tolist()

    foreign = open_foreign(tmp_path / "in")
    weights = dict(ours.named_parameters())
    export(tmp_path / "out", foreign.config, lambda n: weights[n], original=foreign.original)
    back = type(theirs).from_pretrained(tmp_path / "out", dtype=torch.float32)
    state = theirs.state_dict()
    assert set(state) == set(back.state_dict())
    assert all(torch.equal(tensor, state[n]) for n, tensor in back.state_dict().items())
    record("model", name, f"`{class_of(MODELS[name][0])}`", digit(gap), "24 of 24 tokens", "bit for bit")


@pytest.mark.parametrize("name", MODELS)
def test_a_network_of_ours_is_written_for_transformers(name: str, tmp_path: Path) -> None:
    """Without a configuration of theirs to go by, one is made that computes the same."""
    theirs = build(name)
    theirs.save_pretrained(tmp_path / "in")
    ours = load_foreign(tmp_path / "in")
    weights = dict(ours.named_parameters())
    export(tmp_path / "out", ours.config, lambda n: weights[n])
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = list(range(5, 30))
    with torch.no_grad():
        assert (back(torch.tensor([ids])).logits[0] - scores(ours, ids)).abs().max() <= TOLERANCE


def test_the_trunk_of_our_own_model_is_a_qwen3(tmp_path: Path) -> None:
    ours = Model(ModelConfig(vocab_size=50, width=32, num_layers=2, num_heads=2, num_kv_heads=2, head_width=16))
    initialise(ours, 0)
    weights = dict(ours.named_parameters())
    assert export(tmp_path, ours.config, lambda n: weights[n]) == "qwen3"
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = list(range(20))
    with torch.no_grad():
        assert (back(torch.tensor([ids])).logits[0] - scores(ours.eval(), ids)).abs().max() <= TOLERANCE


def test_shards_are_read_as_one_folder(tmp_path: Path) -> None:
    theirs = build("SmolLM2")
    theirs.save_pretrained(tmp_path / "in", max_shard_size="50kB")
    assert (tmp_path / "in" / "model.safetensors.index.json").is_file()
    ours = load_foreign(tmp_path / "in")
    assert torch.equal(dict(ours.named_parameters())["norm.weight"], theirs.model.norm.weight)


def spoil(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CUT = "model.layers.1.mlp.up_proj.weight"
SPOILT = {
    "missing": (lambda t: t.pop(CUT), "has no 'model.layers.1.mlp.up_proj.weight'"),
    "left over": (lambda t: t.update(other=torch.zeros(2)), "nothing reads, such as 'other'"),
    "wrong shape": (lambda t: t.update({CUT: torch.zeros(3, 48)}), r"shape \[3, 48\], config.json asks for \[80, 48\]"),
    "not a number": (lambda t: t[CUT].fill_(float("nan")), "NaN"),
    "an own head": (lambda t: t.update({"lm_head.weight": torch.zeros(97, 48)}), "ties them"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_weights_that_do_not_fit_are_refused_by_name(how: str, tmp_path: Path) -> None:
    build("SmolLM2").save_pretrained(tmp_path)
    change, reason = SPOILT[how]
    spoil(tmp_path, change)
    with pytest.raises(BadInput, match=reason):
        load_foreign(tmp_path)


LLAMA = {"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA |= {"intermediate_size": 8, "vocab_size": 9}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "mamba"}, "'mamba' is not one"),
        ({"model_type": None}, "None is not one"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"num_attention_heads": 5}, "does not divide into 5 heads"),
        ({"hidden_size": "48"}, "hidden_size as a number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "'yarn'"),
    ],
)
def test_what_cannot_be_computed_is_refused(change: dict, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        read_config(LLAMA | change)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_the_way_to_transformers_and_back(name: str) -> None:
    c = replace(preset(name), modalities={})
    family = "gpt2" if c.places else "qwen2" if c.qkv_bias else "llama"
    assert read_config(json.loads(json.dumps(write_config(c, family)))) == c


@pytest.mark.parametrize(("name", "expected"), [("yi-34b", 34_388_917_248), ("smollm2-135m", 134_515_008)])
def test_presets_have_exactly_as_many_parameters(name: str, expected: int) -> None:
    assert sum(shape.numel() for shape in parameters(preset(name)).values()) == expected


def test_pieces_of_a_34b_model_make_it_whole() -> None:
    c = preset("yi-34b")
    found = list(pieces(c, tensor=8, pipeline=2))
    whole = {name: tuple(shape) for name, shape in parameters(c).items()}
    split = sum(p.size for p in found if p.dim is not None)
    copied = sum(p.size for p in found if p.dim is None and p.rank == 0)
    assert split + copied == sum(torch.Size(s).numel() for s in whole.values())
    ranks = {(p.stage, p.rank): 0 for p in found}
    for p in found:
        ranks[p.stage, p.rank] += p.size
    assert len(ranks) == 16 and max(ranks.values()) / min(ranks.values()) < 1.01


def test_layouts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(BadInput, match="56 heads cannot be divided over 16 ranks"):
        list(pieces(preset("yi-34b"), tensor=16, pipeline=1))
    with pytest.raises(BadInput, match="from 1 up"):
        list(pieces(preset("yi-34b"), tensor=0, pipeline=1))
    with pytest.raises(BadInput, match="60 layers"):
        list(pieces(preset("yi-34b"), tensor=8, pipeline=61))
