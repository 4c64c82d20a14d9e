"""What Megatron-core, FSDP and DeepSpeed leave behind becomes the same network, and what is hostile or torn is refused.

The folders here are written by torch.distributed.checkpoint and torch.save in the layouts of those frameworks.
`test_framework_writers.py` has the frameworks write them, where they are installed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tokenizers import Tokenizer as Backend
from tokenizers import models
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from litchi.cli import main
from litchi.config import BadInput
from litchi.model.convert import load_foreign, open_foreign
from litchi.model.distcheckpoint import open_distributed
from litchi.model.weights import load
from tests.model.test_families import scores

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 80, "vocab_size": 97, "max_position_embeddings": 64, "head_dim": 12}
PADDED = 128
"""Rows of Megatron's table: 97, up to a number that two ranks of 64 share."""

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500_000.0}

MODELS = {
    "Llama": ("Llama", SIZES | {"tie_word_embeddings": False}),
    "Llama 3.1": ("Llama", SIZES | {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "Llama with biases": ("Llama", SIZES | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "Qwen2": ("Qwen2", {k: v for k, v in SIZES.items() if k != "head_dim"} | {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", SIZES | {"tie_word_embeddings": False}),
}
TOLERANCE = 1e-4
"""Of logits, fp32: the same sums in another order."""

Save = Callable[[Path, dict], None]


def build(name: str):
    family, sizes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**sizes, attn_implementation="eager")
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    net = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net


@torch.no_grad()
def gap(net, folder: Path) -> float:
    ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    return float((scores(load_foreign(folder), ids) - net(torch.tensor([ids])).logits[0]).abs().max())


# ---- torch.distributed.checkpoint ---------------------------------------------------------------------------------


class Pieces(Tensor):
    """A tensor as ranks have it: boxes by where they begin."""

    parts: dict[torch.Size, Tensor]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, at),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(at, part.size()),
                    TensorProperties.create_from_tensor(part),
                    self.size(),
                ),
            )
            for at, part in self.parts.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.parts[index.offset]


def pieces_of(whole: Tensor, cuts: tuple[int, ...]) -> Pieces:
    """Cut into so many parts along each dimension."""
    found = whole.as_subclass(Pieces)
    steps = [-(-n // many) for n, many in zip(whole.shape, cuts, strict=True)]
    found.parts = {}
    for at in product(*(range(0, n, step) for n, step in zip(whole.shape, steps, strict=True))):
        box = tuple(slice(i, i + step) for i, step in zip(at, steps, strict=True))
        found.parts[torch.Size(at)] = whole[box].clone()
    return found


def save_pieces(folder: Path, state: dict) -> None:
    """As two ranks would: a file each, the first dimension of every matrix cut in two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, thread_count=2), no_dist=True)


def cut(tensor: Tensor, stacked: bool = False) -> Pieces:
    """A stack of layers is saved layer by layer, as Megatron does it."""
    cuts = [1] * tensor.dim()
    if stacked:
        cuts[0] = len(tensor)
    if tensor.dim() - stacked > 1:
        cuts[int(stacked)] = 2
    return pieces_of(tensor, tuple(cuts))


# ---- Megatron-core ------------------------------------------------------------------------------------------------


def fuse(q: Tensor, k: Tensor, v: Tensor, width: int, groups: int) -> Tensor:
    """Head by head, written out: q0 q1 k0 v0 q2 q3 k1 v1."""
    each = len(q) // width // groups
    rows = []
    for g in range(groups):
        rows += [q[(g * each + i) * width : (g * each + i + 1) * width] for i in range(each)]
        rows += [k[g * width : (g + 1) * width], v[g * width : (g + 1) * width]]
    return torch.cat(rows)


def megatron_layer(net, i: int) -> dict[str, Tensor]:
    layer, c = net.model.layers[i], net.config
    attention, mlp, found = layer.self_attn, layer.mlp, {}
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    for kind in ("weight", "bias"):
        q, k, v, o = (getattr(getattr(attention, f"{p}_proj"), kind) for p in "qkvo")
        gate, up, down = (getattr(getattr(mlp, f"{p}_proj"), kind) for p in ("gate", "up", "down"))
        if q is not None:
            found[f"self_attention.linear_qkv.{kind}"] = fuse(q, k, v, width, c.num_key_value_heads)
        if o is not None:
            found[f"self_attention.linear_proj.{kind}"] = o
        if gate is not None:
            found[f"mlp.linear_fc1.{kind}"], found[f"mlp.linear_fc2.{kind}"] = torch.cat([gate, up]), down
    found["self_attention.linear_qkv.layer_norm_weight"] = layer.input_layernorm.weight
    found["mlp.linear_fc1.layer_norm_weight"] = layer.post_attention_layernorm.weight
    if hasattr(attention, "q_norm"):
        found["self_attention.q_layernorm.weight"] = attention.q_norm.weight
        found["self_attention.k_layernorm.weight"] = attention.k_norm.weight
    return {name: tensor.detach() for name, tensor in found.items()}


def outer(net) -> dict[str, Tensor]:
    def padded(table: Tensor) -> Tensor:
        return torch.cat([table.detach(), torch.full((PADDED - len(table), table.shape[1]), 7.0)])

    found = {"embedding.word_embeddings.weight": padded(net.model.embed_tokens.weight)}
    found["decoder.final_layernorm.weight"] = net.model.norm.weight.detach()
    if not net.config.tie_word_embeddings:
        found["output_layer.weight"] = padded(net.lm_head.weight)
    return found


def stacked(net) -> dict[str, Pieces]:
    """Layers in a stack, as Megatron-core has it until its version 0.16."""
    layers = [megatron_layer(net, i) for i in range(net.config.num_hidden_layers)]
    inner = {f"decoder.layers.{k}": cut(torch.stack([layer[k] for layer in layers]), stacked=True) for k in layers[0]}
    return inner | {name: cut(tensor) for name, tensor in outer(net).items()}


def apart(net) -> dict[str, Pieces]:
    """Every layer under its number, gate and up apart, norms by themselves, and a prefix: what FSDP and NeMo save."""
    found = outer(net)
    for i in range(net.config.num_hidden_layers):
        layer = megatron_layer(net, i)
        for kind in ("weight", "bias"):
            if (both := layer.pop(f"mlp.linear_fc1.{kind}", None)) is not None:
                layer[f"mlp.linear_fc1.{kind}_w"], layer[f"mlp.linear_fc1.{kind}_v"] = both.chunk(2)
        layer["input_layernorm.weight"] = layer.pop("self_attention.linear_qkv.layer_norm_weight")
        layer["pre_mlp_layernorm.weight"] = layer.pop("mlp.linear_fc1.layer_norm_weight")
        found |= {f"decoder.layers.{i}.{k}": v for k, v in layer.items()}
    return {f"module.{name}": cut(tensor) for name, tensor in found.items()}


def arguments(net) -> argparse.Namespace:
    c = net.config
    rope = c.rope_parameters
    return argparse.Namespace(
        num_layers=c.num_hidden_layers, hidden_size=c.hidden_size, ffn_hidden_size=c.intermediate_size,
        num_attention_heads=c.num_attention_heads, num_query_groups=c.num_key_value_heads, group_query_attention=True,
        kv_channels=getattr(c, "head_dim", 12) or 12, max_position_embeddings=64, norm_epsilon=c.rms_norm_eps,
        rotary_base=rope["rope_theta"], use_rope_scaling=rope["rope_type"] == "llama3", rope_scaling_factor=8.0,
        untie_embeddings_and_output_weights=not c.tie_word_embeddings, vocab_size=c.vocab_size, swiglu=True,
        normalization="RMSNorm", position_embedding_type="rope", add_bias_linear=getattr(c, "mlp_bias", False),
        add_qkv_bias=c.model_type == "qwen2", qk_layernorm=c.model_type == "qwen3", padded_vocab_size=PADDED,
        params_dtype=torch.bfloat16, tokenizer_model=Path("x"),
    )  # fmt: skip


def save_megatron(folder: Path, net, state: dict, **change: object) -> None:
    besides: dict[str, object] = {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(48)}
    besides["decoder.layers.mlp.linear_fc1._extra_state/shard_0_3"] = io.BytesIO()
    save_pieces(folder, state | besides)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    args = arguments(net)
    vars(args).update(change)
    torch.save({"args": args, "iteration": 7, "checkpoint_version": 3.0}, folder / "common.pt")


@pytest.mark.parametrize("name", MODELS)
def test_a_stack_of_layers_is_the_model(name: str, tmp_path: Path) -> None:
    net = build(name)
    save_megatron(tmp_path, net, stacked(net))
    assert gap(net, tmp_path) <= TOLERANCE
    assert open_foreign(tmp_path).family == net.config.model_type


@pytest.mark.parametrize("name", MODELS)
def test_layers_apart_with_a_config_beside_them_are_the_model(name: str, tmp_path: Path) -> None:
    net = build(name)
    save_megatron(tmp_path, net, apart(net))
    (tmp_path / "common.pt").unlink()
    with pytest.raises(BadInput, match=r"keeps no arguments of Megatron-LM: lay the config.json"):
        open_foreign(tmp_path)
    net.config.save_pretrained(tmp_path)
    assert gap(net, tmp_path) <= TOLERANCE


def test_arguments_inside_the_folder_are_found(tmp_path: Path) -> None:
    """Where new versions keep them: a list of one dict, saved by torch as a blob."""
    net, blob = build("Qwen3"), io.BytesIO()
    torch.save([{"args": arguments(net)}], blob)
    state = {"common_state/shard_0_1": blob}

    class Planner(dcp.DefaultSavePlanner):
        def transform_object(self, write_item: WriteItem, object: object) -> object:
            return object

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(stacked(net) | state, checkpoint_id=tmp_path, planner=Planner(), no_dist=True)
    assert gap(net, tmp_path) <= TOLERANCE


def test_arguments_and_config_must_agree(tmp_path: Path) -> None:
    net = build("Llama")
    save_megatron(tmp_path, net, stacked(net), rotary_base=1_000_000)
    net.config.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"config.json gives theta as 10000.0, Megatron's own arguments as 1000000.0"):
        open_foreign(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rotary_interleaved", True), ("num_experts", 8), ("apply_layernorm_1p", True), ("normalization", "LayerNorm")],
)
def test_what_cannot_be_computed_is_refused_by_name(key: str, value: object, tmp_path: Path) -> None:
    net = build("Llama")
    save_megatron(tmp_path, net, stacked(net), **{key: value})
    with pytest.raises(BadInput, match=f"Megatron: {key}={value!r} cannot be computed here"):
        open_foreign(tmp_path)


def test_a_weight_too_many_is_refused(tmp_path: Path) -> None:
    net = build("Llama")
    save_megatron(tmp_path, net, stacked(net) | {"mtp.layers.0.enorm.weight": torch.ones(48)})
    with pytest.raises(BadInput, match=r"holds 1 tensors that nothing reads, such as 'mtp.layers.0.enorm.weight'"):
        open_foreign(tmp_path)


def test_the_command_reads_the_folder_of_a_run(tmp_path: Path) -> None:
    """The last checkpoint is noted there; Megatron has put the tokenizer beside the weights."""
    net, run = build("Llama"), tmp_path / "run"
    place = run / "iter_0000007"
    place.mkdir(parents=True)
    save_megatron(place, net, stacked(net))
    (run / "latest_checkpointed_iteration.txt").write_text("7")
    (place / "tokenizer").mkdir()
    Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(place / "tokenizer" / "tokenizer.json"))
    assert main(["convert", str(run), str(tmp_path / "ours"), "--dtype", "float32"]) == 0
    loaded = load(tmp_path / "ours")
    assert torch.equal(loaded.model.lm_head.weight, net.lm_head.weight) and loaded.meta["family"] == "llama"
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "huggingface"]) == 0
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    state = net.state_dict()
    assert all(torch.equal(tensor, state[n].bfloat16().float()) for n, tensor in back.state_dict().items())


# ---- pieces -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    """A model under Hugging Face's names with its optimizer, as FSDP saves it."""
    net = build("Qwen2")
    state = {n: cut(t.detach()) for n, t in net.state_dict().items() if n != "lm_head.weight"}
    save_pieces(tmp_path, {"model": state, "optimizer": {"state": {"model.norm.weight": torch.ones(3)}}, "step": 5})
    net.config.save_pretrained(tmp_path)
    return tmp_path


def test_names_of_hugging_face_in_pieces_are_the_model(pieces: Path) -> None:
    assert gap(build("Qwen2"), pieces) <= TOLERANCE


TYPES = (torch.bfloat16, torch.float16, torch.int64, torch.bool)


def test_pieces_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    """Every dtype, cuts that do not divide, cuts along two dimensions, transposed memory, and nothing at all."""
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(7, 10, generator=g)
    state = {
        "two": pieces_of(wide, (3, 4)),
        "turned": wide.T,
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        **{
            str(t): pieces_of((wide * 9).to(t), (2, 1))
            for t in (torch.bfloat16, torch.float16, torch.int64, torch.bool)
        },
        "torch.float8": wide.to(torch.float8_e4m3fn),
    }
    save_pieces(tmp_path, state)
    wholes = {name: value.as_subclass(Tensor) for name, value in state.items()}
    with open_distributed(tmp_path) as file:
        assert set(file.entries) == set(wholes)
        for name, whole in wholes.items():
            assert file.entries[name].shape == tuple(whole.shape)
            assert file.read(name).dtype == whole.dtype
            assert torch.equal(file.read(name).double(), whole.double()), name
        assert torch.equal(file.read_row("two", 5), wide[5]) and torch.equal(file.read_row("turned", 9), wide.T[9])
        assert file.read("torch.int64", torch.float32).dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_of_a_stack_one_layer_is_in_memory(tmp_path: Path) -> None:
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

    save_pieces(tmp_path, {"stack": cut(torch.zeros(24, 1024, 1024), stacked=True)})
    with open_distributed(tmp_path) as file:
        before, most = anonymous(), 0
        for row in range(24):
            layer = file.read_row("stack", row, torch.bfloat16)
            most = max(most, anonymous() - before)
        assert layer.shape == (1024, 1024) and most < 16e6, most


def change(folder: Path, alter: Callable) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    alter(metadata, "model.model.layers.1.mlp.up_proj.weight")
    path.write_bytes(pickle.dumps(metadata))


def lose(m, name: str) -> None:
    m.state_dict_metadata[name].chunks.pop()


def double(m, name: str) -> None:
    m.state_dict_metadata[name].chunks.append(ChunkStorageMetadata(torch.Size([20, 0]), torch.Size([40, 48])))
    m.storage_data[MetadataIndex(name, [20, 0])] = m.storage_data[MetadataIndex(name, [0, 0])]


def reach(m, name: str) -> None:
    m.state_dict_metadata[name].chunks[1].sizes = torch.Size([41, 48])


def forget(m, name: str) -> None:
    del m.storage_data[MetadataIndex(name, [0, 0])]


def move(m, name: str) -> None:
    m.storage_data[MetadataIndex(name, [0, 0])].offset += 1 << 40


def shift(m, name: str) -> None:
    m.storage_data[MetadataIndex(name, [0, 0])].offset += 64


def escape(m, name: str) -> None:
    m.storage_data[MetadataIndex(name, [0, 0])].relative_path = "../secret.distcp"


def miss(m, name: str) -> None:
    m.storage_data[MetadataIndex(name, [0, 0])].relative_path = "__9_0.distcp"


def swap(m, name: str) -> None:
    m.storage_data[MetadataIndex(name, [0, 0])] = m.storage_data[MetadataIndex("model.model.norm.weight", [0])]


def boast(m, name: str) -> None:
    m.state_dict_metadata[name].size = torch.Size([1 << 40, 1 << 40])


TORN = {
    lose: "leave a hole",
    double: "overlap",
    reach: r"reaches \[81, 48\]",
    forget: "does not say where the piece",
    move: "it is cut off",
    shift: "has no header at byte|no zip",
    escape: "no plain file name",
    miss: "is missing",
    swap: "its piece of",
    boast: "which no memory holds",
}


@pytest.mark.parametrize("alter", TORN, ids=lambda f: f.__name__)
def test_torn_metadata_is_refused_with_the_reason(alter: Callable, pieces: Path) -> None:
    change(pieces, alter)
    with pytest.raises(BadInput, match=TORN[alter]):
        load_foreign(pieces)


def test_a_file_cut_short_is_refused(pieces: Path) -> None:
    file = max(pieces.glob("*.distcp"), key=lambda p: p.stat().st_size)
    os.truncate(file, file.stat().st_size - 1000)
    with pytest.raises(BadInput, match=f"{file.name} is broken: it is cut off"):
        load_foreign(pieces)


def test_damage_is_bad_input_and_nothing_else(pieces: Path) -> None:
    """Bytes of the pickle changed at random: what opens may be right or wrong, and what fails fails in words."""
    path, g = pieces / ".metadata", torch.Generator().manual_seed(0)
    whole = path.read_bytes()
    for _ in range(60):
        at, byte, cut_at = (int(torch.randint(n, (), generator=g)) for n in (len(whole), 256, 4))
        damaged = bytearray(whole)
        damaged[at] = byte
        path.write_bytes(bytes(damaged)[: at or 1] if not cut_at else bytes(damaged))
        try:
            open_distributed(pieces)
        except BadInput as error:
            assert len(str(error).splitlines()) == 1


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_hostile_pickle_is_refused_and_not_run(pieces: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Hostile(mark)))
    mark.rmdir()  # the trap works
    change(pieces, lambda m, _: setattr(m, "planner_data", Hostile(mark)))
    with pytest.raises(
        BadInput, match=r"names 'posix.mkdir', which has no place in such a file: nothing of it was run"
    ):
        open_foreign(pieces)
    assert not mark.exists()


def test_hostile_arguments_are_not_run(tmp_path: Path) -> None:
    """Whatever classes the arguments have, they stay names."""
    net, mark = build("Llama"), tmp_path / "ran"
    save_megatron(tmp_path, net, stacked(net), hostile=Hostile(mark))
    assert open_foreign(tmp_path).family == "llama" and not mark.exists()


# ---- DeepSpeed ----------------------------------------------------------------------------------------------------


def save_universal(folder: Path, net, save: Callable[[Tensor], object], prefix: str = "") -> None:
    for name, tensor in net.named_parameters():
        place = folder / "zero" / f"{prefix}{name}"
        place.mkdir(parents=True)
        torch.save(save(tensor.detach().clone()), place / "fp32.pt")
        torch.save(torch.zeros(3), place / "exp_avg.pt")
    torch.save({"step": 1}, folder / "zero" / "optimizer_state.pt")
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"not read")
    net.config.save_pretrained(folder)


def zero2(tensor: Tensor) -> dict[str, object]:
    return {"cat_dim": 0, "param": tensor}


def zero3(tensor: Tensor) -> Tensor:
    return tensor.flatten()


@pytest.mark.parametrize("save", [zero2, zero3])
@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_a_universal_checkpoint_is_the_model(name: str, save: Callable, tmp_path: Path) -> None:
    net = build(name)
    save_universal(tmp_path, net, save, prefix="module." if save is zero2 else "")
    assert gap(net, tmp_path) <= TOLERANCE


def test_a_tied_head_that_is_saved_again_in_16_bits_is_the_table(tmp_path: Path) -> None:
    net, head = build("Qwen2"), tmp_path / "zero" / "lm_head.weight"
    save_universal(tmp_path, net, zero2)
    head.mkdir()
    torch.save({"param": net.lm_head.weight.detach().bfloat16().float()}, head / "fp32.pt")
    assert gap(net, tmp_path) <= TOLERANCE
    torch.save({"param": net.lm_head.weight.detach() + 1}, head / "fp32.pt")
    with pytest.raises(BadInput, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        open_foreign(tmp_path)


def test_a_hostile_weight_is_refused_and_not_run(tmp_path: Path) -> None:
    net, mark = build("Llama"), tmp_path / "ran"
    save_universal(tmp_path, net, zero2)
    torch.save({"param": torch.ones(48), "x": Hostile(mark)}, tmp_path / "zero" / "model.norm.weight" / "fp32.pt")
    with pytest.raises(BadInput, match=r"names 'posix.mkdir'"):
        open_foreign(tmp_path)
    assert not mark.exists()


# ---- what cannot be read ------------------------------------------------------------------------------------------

ZERO_MEND = "convert them with python -m deepspeed.checkpoint.ds_to_universal"
UNREADABLE = {
    "mp_rank_00/model_optim_rng.pt": "load it in Megatron-LM with --ckpt-convert-format torch_dist",
    "mp_rank_00_000/model_optim_rng.pt": "load it in Megatron-LM with --ckpt-convert-format torch_dist",
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": ZERO_MEND,
    "mp_rank_00_model_states.pt": ZERO_MEND,
    "__0_0.distcp": "has no .metadata, which is written last",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_refused_with_the_mend(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"\x80\x02.")
    with pytest.raises(BadInput, match=UNREADABLE[name]):
        open_foreign(tmp_path)


def test_the_old_format_of_megatron_core_is_refused_with_the_mend(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    with pytest.raises(BadInput, match="of format 'zarr', which is not read: .* save it with --ckpt-format torch_dist"):
        open_foreign(tmp_path)


def test_a_folder_of_a_run_of_deepspeed_is_refused_as_its_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "global_step5").mkdir()
    (tmp_path / "latest").write_text("global_step5")
    (tmp_path / "global_step5" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"\x80\x02.")
    with pytest.raises(BadInput, match="ds_to_universal"):
        open_foreign(tmp_path)
