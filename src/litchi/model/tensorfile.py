"""A file of weights is opened without trust: every number in it is checked, then tensors are read one at a time.

    with open_tensors(path) as file:  # a safetensors file, a GGUF file, or a folder of safetensors
        shape = file.entries["model.norm.weight"].shape
        weight = file.read("model.norm.weight", torch.float32)

Nothing is unpickled, so nothing in a file can run. Memory is asked for only after what a file claims was found in it:
to open one takes at most twice its bytes and 2 MiB, to read a tensor takes that tensor and 2 MiB. (Text in the metadata
of safetensors takes more, as Python keeps it: up to nine times its bytes if there are emoji in it.) What was read is a
copy that outlives the file. A file must not be cut short while it is open: the system ends a process that reads a
mapped byte that has gone. Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor

from litchi.config import BadInput, nearest

MAX_HEADER = 100_000_000
"""Bytes; the format's own bound."""

MAX_DIMS = 64
"""Dimensions that torch's loops take."""

MAX_NAME = 65_535
MAX_PAIRS = 4096
"""Bytes of a name, and names of metadata; real files have names of a hundred bytes and a hundred names."""

FREE_TENSORS, BYTES_PER_TENSOR = 4096, 1024
"""A file may hold so many tensors whatever its size, and then one for each so many bytes: an entry costs memory."""

PIECE = 1 << 16
"""Bytes that are decoded at a time; they and what they become fit a core's cache."""

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"

PICKLE_MEND = (
    "it is a pickle, which can run code when it is read; convert it to safetensors first with"
    " safetensors.torch.save_file(torch.load(OLD, weights_only=True), NEW)"
)

SPACE = rb"[ \t\r\n]*"
SPACES = re.compile(SPACE)
BRACKETS = re.compile(SPACE + rb"\[([-+.\w \t\r\n,]{0,2048})\]")
COUNT = re.compile(SPACE + rb"(0|[1-9][0-9]{0,18})" + SPACE)
STRING_STOP = re.compile(rb'["\\]')


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: `size` bytes from byte `offset` of its file on, of the type that the file calls `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    size: int


class TensorFile(ABC):
    """Named tensors that are read when they are asked for. It is its own context manager."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, Any]

    @abstractmethod
    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor as a copy, in `dtype` or as stored. Raises BadInput for a name that is not there."""

    def read_box(self, name: str, box: Sequence[tuple[int, int]], dtype: torch.dtype | None = None) -> Tensor:
        """The part of a tensor from `begin` up to `stop` in each dim, as a copy."""
        return self.read(name, dtype)[tuple(slice(begin, stop) for begin, stop in box)].clone()

    @abstractmethod
    def close(self) -> None:
        """Let go of the file; what was read stays."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MappedFile(TensorFile):
    """One file whose bytes the system brings in as they are touched; formats say how bytes become values."""

    def __init__(self, path: Path, data: mmap.mmap, entries: Mapping[str, Entry], metadata: Mapping[str, Any]) -> None:
        self.path, self.entries, self.metadata = path, entries, metadata
        self._data: mmap.mmap | None = data

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        entry = self._find(name)
        out = torch.empty(entry.shape, dtype=dtype or self.dtype(entry))
        flat, filled = out.view(-1), 0
        for raw in self._pieces(entry):
            part = self.decode(entry, raw)
            flat[filled : filled + len(part)] = part
            filled += len(part)
        assert filled == len(flat), (name, filled, len(flat))
        return out

    def close(self) -> None:
        # Not data.close(): another thread may be in the middle of a read, and the last one out unmaps.
        self._data = None

    @abstractmethod
    def dtype(self, entry: Entry) -> torch.dtype:
        """What `read` gives if nothing else is asked for."""

    @abstractmethod
    def block(self, entry: Entry) -> int:
        """The smallest number of bytes that can be decoded by itself."""

    @abstractmethod
    def decode(self, entry: Entry, raw: np.ndarray) -> Tensor:
        """The values of whole blocks of bytes, flat."""

    def _find(self, name: str) -> Entry:
        if name not in self.entries:
            raise BadInput(f"{self.path} has no tensor {show(name)}{nearest(name, self.entries)}")
        return self.entries[name]

    def _pieces(self, entry: Entry) -> Iterator[np.ndarray]:
        if self._data is None:
            raise ValueError(f"{self.path} is closed")
        block = self.block(entry)
        step = max(1, PIECE // block) * block
        raw = np.frombuffer(self._data, np.uint8, entry.size, entry.offset) if entry.size else np.empty(0, np.uint8)
        for begin in range(0, entry.size, step):
            yield raw[begin : begin + step]


class SafetensorsFile(MappedFile):
    """A length, a header of JSON, and the tensors one behind the other."""

    def dtype(self, entry: Entry) -> torch.dtype:
        return DTYPES[entry.dtype]

    def block(self, entry: Entry) -> int:
        return DTYPES[entry.dtype].itemsize

    def decode(self, entry: Entry, raw: np.ndarray) -> Tensor:
        if entry.dtype == "BOOL" and raw.max() > 1:
            broken(self.path, f"tensor {show(entry.name)} is BOOL and has bytes other than 0 and 1")
        return torch.from_numpy(raw.copy()).view(DTYPES[entry.dtype])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """bfloat16 becomes float32 in one call that does not hold the interpreter: the upper half of its bits.

        oracle: `MappedFile.read`
        """
        entry = self._find(name)
        if entry.dtype != "BF16" or dtype is not torch.float32 or not entry.size or self._data is None:
            return super().read(name, dtype)
        out = torch.empty(entry.shape, dtype=dtype)
        raw = np.frombuffer(self._data, "<u2", entry.size // 2, entry.offset)
        np.left_shift(raw, 16, out=out.view(-1).numpy().view(np.uint32), dtype=np.uint32)
        return out

    def read_box(self, name: str, box: Sequence[tuple[int, int]], dtype: torch.dtype | None = None) -> Tensor:
        """Only the bytes of the box are touched. oracle: `TensorFile.read_box`"""
        entry = self._find(name)
        if self._data is None:
            raise ValueError(f"{self.path} is closed")
        if entry.size == 0 or not entry.shape:
            return super().read_box(name, box, dtype)
        *outer, (begin, stop) = box
        width = self.block(entry)
        raw = np.frombuffer(self._data, np.uint8, entry.size, entry.offset)
        rows = raw.reshape(*entry.shape[:-1], entry.shape[-1] * width)
        part = rows[(*(slice(*cut) for cut in outer), slice(begin * width, stop * width))]
        out = self.decode(entry, part.reshape(-1)) if part.size else torch.empty(0, dtype=self.dtype(entry))
        return out.view([b - a for a, b in box]).to(dtype or out.dtype)


class Shards(TensorFile):
    """A folder of safetensors files with an index that says which file holds which tensor."""

    def __init__(
        self, path: Path, files: Mapping[str, TensorFile], where: Mapping[str, str], metadata: Mapping[str, Any]
    ) -> None:
        self.path, self.metadata, self._files, self._where = path, metadata, files, where
        self.entries = {name: files[file].entries[name] for name, file in where.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._where:
            raise BadInput(f"{self.path} has no tensor {show(name)}{nearest(name, self.entries)}")
        return self._files[self._where[name]].read(name, dtype)

    def read_box(self, name: str, box: Sequence[tuple[int, int]], dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._where:
            raise BadInput(f"{self.path} has no tensor {show(name)}{nearest(name, self.entries)}")
        return self._files[self._where[name]].read_box(name, box, dtype)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


# ---- opening ------------------------------------------------------------------------------------------------------


def open_tensors(path: Path) -> TensorFile:
    """A safetensors file, a GGUF file or a folder, told apart by what is in it and not by its name.

    Raises BadInput for a pickle, for a file that is neither, and for one that is broken.
    """
    if path.is_dir():
        return open_folder(path)
    if first_bytes(path)[:4] == b"GGUF":
        from litchi.model.gguf import open_gguf  # it builds on this file, which therefore cannot import it at the top

        return open_gguf(path)
    return open_safetensors(path)


def open_safetensors(path: Path) -> TensorFile:
    """A safetensors file, its whole header checked. Raises BadInput, saying what is wrong, for anything else."""
    refuse_others(path)
    data = map_file(path)
    if len(data) < 8:
        broken(path, f"it has {len(data)} bytes, which is less than a header's length takes")
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, MAX_HEADER):
        broken(
            path,
            f"it is cut off, or neither safetensors nor GGUF: it claims a header of {length} bytes"
            f" and has {len(data)} (at most {MAX_HEADER} are allowed)",
        )
    header = Header(path, data, 8, 8 + length)
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for name in header.members(max_tensors(len(data))):
        if name == "__metadata__":
            metadata = {key: header.string(length) for key in header.members(MAX_PAIRS)}
        else:
            entries[name] = parse_entry(header, name)
    header.finish()
    check_layout(path, entries, header.end, len(data))
    return SafetensorsFile(path, data, entries, metadata)


def open_folder(path: Path) -> TensorFile:
    """What a Hugging Face folder holds: one model.safetensors, or several and their index.

    Raises BadInput if there is neither, if a file that the index names is missing, or lacks a tensor it should hold.
    """
    if (path / WHOLE).is_file():
        return open_safetensors(path / WHOLE)
    if (path / INDEX).is_file():
        return open_shards(path / INDEX)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if (path / name).is_file():
            raise BadInput(f"{path} has only {name}: {PICKLE_MEND}")
    raise BadInput(f"{path} has neither {WHOLE} nor {INDEX}: name a folder that has, or a file of weights")


def open_shards(index_path: Path) -> TensorFile:
    """The files beside an index that it names."""
    path, index = index_path.parent, read_index(index_path)
    where = index["weight_map"]
    files: dict[str, TensorFile] = {}
    for file in sorted(set(where.values())):
        if not (path / file).is_file():
            raise BadInput(
                f"{path}: {show(file)} is missing, which {index_path.name} names: copy the folder again, with all files"
            )
        files[file] = open_safetensors(path / file)
    for name, file in where.items():
        if name not in files[file].entries:
            broken(index_path, f"it says that {show(file)} holds {show(name)}, which that file does not")
    metadata = index.get("metadata")
    return Shards(path, files, where, metadata if isinstance(metadata, dict) else {})


def read_index(path: Path) -> dict:
    """An index whose `weight_map` is known to be from strings to plain file names."""
    if path.stat().st_size > MAX_HEADER:
        broken(path, f"it is longer than {MAX_HEADER} bytes")
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        broken(path, f"it cannot be read as JSON ({str(error)[:200]})")
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        broken(path, "it has no object `weight_map`")
    for name, file in index["weight_map"].items():
        if not isinstance(file, str) or not file or set(file) & set("/\\\0") or file in (".", ".."):
            said = show(file) if isinstance(file, str) else type(file).__name__
            broken(path, f"it puts {show(name)} into {said}, which is no plain file name")
    return index


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a key stands twice")
    return members


# ---- the header ---------------------------------------------------------------------------------------------------


class Header:
    """Reads JSON as a stream, and only what a header may hold: a tree of any JSON may take thirty times its bytes."""

    def __init__(self, path: Path, data: mmap.mmap, begin: int, end: int) -> None:
        self.path, self.data, self.at, self.end = path, data, begin, end

    def members(self, most: int) -> Iterator[str]:
        """The keys of an object, at most `most`; a value must be read before the next key is asked for."""
        seen: set[str] = set()
        self.mark(b"{")
        if self.peek() == b"}":
            self.mark(b"}")
            return
        while True:
            key = self.string(MAX_NAME)
            if key in seen:
                self.refuse(f"{show(key)} stands in it twice")
            if len(seen) == most:
                self.refuse(f"an object in it has more than {most} members")
            seen.add(key)
            self.mark(b":")
            yield key
            if self.mark(b",}") == b"}":
                return

    def string(self, most: int) -> str:
        """Text of at most `most` bytes."""
        self.mark(b'"')
        begin = after = self.at
        while (found := STRING_STOP.search(self.data, after, self.end)) and found[0] == b"\\":
            after = found.end() + 1
        if found is None:
            self.refuse("a string in it has no end")
        if found.start() - begin > most:
            self.refuse(f"a string in it is longer than {most} bytes")
        self.at = found.end()
        try:
            text, _ = json.JSONDecoder().raw_decode(self.data[begin - 1 : self.at].decode())
            text.encode()
        except ValueError:
            self.refuse(f"the string at byte {begin} is not JSON text in UTF-8")
        return text

    def counts(self) -> tuple[int, ...]:
        """A list of integers from 0 on."""
        brackets = BRACKETS.match(self.data, self.at, self.end)
        if brackets is None:
            self.refuse(f"at byte {self.at} should be a list of integers")
        self.at = brackets.end()
        if not brackets[1].strip():
            return ()
        items = [COUNT.fullmatch(item) for item in brackets[1].split(b",")]
        if not all(items):
            self.refuse(f"[{brackets[1][:80].decode()}] should be integers that are not negative")
        return tuple(int(item[1]) for item in items if item)

    def finish(self) -> None:
        if self.data[self.at : self.end].strip(b" \t\r\n"):
            self.refuse(f"after its last brace, at byte {self.at}, something else follows")

    def mark(self, marks: bytes) -> bytes:
        """Step over one of `marks` and say which."""
        found = self.peek()
        if not found or found not in marks:
            self.refuse(f"at byte {self.at} should be {' or '.join(chr(m) for m in marks)}, not {found!r}")
        self.at += 1
        return found

    def peek(self) -> bytes:
        spaces = SPACES.match(self.data, self.at, self.end)
        assert spaces is not None
        self.at = spaces.end()
        return self.data[self.at : min(self.at + 1, self.end)]

    def refuse(self, reason: str) -> NoReturn:
        broken(self.path, f"in its header, {reason}")


def parse_entry(header: Header, name: str) -> Entry:
    dtype, shape, span = "", None, None
    for key in header.members(4):  # one too many is refused by its name
        if key == "dtype":
            dtype = header.string(MAX_NAME)
        elif key == "shape":
            shape = header.counts()
        elif key == "data_offsets":
            span = header.counts()
        else:
            header.refuse(f"tensor {show(name)} has a field {show(key)}, which the format does not know")
    if not dtype or shape is None or span is None or len(span) != 2:
        header.refuse(f"tensor {show(name)} lacks a dtype, a shape or two data_offsets")
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise BadInput(f"{header.path}: tensor {show(name)} has dtype {show(dtype)}: convert it to one of {known}")
    begin, end = span
    if not begin <= end <= len(header.data) - header.end:
        header.refuse(f"tensor {show(name)} lies at bytes {begin} to {end} of {len(header.data) - header.end}")
    if end - begin != (needed := num_values(header.path, name, shape) * DTYPES[dtype].itemsize):
        header.refuse(f"tensor {show(name)}, {dtype} {list(shape)}, needs {needed} bytes and has {end - begin}")
    return Entry(name, shape, sys.intern(dtype), header.end + begin, end - begin)


def check_layout(path: Path, entries: Mapping[str, Entry], begin: int, end: int) -> None:
    """Every byte from `begin` to `end` belongs to exactly one tensor."""
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.size)):
        if entry.offset < begin:
            broken(path, f"tensor {show(entry.name)} overlaps the tensor before it")
        if entry.offset > begin:
            broken(path, f"there is a gap before tensor {show(entry.name)}: {entry.offset - begin} bytes of no tensor")
        begin += entry.size
    if begin < end:
        broken(path, f"there is a gap at its end: {end - begin} bytes of no tensor")


# ---- checks that every format shares ------------------------------------------------------------------------------


def check_finite(tensor: Tensor, name: str, path: Path) -> None:
    """Raises BadInput if a weight is infinite or not a number: one such value makes every answer worthless."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # The two ends carry NaN and infinity, and take no memory; eight bits have no such loop.
    ends = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax()
    if not all(torch.isfinite(end) for end in ends):
        raise BadInput(f"{path}: tensor {show(name)} holds NaN or infinity: the file is damaged, download it again")


def refuse_others(path: Path) -> None:
    """Raises BadInput for what people take for safetensors: a pickle, bare or in a zip, and GGUF."""
    first = first_bytes(path)
    if first[:4] == b"GGUF":
        raise BadInput(f"{path} is a GGUF file and not safetensors: rename it to .gguf and open it as such")
    is_pickle = first[:4] == b"PK\x03\x04" or (first[:1] == b"\x80" and first[1:2] in (b"\2", b"\3", b"\4", b"\5"))
    if is_pickle and first[8:9] != b"{":  # a safetensors header of 640 bytes begins as a pickle does
        raise BadInput(f"{path} cannot be opened: {PICKLE_MEND}")


def first_bytes(path: Path) -> bytes:
    data = map_file(path)
    return data[:9]


def map_file(path: Path) -> mmap.mmap:
    try:
        is_file, is_empty = path.is_file(), path.is_file() and not path.stat().st_size
        if is_file and not is_empty:
            with path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}): check its path and its rights") from error
    if is_empty:
        broken(path, "it is empty")
    raise BadInput(f"{path} is no file: name a file of weights")


def max_tensors(size: int) -> int:
    """How many tensors a file of `size` bytes may hold."""
    return FREE_TENSORS + size // BYTES_PER_TENSOR


def num_values(path: Path, name: str, shape: tuple[int, ...]) -> int:
    """The product of `shape`. Raises BadInput for a shape that torch cannot count in, even if one dim is 0."""
    if len(shape) > MAX_DIMS:
        broken(path, f"tensor {show(name)} has {len(shape)} dimensions, at most {MAX_DIMS} are read")
    if math.prod(max(dim, 1) for dim in shape) >= 1 << 60:
        broken(path, f"tensor {show(name)} claims the shape {list(shape)}, which no memory holds")
    return math.prod(shape)


def show(name: str) -> str:
    """A name from a file as one short line."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def broken(path: Path, reason: str) -> NoReturn:
    raise BadInput(f"{path} is broken: {reason}: download or copy it again")
