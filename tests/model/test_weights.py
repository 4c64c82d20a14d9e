"""A checkpoint comes back as it was saved, under names that others know, and refuses to be anything else."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from litchi.config import BadInput, to_json
from litchi.model.network import Model, ModelConfig
from litchi.model.weights import from_hugging_face, load, save, seal, to_hugging_face
from litchi.schema.sample import Image, Role, Sample, Text
from tests.laws.documents import model, processor

PROCESSOR = processor()
PIXELS = np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "step"
    save(folder, model(PROCESSOR), PROCESSOR, meta={"step": 3}, run='{"name": "test"}')
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def weights_of(net: Model) -> dict[str, torch.Tensor]:
    return dict(net.state_dict())


@pytest.mark.parametrize("experts", [1, 2])
def test_a_checkpoint_comes_back_exactly(tmp_path: Path, experts: int) -> None:
    net = model(PROCESSOR, experts=experts)
    save(tmp_path / "step", net, PROCESSOR, meta={"step": 7, "seconds": 0.1})
    loaded = load(tmp_path / "step")
    assert loaded.meta["step"] == 7 and loaded.meta["seconds"] == 0.1
    assert loaded.model.config == net.config
    assert weights_of(loaded.model).keys() == weights_of(net).keys()
    assert all(torch.equal(t, weights_of(loaded.model)[name]) for name, t in weights_of(net).items())


def test_bfloat16_rounds_each_weight_once(tmp_path: Path) -> None:
    net = model(PROCESSOR)
    save(tmp_path / "step", net, PROCESSOR, meta={}, dtype=torch.bfloat16)
    found = weights_of(load(tmp_path / "step").model)
    assert all(torch.equal(t.bfloat16().float(), found[name]) for name, t in weights_of(net).items())


def test_the_processor_travels_with_the_weights(saved: Path) -> None:
    again = load(saved).processor
    parts = (Text(text="the red ball", role=Role.USER), Image(pixels=PIXELS, role=Role.ASSISTANT, weight=1.0))
    before, after = (p.encode(Sample(parts, "a", "b"), np.random.default_rng(0)) for p in (PROCESSOR, again))
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.vectors["image"].value, after.vectors["image"].value)
    assert again.spaces == PROCESSOR.spaces and again.noising == PROCESSOR.noising


def test_a_second_save_takes_the_place_of_the_first(tmp_path: Path) -> None:
    for seed in (0, 1):
        save(tmp_path / "step", model(PROCESSOR, seed=seed), PROCESSOR, meta={"seed": seed})
    assert load(tmp_path / "step").meta["seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step"]


# ---- names --------------------------------------------------------------------------------------------------------

QWEN3 = {
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    *(
        f"model.layers.{layer}.{module}.weight"
        for layer in range(2)
        for module in (
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "self_attn.q_norm",
            "self_attn.k_norm",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ),
}
"""All names of a Qwen3ForCausalLM of two layers, as transformers writes them."""

BAGEL = {
    f"model.layers.0.{module}.weight"
    for module in (
        "input_layernorm_moe_gen",
        "post_attention_layernorm_moe_gen",
        "self_attn.q_proj_moe_gen",
        "self_attn.k_proj_moe_gen",
        "self_attn.v_proj_moe_gen",
        "self_attn.o_proj_moe_gen",
        "self_attn.q_norm_moe_gen",
        "self_attn.k_norm_moe_gen",
        "mlp_moe_gen.gate_proj",
        "mlp_moe_gen.up_proj",
        "mlp_moe_gen.down_proj",
    )
}
"""What BAGEL's Qwen2MoTDecoderLayer calls the generation expert of a layer."""


def text_only(experts: int, num_layers: int) -> ModelConfig:
    return ModelConfig(vocab_size=40, width=16, num_layers=num_layers, mlp_width=24, experts=experts, tied=False)


def test_a_text_model_has_exactly_the_names_of_qwen3() -> None:
    assert {to_hugging_face(name) for name in Model(text_only(1, 2)).state_dict()} == QWEN3


def test_a_second_expert_has_the_names_of_bagel() -> None:
    names = {to_hugging_face(name) for name in Model(text_only(2, 1)).state_dict()}
    assert {name for name in names if "moe_gen" in name} == BAGEL
    assert {name for name in names if "moe_gen" not in name} <= QWEN3


@pytest.mark.parametrize("experts", [1, 2])
def test_names_go_both_ways(experts: int) -> None:
    names = list(model(PROCESSOR, experts=experts).state_dict())
    assert [from_hugging_face(to_hugging_face(name)) for name in names] == names
    assert len({to_hugging_face(name) for name in names}) == len(names)


# ---- damage -------------------------------------------------------------------------------------------------------

FILES = (
    "meta.json",
    "model/config.json",
    "model/model.safetensors",
    "processor/codec.safetensors",
    "processor/processor.json",
    "processor/tokenizer.json",
    "run.json",
)


def test_a_folder_holds_these_files_and_none_is_a_pickle(saved: Path) -> None:
    files = sorted(p for p in saved.rglob("*") if p.is_file())
    assert tuple(str(p.relative_to(saved)) for p in files) == FILES
    for path in files:
        if path.suffix == ".safetensors":
            load_file(path)
        else:
            json.loads(path.read_text())


@pytest.mark.parametrize("name", FILES[1:])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_changed_bit_is_refused_by_the_name_of_its_file(saved: Path, name: str, share: float, bit: int) -> None:
    path, whole = saved / name, (saved / name).read_bytes()
    changed = bytearray(whole)
    changed[int(share * len(whole))] ^= 1 << bit
    try:
        path.write_bytes(changed)
        with pytest.raises(BadInput, match=f"{name} has changed since it was saved"):
            load(saved)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BadInput, match=f"{name}"):
        load(copy)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "meta.json is not JSON"),
        (lambda text: "[1]", "meta.json is no JSON object"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format 2, this version reads 1: update litchi"),
        (lambda text: text.replace('"step": 3', '"step": 4'), "meta.json has changed since it was saved"),
    ],
)
def test_a_changed_meta_is_refused(copy: Path, damage: Callable[[str], str], said: str) -> None:
    path = copy / "meta.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(BadInput, match=said):
        load(copy)


def test_a_checkpoint_without_a_seal_is_still_read(copy: Path) -> None:
    meta = json.loads((copy / "meta.json").read_text())
    del meta["sha256"]
    (copy / "meta.json").write_text(json.dumps(meta))
    assert load(copy).meta["step"] == 3


def forge(folder: Path, name: str) -> None:
    """Make every checksum fit a file that was changed."""
    meta = json.loads((folder / "meta.json").read_text())
    del meta["sha256"]
    meta["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps({**meta, "sha256": seal(meta)}))


def test_golden_logits_catch_weights_that_were_exchanged_with_their_checksums(copy: Path) -> None:
    name = "model/model.safetensors"
    weights = load_file(copy / name)
    first, second = (f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))
    weights[first], weights[second] = weights[second], weights[first]
    save_file(weights, copy / name)
    forge(copy, name)
    with pytest.raises(BadInput, match="golden logits differ"):
        load(copy)


def test_a_load_does_not_wait_for_torch_s_compiler(saved: Path) -> None:
    """Which takes a second to import, and came along with the first values of parameters that have no memory."""
    code = f"import sys, pathlib, litchi.model.weights as w; w.load(pathlib.Path({str(saved)!r}))"
    code += "; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_of_another_architecture_are_refused(copy: Path) -> None:
    config = model(PROCESSOR, experts=2).config
    (copy / "model" / "config.json").write_text(to_json(config))
    forge(copy, "model/config.json")
    with pytest.raises(BadInput, match="weights and config.json do not fit"):
        load(copy)
