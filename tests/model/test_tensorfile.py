"""Weights come back as stored, one tensor at a time, and a file that lies is refused before it costs memory."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.fuzz_readers import BOUND, Watch, fuzz, gguf_bytes, safetensors_bytes
from litchi.config import BadInput
from litchi.model.tensorfile import DTYPES, MappedFile, check_finite, open_folder, open_safetensors, open_tensors

OBJECTS = 2 << 20
"""Bytes that opening may take beside twice the file's: Python's objects for as many entries as any file may have."""


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every pattern of bits that the type has, or for bool both."""
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    return (raw % 2 == 0).reshape(shape) if dtype == torch.bool else raw.view(dtype).reshape(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw_a, raw_b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(raw_a, raw_b)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# ---- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_equals_what_safetensors_reads_bit_for_bit(tmp_path: Path, name: str) -> None:
    dtype, path = DTYPES[name], tmp_path / "weights"
    shapes = {"long": (70_001,), "flat": (7,), "deep": (3, 1, 5), "none": (4, 0, 2), "one": ()}
    save_file({key: values(dtype, *shape) for key, shape in shapes.items()}, path)
    expected = load_file(path)
    with open_tensors(path) as file:
        assert file.entries.keys() == shapes.keys()
        for key, tensor in expected.items():
            assert file.entries[key].dtype == name and file.entries[key].shape == shapes[key]
            assert same_bits(file.read(key), tensor)


def test_tensors_are_read_from_any_byte(tmp_path: Path) -> None:
    weight = values(torch.float32, 5)
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "weight": {"dtype": "F32", "shape": [5], "data_offsets": [3, 23]},
    }
    path = write(tmp_path / "weights", safetensors_bytes(header, b"\1\2\3" + weight.numpy().tobytes()))
    with open_tensors(path) as file:
        assert same_bits(file.read("weight"), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tensor_is_read_in_the_dtype_that_is_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = torch.randn(300, 301, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"w": stored}, tmp_path / "weights")
    with open_tensors(tmp_path / "weights") as file:
        assert same_bits(file.read("w", dtype), stored.to(dtype))


def test_what_was_read_outlives_the_file_and_does_not_write_to_it(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "weights", metadata={"format": "pt", "note": 'a "word" ü\n'})
    with open_tensors(tmp_path / "weights") as file:
        assert file.metadata == {"format": "pt", "note": 'a "word" ü\n'}
        weight = file.read("w")
    weight += 1
    assert weight.tolist() == [2, 2, 2] and load_file(tmp_path / "weights")["w"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="is closed"):
        file.read("w")


def test_only_the_tensor_that_is_asked_for_is_touched(tmp_path: Path) -> None:
    """The file says it has 64 GB; all but its header and its end is a hole that takes neither disk nor memory."""
    hole = 1 << 36
    header = {
        "huge": {"dtype": "F32", "shape": [hole // 4], "data_offsets": [0, hole]},
        "small": {"dtype": "U8", "shape": [3], "data_offsets": [hole, hole + 3]},
    }
    path = write(tmp_path / "weights", safetensors_bytes(header, b""))
    with path.open("r+b") as stream:
        stream.seek(hole, 2)
        stream.write(b"\1\2\3")
    with open_tensors(path) as file:
        assert file.read("small").tolist() == [1, 2, 3]


def test_a_tensor_that_is_not_there_is_named_with_its_neighbour(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "weights")
    with open_tensors(tmp_path / "weights") as file, pytest.raises(BadInput, match="did you mean 'model.norm.weight'"):
        file.read("model.norm.weights")


# ---- telling formats apart ----------------------------------------------------------------------------------------


def test_a_format_is_known_by_its_content_and_not_by_its_name(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "model.gguf")
    write(tmp_path / "model.safetensors", gguf_bytes([], [("w", (3,), 0, torch.full((3,), 2.0).numpy().tobytes())]))
    assert open_tensors(tmp_path / "model.gguf").read("w").tolist() == [1, 1, 1]
    assert open_tensors(tmp_path / "model.safetensors").read("w").tolist() == [2, 2, 2]
    for opener, path in ((open_safetensors, tmp_path / "model.safetensors"), (open_folder, tmp_path)):
        with pytest.raises(BadInput, match="model.safetensors is a GGUF file and not safetensors"):
            opener(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_under_any_name(tmp_path: Path, protocol: int) -> None:
    path = write(tmp_path / "model.safetensors", pickle.dumps({"w": [1.0] * 300}, protocol))
    with pytest.raises(BadInput, match="it is a pickle, which can run code .* safetensors.torch.save_file"):
        open_tensors(path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_what_torch_saves_is_refused(tmp_path: Path, is_zip: bool) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "w.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(BadInput, match="it is a pickle, which can run code"):
        open_tensors(tmp_path / "w.pt")


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(0x0280)
    path = write(tmp_path / "weights", safetensors_bytes(header, b"\7"))
    assert path.read_bytes()[:2] == pickle.dumps(None, 2)[:2]
    assert open_tensors(path).read("w").tolist() == [7]


# ---- damage -------------------------------------------------------------------------------------------------------


def entry(dtype: object = "F32", shape: object = (2, 2), begin: object = 0, end: object = 16) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one(value: object, size: int = 16) -> bytes:
    return safetensors_bytes({"w": value}, bytes(size))


def raw(header: bytes) -> bytes:
    return safetensors_bytes(header, bytes(16))


WHOLE = one(entry())
W = b'"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'

DAMAGED = {
    "empty": (b"", "it is empty"),
    "short": (b"\1\2\3", "has 3 bytes, which is less"),
    "cut in its header": (WHOLE[:30], "claims a header of 65 bytes and has 30"),
    "cut in its weights": (WHOLE[:-1], "'w' lies at bytes 0 to 16 of 15"),
    "a header longer than the file": (b"\xff\xff\xff\x7f\0\0\0\0" + WHOLE[8:], "claims a header of 2147483647 bytes"),
    "a header that no number holds": (b"\xff" * 8 + WHOLE[8:], "claims a header of 18446744073709551615 bytes"),
    "text": (b"once upon a time there was a file", "neither safetensors nor GGUF"),
    "no object": (raw(b"[1]"), "at byte 8 should be {"),
    "no end": (raw(b"{" + W), "should be , or }, not b''"),
    "something behind": (raw(b"{" + W + b"}{}"), "something else follows"),
    "a comma too many": (raw(b"{" + W + b",}"), 'should be "'),
    "no UTF-8": (raw(b'{"\xff":1}'), "is not JSON text in UTF-8"),
    "half a surrogate": (raw(b'{"\\ud800":1}'), "is not JSON text in UTF-8"),
    "no end of a string": (raw(b'{"w\\"'), "a string in it has no end"),
    "a duplicate": (raw(b"{" + W + b"," + W + b"}"), "'w' stands in it twice"),
    "a duplicate field": (raw(b'{"w":{"dtype":"F32","dtype":"F32"}}'), "'dtype' stands in it twice"),
    "a field too many": (one({**entry(), "stride": [1]}), "a field 'stride'"),
    "no shape": (one({"dtype": "F32", "data_offsets": [0, 16]}), "'w' lacks a dtype, a shape"),
    "three offsets": (one({**entry(), "data_offsets": [0, 8, 16]}), "'w' lacks a dtype, a shape or two data_offsets"),
    "an unknown dtype": (one(entry(dtype="Q4_0")), "'w' has dtype 'Q4_0': convert it"),
    "a dtype that is no text": (one(entry(dtype=3)), 'should be "'),
    "a negative dim": (one(entry(shape=[-2, -2])), r"\[-2, -2\] should be integers that are not negative"),
    "half a dim": (one(entry(shape=[1.5])), r"\[1.5\] should be integers"),
    "a dim in words": (one(entry(shape=["2"])), "should be a list of integers"),
    "a shape that overflows": (one(entry(shape=[2**32, 2**32])), "which no memory holds"),
    "a shape that overflows behind a 0": (one(entry(shape=[0, 2**62, 2**62], end=0), 0), "which no memory holds"),
    "many dims": (one(entry(shape=[1] * 65)), "has 65 dimensions"),
    "very many dims": (one(entry(shape=[1] * 100_000)), "should be a list of integers"),
    "a wrong size": (one(entry(end=12), 12), r"F32 \[2, 2\], needs 16 bytes and has 12"),
    "a shape of two thousand million": (one(entry(shape=[2_000_000_000])), "needs 8000000000 bytes and has 16"),
    "an end before its begin": (one(entry(begin=16, end=0)), "lies at bytes 16 to 0"),
    "an offset that no number holds": (one(entry(end=10**30)), "should be integers"),
    "an overlap": (safetensors_bytes({"a": entry(), "b": entry(begin=8, end=24)}, bytes(24)), "'b' overlaps"),
    "a gap": (safetensors_bytes({"a": entry(), "b": entry(begin=20, end=36)}, bytes(36)), "a gap before tensor 'b': 4"),
    "a gap before all": (one(entry(begin=4, end=20), 20), "a gap before tensor 'w': 4"),
    "a gap at the end": (one(entry(), 20), "a gap at its end: 4 bytes"),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}, b""), 'should be "'),
}


@pytest.mark.parametrize(("data", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_broken_file_is_refused_with_its_reason(tmp_path: Path, data: bytes, said: str) -> None:
    path = write(tmp_path / "model.safetensors", data)
    with pytest.raises(BadInput, match=said) as refusal:
        open_tensors(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 600


def test_a_truth_value_is_0_or_1(tmp_path: Path) -> None:
    path = write(tmp_path / "weights", safetensors_bytes({"w": entry("BOOL", [2], 0, 2)}, b"\1\2"))
    with open_tensors(path) as file, pytest.raises(BadInput, match="'w' is BOOL and has bytes other than 0 and 1"):
        file.read("w")


@pytest.mark.parametrize("path", ["missing", ".", "name\0"])
def test_what_is_no_file_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(BadInput, match="is no file: name a file of weights"):
        open_safetensors(tmp_path / path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused(dtype: torch.dtype, value: float) -> None:
    weight = torch.linspace(-2, 2, 1001)
    check_finite(weight.to(dtype), "w", Path("a"))
    weight[500] = value
    with pytest.raises(BadInput, match="a: tensor 'w' holds NaN or infinity"):
        check_finite(weight.to(dtype), "w", Path("a"))


@pytest.mark.parametrize("tensor", [torch.empty(0), torch.tensor(3), torch.tensor([True])])
def test_what_can_only_be_finite_passes(tensor: torch.Tensor) -> None:
    check_finite(tensor, "w", Path("a"))


# ---- folders ------------------------------------------------------------------------------------------------------

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / FIRST)
    save_file({"c": torch.full((4,), 2.0)}, tmp_path / SECOND)
    index(tmp_path, {"a": FIRST, "b": FIRST, "c": SECOND})
    return tmp_path


def index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {"total_size": 36}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_a_folder_of_shards_reads_as_one_file(folder: Path) -> None:
    with open_tensors(folder) as file:
        assert {name: e.shape for name, e in file.entries.items()} == {"a": (2,), "b": (3,), "c": (4,)}
        assert file.metadata == {"total_size": 36}
        assert file.read("c", torch.float16).tolist() == [2, 2, 2, 2]
        with pytest.raises(BadInput, match="has no tensor 'd'"):
            file.read("d")


def test_a_folder_with_one_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    assert open_folder(tmp_path).read("w").tolist() == [1, 1, 1]


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / SECOND).unlink()
    with pytest.raises(BadInput, match=f"'{SECOND}' is missing"):
        open_folder(folder)


def test_a_shard_must_hold_what_the_index_says(folder: Path) -> None:
    index(folder, {"a": FIRST, "c": FIRST})
    with pytest.raises(BadInput, match=f"says that '{FIRST}' holds 'c', which that file does not"):
        open_folder(folder)


@pytest.mark.parametrize("file", ["../x", "x/y", "/x", "x\\y", "..", ".", "", 3, None])
def test_an_index_names_files_of_its_own_folder_only(folder: Path, file: object) -> None:
    index(folder, {"a": file})
    with pytest.raises(BadInput, match="puts 'a' into .*, which is no plain file name"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it cannot be read as JSON"),
        ("[" * 100_000, "it cannot be read as JSON"),
        ("[]", "it has no object `weight_map`"),
        ('{"weight_map": []}', "it has no object `weight_map`"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "a key stands twice"),
    ],
)
def test_a_broken_index_is_refused(folder: Path, text: str, said: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadInput, match=said):
        open_folder(folder)


def test_a_folder_of_pickles_is_refused_as_such(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has neither model.safetensors nor"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(BadInput, match="has only pytorch_model.bin: it is a pickle"):
        open_folder(tmp_path)


# ---- memory -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tracing() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def minimal(count: int) -> bytes:
    entries = (b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(count))
    return b"{" + b",".join(entries) + b"}"


GREEDY = {
    "tensors without weights": raw(minimal(4096)),
    "more tensors than a file of this size has": raw(minimal(9000)),
    "names of metadata": safetensors_bytes({"__metadata__": {str(i): "" for i in range(4096)}}, b""),
    "long metadata": safetensors_bytes({"__metadata__": {"a": "\n" * 100_000}}, b""),
    "empty lists": raw(b'{"a":[' + b"[]," * 300_000 + b"]}"),
    "numbers": raw(b'{"w":{"shape":[' + b"0," * 500_000 + b"0]}}"),
    "nesting": raw(b'{"a":' * 200_000),
    "space": raw(b"{" + b" " * 1_000_000 + b"}"),
    "a long name": raw(b'{"' + b"a" * 1_000_000 + b'":1}'),
    "two thousand million entries": b"\0\0\0\x80\0\0\0\0" + b'{"a":',
}


@pytest.mark.parametrize("data", GREEDY.values(), ids=GREEDY)
def test_to_open_a_file_takes_no_more_memory_than_twice_its_bytes(tmp_path: Path, tracing: None, data: bytes) -> None:
    path, watch = write(tmp_path / "weights", data), Watch()
    try:
        with watch:
            open_tensors(path)
    except BadInput as error:
        assert len(str(error)) < 600
    assert watch.most <= BOUND * len(data) + OBJECTS


def test_three_thousand_broken_files_are_read_or_refused(tmp_path: Path) -> None:
    tally = fuzz(3000, seed=1, folder=tmp_path)
    assert not tally.crashes
    assert tally.read > 300 and tally.refused > 1500 and tally.read + tally.refused == 3000


def test_every_bfloat16_becomes_the_float32_that_torch_makes_of_it(tmp_path: Path) -> None:
    """All 65536, infinities and what is no number included, from an odd byte on."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    save_file({"a": torch.zeros(3, dtype=torch.uint8), "every": every}, tmp_path / "x.safetensors")
    with open_tensors(tmp_path / "x.safetensors") as file:
        fast = file.read("every", torch.float32)
        assert torch.equal(fast.view(torch.int32), every.float().view(torch.int32))
        assert torch.equal(fast.view(torch.int32), MappedFile.read(file, "every", torch.float32).view(torch.int32))
