"""An adapter is what PEFT says it is, strangers' folders are refused by what is wrong with them, and its two products
keep the rules of exactness on both paths."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from litchi.config import BadInput
from litchi.model import exact
from litchi.model.adapters import MAX_RANK, Adapter, read_adapter
from litchi.model.compiled import compiler
from litchi.model.lowrank import Adapters
from litchi.model.native_adapters import PackedAdapters
from litchi.model.network import Model
from litchi.model.packing import Format
from litchi.model.rope import rotations
from litchi.schema.sequence import pack
from tests.model.lora_folders import lora_folder, lora_tensors
from tests.model.test_native import FORMATS, PLAIN, SMALL, Subject, document, ends, network

native = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


def merged(net: Model, adapter: Adapter) -> Model:
    """The network with an adapter within its matrices: what is said elsewhere to be the same."""
    found = deepcopy(net)
    for module, update in adapter.updates.items():
        found.get_submodule(module).weight.data += update.up @ update.down
    return found


def read(folder: Path, net: Model, name: str = "x") -> Adapter:
    return read_adapter(folder, name, net)


# ---- what a folder says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": 3}, 0.75),
        ({"lora_alpha": 3, "use_rslora": True}, 1.5),
        ({"alpha_pattern": {"layers.1.mlp.down_proj": 8}}, 2.0),
        ({"alpha_pattern": {"down_proj": 1.0, "o_proj": 16}}, 0.25),
    ],
)
def test_an_adapter_is_what_its_matrices_say_merged(tmp_path: Path, said: dict, scale: float) -> None:
    net = network(SMALL)
    adapter = read(lora_folder(tmp_path, net, **said), net)
    theirs = load_file(tmp_path / "adapter_model.safetensors")
    name = "layers.1.self_attn.v_proj" if "alpha_pattern" not in said else "layers.1.mlp.down_proj"
    update = adapter.updates["layers.1.experts.0" + name.removeprefix("layers.1")]
    assert torch.equal(update.down, theirs[f"base_model.model.model.{name}.lora_A.weight"])
    torch.testing.assert_close(update.up, scale * theirs[f"base_model.model.model.{name}.lora_B.weight"])
    batch, adapters = pack([document(40, seed=1)]), Adapters(net, [adapter])
    with torch.no_grad():
        base, whole = net(batch), merged(net, adapter)(batch)
        with adapters.whole("x"):
            ours = net(batch)
        # sums in another order, through two layers whose attention is far from even
        torch.testing.assert_close(ours, whole, atol=2e-3, rtol=2e-3)
        assert (ours - base).abs().mean() > 100 * (ours - whole).abs().mean()
        assert torch.equal(net(batch), base), "nobody reads with it any more"


def test_ranks_may_differ_by_module(tmp_path: Path) -> None:
    net = network(SMALL)
    tensors = lora_tensors(net, rank=4, targets=("q_proj",)) | lora_tensors(net, rank=7, targets=("up_proj",))
    lora_folder(tmp_path, net, targets=("q_proj", "up_proj"), rank_pattern={"up_proj": 7}, lora_alpha=7)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    updates = read(tmp_path, net).updates
    assert {len(update.down) for name, update in updates.items() if "up_proj" in name} == {7}
    given = tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    torch.testing.assert_close(updates["layers.0.experts.0.mlp.up_proj"].up, given)


def test_the_digest_is_that_of_all_that_bits_depend_on(tmp_path: Path) -> None:
    net = network(SMALL)
    first = read(lora_folder(tmp_path, net), net)
    assert read(lora_folder(tmp_path, net, lora_dropout=0.5, task_type=None), net, "y").digest == first.digest
    for said in ({"lora_alpha": 9}, {"seed": 1}, {"rank": 3}, {"targets": ("q_proj",)}):
        assert read(lora_folder(tmp_path / str(said), net, **said), net).digest != first.digest


# ---- strangers ----------------------------------------------------------------------------------------------------

CONFIGS = {
    "DoRA": ({"use_dora": True}, "use_dora is True, which asks for DoRA"),
    "biases": ({"bias": "lora_only"}, "biases that were trained with it"),
    "biases of its own": ({"lora_bias": True}, "lora_bias is True"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules that were trained whole"),
    "copied layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layers that are copied"),
    "what nobody knows": ({"use_next_thing": 3}, "use_next_thing is 3, which asks for something that is not computed"),
    "other methods": ({"peft_type": "IA3"}, "peft_type is 'IA3', and only LORA"),
    "no method": ({"peft_type": None}, "peft_type is None"),
    "weights of the network": ({"init_lora_weights": "pissa"}, "changes the network's own weights"),
    "a list for a beginning": ({"init_lora_weights": [1]}, "changes the network's own weights"),
    "a rank of none": ({"r": 0}, "rank 'r' must be 1 to"),
    "a rank too large": ({"r": MAX_RANK + 1}, "rank 'r' must be 1 to 256, and is 257"),
    "a rank of true": ({"r": True}, "must be 1 to"),
    "a rank in words": ({"r": "4"}, "must be 1 to"),
    "a rank in a pattern": ({"rank_pattern": {"q_proj": 1 << 40}}, "rank 'q_proj' must be"),
    "an endless pattern": ({"rank_pattern": {"(a+)+$": 4}}, "only plain names are read"),
    "a pattern that is a list": ({"alpha_pattern": [1]}, "must be an object of names"),
    "a scale of NaN": ({"lora_alpha": float("nan")}, "scale 'lora_alpha' must be a number"),
    "an endless scale": ({"lora_alpha": 1e300}, "scale 'lora_alpha' must be a number"),
    "no scale": ({"lora_alpha": None}, "scale 'lora_alpha' must be a number"),
    "a root of text": ({"use_rslora": "yes"}, "use_rslora must be true or false"),
    "targets of numbers": ({"target_modules": [3]}, "names, or a pattern, and is a list"),
    "endless targets": ({"target_modules": ["q_proj"] * 5000}, "must be up to 4096 names"),
    "what is deep": ({"use_dora": json.loads("[" * 900 + "1" + "]" * 900)}, "use_dora is a list"),
    "a target too few": ({"target_modules": ["q_proj"]}, "target_modules does not name it"),
    "another rank": ({"r": 8}, "rank 8 on this network is"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_is_not_lora_as_it_is_computed_is_refused_by_name(tmp_path: Path, case: str) -> None:
    said, fault = CONFIGS[case]
    net = network(SMALL)
    with pytest.raises(BadInput, match="^[^\n]+$") as refused:
        read(lora_folder(tmp_path, net, **said), net)
    assert fault in str(refused.value) and len(str(refused.value)) < 600


Q = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "half a pair": (lambda t: {n: x for n, x in t.items() if n != f"{Q}.lora_B.weight"}, "only one of lora_A and"),
    "a layer too few": (lambda t: {n: x for n, x in t.items() if "layers.1" not in n}, "which is not there"),
    "a layer too many": (
        lambda t: t | {n.replace("layers.1", "layers.7"): x.clone() for n, x in t.items()},
        "is no low-rank change of a projection of this network",
    ),
    "a head": (lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 96)}, "lm_head"),
    "magnitudes": (lambda t: t | {f"{Q}.lora_magnitude_vector": torch.ones(192)}, "lora_magnitude_vector"),
    "an embedding": (
        lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 75)},
        "embed",
    ),
    "another width": (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4, 64)}, "is [4, 64], and rank 4 on this"),
    "another order": (lambda t: t | {f"{Q}.lora_B.weight": torch.ones(4, 192)}, "is [4, 192], and rank 4 on this"),
    "three dimensions": (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4, 96, 1)}, "is [4, 96, 1]"),
    "integers": (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4, 96, dtype=torch.int32)}, "is I32: save it in"),
    "NaN": (lambda t: t | {f"{Q}.lora_A.weight": torch.full((4, 96), float("nan"))}, "NaN or infinity"),
    "what overflows": (lambda t: t | {f"{Q}.lora_B.weight": torch.full((192, 4), 3e38)}, "NaN or infinity"),
    "nothing": (lambda t: {}, "changes nothing"),
    "names of a network": (lambda t: {n.removeprefix("base_model.model."): x for n, x in t.items()}, "no low-rank"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_the_network_are_refused_by_name(tmp_path: Path, case: str) -> None:
    change, fault = TENSORS[case]
    net = network(SMALL)
    lora_folder(tmp_path, net)
    save_file(change(lora_tensors(net)), tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="^[^\n]+$") as refused:
        read(tmp_path, net)
    assert fault in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"r": 4, "r": 5}', "[" * 100_000, '{"peft_type": NaN}', " " * (2 << 20)]
)
def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    net = network(SMALL)
    (lora_folder(tmp_path, net) / "adapter_config.json").write_text(text)
    with pytest.raises(BadInput, match="adapter_config.json"):
        read(tmp_path, net)


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    net = network(SMALL)
    (lora_folder(tmp_path, net) / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInput, match="adapter_model.safetensors"):
        read(tmp_path, net)
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(BadInput, match="only adapter_model.bin: it is a pickle"):
        read(tmp_path, net)
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="it is a pickle|is broken"):
        read(tmp_path, net)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="adapter_config.json is missing: name a folder that PEFT"):
        read(tmp_path / "nowhere", network(SMALL))


def test_a_network_of_two_experts_has_none(tmp_path: Path) -> None:
    net = network(SMALL)
    lora_folder(tmp_path, net)
    with pytest.raises(BadInput, match="one set of weights"):
        read(tmp_path, Model(replace(SMALL, experts=2)))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4


# ---- exactness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_products_keep_the_rule_of_rows(dtype: torch.dtype) -> None:
    """Matrices of few outputs, and of few inner values, are other roads through PyTorch's libraries."""
    shapes = tuple(pair for rank in (1, 3, 8, 16) for pair in ((rank, 96), (96, rank), (576, rank), (rank, 1536)))
    assert not exact.broken(dtype, shapes)


LIKENESS = {"float32": 0.9999, "bfloat16": 0.99, "int8": 0.9, "int4": 0.8, "w8a8": 0.9, "w4a8": 0.8}
"""Cosines between changes: the network's own rounding differs with and without an adapter."""


def native_hidden(
    trunk: Subject, packed: PackedAdapters, texts: list[tuple[str, int, int]], seed: int = 0
) -> list[Tensor]:
    """Hidden states of texts that are read in one call, each by (adapter, length, seed of its tokens)."""
    c, page = trunk.config, 32
    documents = [document(length, which, span=(5, 9)) for _, length, which in texts]
    each = -(-max(len(d) for d in documents) // page)
    keys, values = (pages.fill_(float("nan")) for pages in trunk.pages(each * len(texts) + 1, page))
    order = torch.randperm(each * len(texts), generator=torch.Generator().manual_seed(seed))
    tables = order.view(len(texts), each).int().contiguous()
    rotation = rotations(torch.cat([d.positions for d in documents]), c.head_width, c.theta, c.scaling, c.sections)
    lengths = [len(d) for d in documents]
    trunk.adapters = packed.of([name for name, *_ in texts])
    hidden = trunk.run(
        trunk.table[torch.cat([d.tokens for d in documents])],
        rotation,
        keys,
        values,
        torch.arange(len(texts)).repeat_interleave(torch.tensor(lengths)).int(),
        torch.cat([torch.arange(n) for n in lengths]).int(),
        torch.cat([ends(d) for d in documents]).int(),
        tables,
    )
    return list(hidden.split(lengths))


@native
@pytest.mark.parametrize("flags", [(), PLAIN], ids=["intrinsics", "plain"])
@pytest.mark.parametrize("weights", FORMATS)
def test_the_native_path_is_the_same_whoever_is_beside_it(tmp_path: Path, weights: Format, flags: tuple) -> None:
    net = network(SMALL)
    one = read(lora_folder(tmp_path / "one", net, rank=3), net, "one")
    two = read(lora_folder(tmp_path / "two", net, rank=16, seed=1, targets=("q_proj", "v_proj", "up_proj")), net, "two")
    trunk = Subject(net, torch.float32, weights, threads=2, flags=flags)
    packed, none = (PackedAdapters(k, net.config, weights, trunk.arena) for k in ({"one": one, "two": two}, {}))
    texts = [("one", 40, 1), ("", 40, 1), ("two", 40, 1), ("one", 13, 2), ("", 1, 3), ("two", 70, 3)]
    together = native_hidden(trunk, packed, texts, seed=2)
    for text, rows in zip(texts, together, strict=True):
        assert torch.equal(native_hidden(trunk, packed, [text])[0], rows), text
        if not text[0]:
            assert torch.equal(native_hidden(trunk, none, [text])[0], rows), "no adapter is as it was"
    assert not torch.equal(together[0], together[1]) and not torch.equal(together[0], together[2])


@native
@pytest.mark.parametrize("weights", FORMATS)
def test_the_native_path_adds_what_the_network_adds(tmp_path: Path, weights: Format) -> None:
    """Exact but for the order of sums in float32; in other formats the change has the same direction."""
    net = network(SMALL)
    one = read(lora_folder(tmp_path / "one", net, rank=5), net, "one")
    two = read(
        lora_folder(tmp_path / "two", net, rank=16, seed=1, targets=("k_proj", "down_proj", "up_proj")), net, "two"
    )
    adapters = Adapters(net, [one, two])
    trunk = Subject(net, torch.float32, weights)
    packed = PackedAdapters(adapters.known, net.config, weights, trunk.arena)
    bare, *found = (net.norm(h) for h in native_hidden(trunk, packed, [(n, 40, 1) for n in ("", "one", "two")]))
    with torch.no_grad():
        batch = pack([document(40, 1, span=(5, 9))])
        base = net(batch)
        for name, hidden in zip(("one", "two"), found, strict=True):
            with adapters.whole(name):
                expected = net(batch)
            if weights == "float32":
                torch.testing.assert_close(hidden, expected, atol=2e-3, rtol=2e-3)
            alike = torch.cosine_similarity((hidden - bare).flatten(), (expected - base).flatten(), dim=0)
            assert alike > LIKENESS[weights], (name, alike)
