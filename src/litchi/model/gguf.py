"""GGUF, the format of llama.cpp: named values and named tensors, most of them in blocks of a few bits a weight.

    with open_gguf(path) as file:
        file.metadata["general.architecture"], file.metadata["tokenizer.ggml.tokens"]
        file.read("blk.0.attn_q.weight")  # fp32, [out, in] as torch has it

Versions 2 and 3 are read, little-endian only. Offsets count from the data section, which begins at a multiple of
`general.alignment`; dims are written fastest first, so that they are torch's shape reversed. Sources: ggml's
docs/gguf.md and the comments on its block structs.
"""

from __future__ import annotations

import codecs
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model.tensorfile import (
    MAX_NAME,
    MAX_PAIRS,
    PIECE,
    Entry,
    MappedFile,
    broken,
    map_file,
    max_tensors,
    num_values,
    show,
)

VERSIONS = (2, 3)
ALIGNMENT, ALIGNMENT_KEY = 32, "general.alignment"
MAX_GGUF_DIMS = 4
MAX_NESTING = 4
"""Arrays in arrays; real files have none."""

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")

NUMBERS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
"""The types of values in the metadata."""

SMALLEST_PAIR, SMALLEST_TENSOR, SMALLEST_STRING, SMALLEST_ARRAY = 8 + 4 + 1, 8 + 4 + 4 + 8, 8, 4 + 8
"""Bytes that each takes at least: a count of them is checked against the bytes that are left."""


@dataclass(frozen=True, slots=True)
class Block:
    """A tensor type: so many values lie in so many bytes."""

    name: str
    values: int
    size: int


BLOCKS = {
    0: Block("F32", 1, 4),
    1: Block("F16", 1, 2),
    30: Block("BF16", 1, 2),
    2: Block("Q4_0", 32, 18),
    3: Block("Q4_1", 32, 20),
    6: Block("Q5_0", 32, 22),
    7: Block("Q5_1", 32, 24),
    8: Block("Q8_0", 32, 34),
    12: Block("Q4_K", 256, 144),
    13: Block("Q5_K", 256, 176),
    14: Block("Q6_K", 256, 210),
}
BY_NAME = {block.name: block for block in BLOCKS.values()}

OTHERS = {
    **{9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"},
}
"""Types that are refused by their names."""


# ---- the file -----------------------------------------------------------------------------------------------------


class GGUFFile(MappedFile):
    """A GGUF file; tensors of every type come out as fp32 if nothing else is asked for."""

    def dtype(self, entry: Entry) -> torch.dtype:
        return torch.float32

    def block(self, entry: Entry) -> int:
        return BY_NAME[entry.dtype].size

    def decode(self, entry: Entry, raw: np.ndarray) -> Tensor:
        values = dequantise(raw.reshape(-1, self.block(entry)), entry.dtype)
        return torch.from_numpy(values.reshape(-1))


class Pairs(Mapping[str, Any]):
    """The metadata as plain Python values, made when asked for: a list takes up to ten times its bytes in the file."""

    def __init__(self, path: Path, data: bytes, where: dict[str, tuple[int, int]]) -> None:
        self._path, self._data, self._where = path, data, where

    def __getitem__(self, key: str) -> Any:
        kind, at = self._where[key]
        return Cursor(self._path, self._data, at).value(kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def open_gguf(path: Path) -> GGUFFile:
    """A GGUF file, all but its weights checked. Raises BadInput, saying what is wrong, for anything else."""
    data = map_file(path)
    cursor = Cursor(path, data, 0)
    if data[:4] != b"GGUF":
        raise BadInput(f"{path} is no GGUF file: it does not begin with GGUF")
    cursor.step(4)
    check_version(path, cursor.u32())
    num_tensors, num_pairs = cursor.u64(), cursor.u64()
    where = read_pairs(cursor, num_pairs)
    metadata = Pairs(path, data[: cursor.at], where)
    alignment = read_alignment(path, metadata, where)
    entries = read_infos(cursor, num_tensors)
    begin = cursor.at + -cursor.at % alignment
    for name, info in entries.items():
        entries[name] = place(path, info, begin, alignment, len(data))
    check_apart(path, entries)
    return GGUFFile(path, data, entries, metadata)


def check_version(path: Path, version: int) -> None:
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise BadInput(
            f"{path} is a big-endian GGUF file, which is not read: convert it again for little-endian machines"
        )
    raise BadInput(f"{path} has GGUF version {version}, 2 and 3 are read: convert the model with a current llama.cpp")


def read_pairs(cursor: Cursor, count: int) -> dict[str, tuple[int, int]]:
    """The type and place of each value of the metadata, every one of them walked through."""
    cursor.expect(count, SMALLEST_PAIR, "pairs of metadata")
    if count > MAX_PAIRS:
        cursor.refuse(f"{count} pairs of metadata are claimed, at most {MAX_PAIRS} are read")
    where: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        key = cursor.name()
        if key in where:
            cursor.refuse(f"the key {show(key)} stands twice")
        kind = cursor.u32()
        where[key] = kind, cursor.at
        cursor.skip(kind)
    return where


def read_alignment(path: Path, metadata: Pairs, where: Mapping[str, tuple[int, int]]) -> int:
    if ALIGNMENT_KEY not in where:
        return ALIGNMENT
    kind, _ = where[ALIGNMENT_KEY]  # before the value: it may be a list without end
    if kind != UINT32 or metadata[ALIGNMENT_KEY].bit_count() != 1:
        broken(path, f"{ALIGNMENT_KEY} is no power of two in 32 bits")
    return metadata[ALIGNMENT_KEY]


def read_infos(cursor: Cursor, count: int) -> dict[str, Entry]:
    """What is said of each tensor; offsets still count from the data section."""
    cursor.expect(count, SMALLEST_TENSOR, "tensors")
    if count > (most := max_tensors(len(cursor.data))):
        cursor.refuse(f"{count} tensors are claimed, at most {most} are read from a file of this size")
    infos: dict[str, Entry] = {}
    for _ in range(count):
        info = read_info(cursor)
        if info.name in infos:
            cursor.refuse(f"tensor {show(info.name)} stands twice")
        infos[info.name] = info
    return infos


def read_info(cursor: Cursor) -> Entry:
    name, num_dims = cursor.name(), cursor.u32()
    if num_dims > MAX_GGUF_DIMS:
        cursor.refuse(f"tensor {show(name)} has {num_dims} dimensions, at most {MAX_GGUF_DIMS} are allowed")
    shape = tuple(cursor.u64() for _ in range(num_dims))[::-1]
    kind, offset = cursor.u32(), cursor.u64()
    if kind not in BLOCKS:
        stored = OTHERS.get(kind, f"of the unknown type {kind}")
        raise BadInput(
            f"{cursor.path}: tensor {show(name)} is {stored}, which is not read:"
            f" take the model in one of {', '.join(BY_NAME)}"
        )
    block = BLOCKS[kind]
    num = num_values(cursor.path, name, shape)
    if (shape[-1] if shape else 1) % block.values:
        cursor.refuse(f"tensor {show(name)} {list(shape)} does not divide into {block.name} blocks of {block.values}")
    return Entry(name, shape, block.name, offset, num // block.values * block.size)


def place(path: Path, info: Entry, begin: int, alignment: int, end: int) -> Entry:
    """`info` with its offset in the file, where the data section begins at `begin` and the file ends at `end`."""
    if info.offset % alignment:
        broken(path, f"tensor {show(info.name)} lies at {info.offset}, which is no multiple of {alignment}")
    if begin + info.offset + info.size > end:
        broken(path, f"tensor {show(info.name)} lies at bytes {begin + info.offset} + {info.size} of {end}")
    return Entry(info.name, info.shape, info.dtype, begin + info.offset, info.size)


def check_apart(path: Path, entries: Mapping[str, Entry]) -> None:
    """No byte belongs to two tensors; between them are bytes of padding."""
    end = 0
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.size)):
        if entry.offset < end:
            broken(path, f"tensor {show(entry.name)} overlaps the tensor before it")
        end = entry.offset + entry.size


class Cursor:
    """Goes through little-endian values, and never past the last byte."""

    def __init__(self, path: Path, data: mmap.mmap | bytes, at: int) -> None:
        self.path, self.data, self.at = path, data, at

    def step(self, size: int) -> int:
        """Go `size` bytes on and say where they begin."""
        begin, left = self.at, len(self.data) - self.at
        if size > left:
            self.refuse(f"{size} bytes should follow and {left} do")
        self.at += size
        return begin

    def expect(self, count: int, size: int, what: str) -> None:
        """Refuse `count` things of at least `size` bytes each, if so many bytes are not there."""
        left = len(self.data) - self.at
        if count * size > left:
            self.refuse(f"{count} {what} are claimed, for which {left} bytes are too few")

    def u32(self) -> int:
        return U32.unpack_from(self.data, self.step(4))[0]

    def u64(self) -> int:
        return U64.unpack_from(self.data, self.step(8))[0]

    def name(self) -> str:
        begin, size = self.at, self.u64()
        if size > MAX_NAME:
            self.refuse(f"a name of {size} bytes is claimed, at most {MAX_NAME} are allowed")
        self.at = begin
        return self.string()

    def string(self) -> str:
        begin = self.step(self.u64())
        try:
            return self.data[begin : self.at].decode()
        except UnicodeDecodeError:
            self.refuse("the text that ends there is not UTF-8")

    def value(self, kind: int) -> Any:
        """A value that `skip` has been through."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.numbers(kind, 1)[0]
        kind, count = self.u32(), self.u64()
        return self.numbers(kind, count) if kind in NUMBERS else [self.value(kind) for _ in range(count)]

    def numbers(self, kind: int, count: int) -> list:
        begin = self.step(count * NUMBERS[kind].itemsize)
        return np.frombuffer(self.data, NUMBERS[kind], count, begin).tolist() if count else []

    def skip(self, kind: int, depth: int = 0) -> None:
        """Go past a value and check all of it, without keeping any."""
        if kind == STRING:
            self.skip_text(self.u64())
        elif kind == ARRAY:
            self.skip_array(depth)
        elif kind in NUMBERS:
            self.skip_numbers(kind, 1)
        else:
            self.refuse(f"the type of value {kind} is not known")

    def skip_array(self, depth: int) -> None:
        if depth == MAX_NESTING:
            self.refuse(f"arrays lie more than {MAX_NESTING} deep in each other")
        kind, count = self.u32(), self.u64()
        if kind in NUMBERS:
            self.skip_numbers(kind, count)
            return
        self.expect(count, SMALLEST_ARRAY if kind == ARRAY else SMALLEST_STRING, "values of an array")
        if not count and kind not in (ARRAY, STRING):
            self.skip(kind)
        for _ in range(count):
            self.skip(kind, depth + 1)

    def skip_numbers(self, kind: int, count: int) -> None:
        begin = self.step(count * NUMBERS[kind].itemsize)
        if kind == BOOL and count and np.frombuffer(self.data, np.uint8, count, begin).max() > 1:
            self.refuse("a truth value there is neither 0 nor 1")

    def skip_text(self, size: int) -> None:
        """In pieces: Python may take four bytes for each of a long text."""
        end, decoder = self.step(size) + size, codecs.getincrementaldecoder("utf-8")()
        try:
            for begin in range(end - size, end, PIECE):
                stop = min(begin + PIECE, end)
                decoder.decode(self.data[begin:stop], final=stop == end)
        except UnicodeDecodeError:
            self.refuse("the text that ends there is not UTF-8")

    def refuse(self, reason: str) -> NoReturn:
        broken(self.path, f"at byte {self.at}, {reason}")


# ---- blocks -------------------------------------------------------------------------------------------------------
# Each value is a small integer times a scale, with an offset or without; arithmetic is in fp32 and in ggml's order, so
# that the results are its own. n is the number of blocks.


def dequantise(blocks: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes [n, size of a block] as fp32 [n, values of a block]. Damaged scales give NaN or infinity, no warning."""
    with np.errstate(all="ignore"):
        match dtype:
            case "F32":
                return blocks.view("<f4").astype(np.float32)
            case "F16":
                return blocks.view("<f2").astype(np.float32)
            case "BF16":
                return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)
            case "Q4_0":
                return half(blocks, 0) * (nibbles(blocks[:, 2:]) - 8)
            case "Q4_1":
                return half(blocks, 0) * nibbles(blocks[:, 4:]) + half(blocks, 2)
            case "Q5_0":
                return half(blocks, 0) * (nibbles(blocks[:, 6:]) + 16 * bits(blocks[:, 2:6]) - 16)
            case "Q5_1":
                return half(blocks, 0) * (nibbles(blocks[:, 8:]) + 16 * bits(blocks[:, 4:8])) + half(blocks, 2)
            case "Q8_0":
                return half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)
            case "Q4_K":
                return eight_groups(blocks, nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))
            case "Q5_K":
                high = blocks[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None] & 1
                low = nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
                return eight_groups(blocks, low + 16 * high.astype(np.float32))
            case "Q6_K":
                return sixteen_groups(blocks)
    raise AssertionError(dtype)


def half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The fp16 at byte `at` of each block, fp32 [n, 1]."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """The low halves of bytes [..., k], then the high ones: fp32 [..., 2k]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float32)


def bits(packed: np.ndarray) -> np.ndarray:
    """The bits of bytes [n, k], lowest first: fp32 [n, 8k]."""
    return np.unpackbits(packed, axis=1, bitorder="little").astype(np.float32)


def eight_groups(blocks: np.ndarray, quants: np.ndarray) -> np.ndarray:
    """Q4_K and Q5_K: groups of 32 quants [n, 8, 32], each with a scale and a minimum of six bits, in units of two fp16.

    Twelve bytes hold the sixteen: four scales, four minima, and in the last four bytes the low halves of the others,
    whose two high bits lie on top of the first eight.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    values = (half(blocks, 0) * scales)[..., None] * quants - (half(blocks, 2) * minima)[..., None]
    return values.reshape(len(blocks), -1)


def sixteen_groups(blocks: np.ndarray) -> np.ndarray:
    """Q6_K: groups of 16 quants of six bits, each with a scale of eight bits, in units of one fp16.

    In each half of a block 64 bytes hold the low four bits and 32 bytes the high two of 128 quants.
    """
    low = nibbles(blocks[:, :128].reshape(-1, 2, 64))
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    quants = low + 16 * high.reshape(-1, 2, 128).astype(np.float32) - 32
    scales = half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (scales[..., None] * quants.reshape(-1, 16, 16)).reshape(len(blocks), -1)
