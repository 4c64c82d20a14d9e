"""What torch.save writes is a zip of one pickle and of raw numbers: both are read where they lie, and nothing runs.

    archive = open_archive(path, data, begin, end, TENSOR_NAMES)
    weight = stored_tensor(archive, archive.tree["param"]).read()

The zip may be a piece of a larger file, from byte `begin` to byte `end`. Numbers are copied only when they are asked
for, and only those that are. Sources: torch/_utils.py (`_rebuild_tensor_v2`), torch/serialization.py.
"""

from __future__ import annotations

import io
import math
import mmap
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model.pickled import Made, Name, Outside, read_pickle
from litchi.model.tensorfile import broken, num_values, show

INTEGERS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
FLOATS = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64")
DTYPES: dict[str, torch.dtype] = {f"torch.{name}": getattr(torch, name) for name in INTEGERS + FLOATS}
STORAGES = {
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.ShortStorage": torch.int16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.storage.UntypedStorage": torch.uint8,
}
REBUILT, REBUILT_AS, PARAMETER = (f"torch._utils._rebuild_{name}" for name in ("tensor_v2", "tensor_v3", "parameter"))

TENSOR_NAMES = {REBUILT, REBUILT_AS, PARAMETER, "collections.OrderedDict", *DTYPES, *STORAGES}
"""All that a saved tensor, or a dict of tensors, names."""

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
LOCAL_HEADER = 30
"""Bytes of a zip's local header before the name; two of 16 bits at its end say how long the name and its extra are."""


@dataclass(frozen=True, slots=True)
class Archive:
    """One zip: its pickle as data, and where each storage lies in `data` (first byte, bytes)."""

    path: Path
    data: mmap.mmap
    tree: Any
    storages: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file. `offset` is the byte of its first value; strides count values."""

    data: mmap.mmap
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def read(self, part: tuple[slice, ...] = ()) -> Tensor:
        """A copy of the values that `part` selects."""
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype)[part]
        word = np.dtype(WORDS[self.dtype.itemsize])
        count = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        flat = np.frombuffer(self.data, word, count, self.offset)
        steps = [stride * word.itemsize for stride in self.strides]
        found = np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)[part]
        return torch.from_numpy(np.array(found, order="C")).view(self.dtype)


def open_archive(path: Path, data: mmap.mmap, begin: int, end: int, admitted: Collection[str] | None) -> Archive:
    """Raises BadInput for what is no zip of torch.save, is cut off, or names what was not admitted."""
    records: dict[str, tuple[int, int]] = {}
    try:
        with zipfile.ZipFile(Window(data, begin, end)) as zipped:
            for info in zipped.infolist():
                records[info.filename.partition("/")[2]] = place(path, data, begin, end, info)
    except BadInput:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, OSError) as error:
        broken(path, f"bytes {begin} to {end} are no zip that torch.save wrote ({str(error)[:120]})")
    if "data.pkl" not in records:
        broken(path, f"the zip at byte {begin} has no data.pkl")
    if "byteorder" in records and bytes_of(data, records["byteorder"]) != b"little":
        raise BadInput(f"{path} was written on a machine that puts the high byte first: save it on another")
    tree = read_pickle(bytes_of(data, records["data.pkl"]), path, admitted)
    storages = {name.removeprefix("data/"): where for name, where in records.items() if name.startswith("data/")}
    return Archive(path, data, tree, storages)


def place(path: Path, data: mmap.mmap, begin: int, end: int, info: zipfile.ZipInfo) -> tuple[int, int]:
    at = begin + info.header_offset
    head = data[at : at + LOCAL_HEADER]
    if at < begin or len(head) < LOCAL_HEADER or head[:4] != b"PK\3\4":
        broken(path, f"{show(info.filename)} has no header at byte {at}")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        broken(path, f"{show(info.filename)} is compressed, which torch.save never does")
    first = at + LOCAL_HEADER + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    if first + info.file_size > end:
        broken(path, f"it is cut off: {show(info.filename)} ends at byte {first + info.file_size} of {end}")
    return first, info.file_size


def bytes_of(data: mmap.mmap, where: tuple[int, int]) -> bytes:
    return data[where[0] : where[0] + where[1]]


def stored_tensor(archive: Archive, node: Any) -> StoredTensor:
    """A tensor of the archive's tree, all its numbers checked. Raises BadInput for what is none."""
    if isinstance(node, Made) and node.name == PARAMETER and node.args:
        node = node.args[0]
    if not isinstance(node, Made) or node.name not in (REBUILT, REBUILT_AS) or len(node.args) < 4:
        broken(archive.path, f"it should hold a tensor, not {kind_of(node)}")
    dtype, first, size = storage(archive, node.args[0])
    if node.name == REBUILT_AS:
        dtype = dtype_of(archive.path, node.args[6] if len(node.args) > 6 else None)
    offset, shape, strides = node.args[1], counts(archive.path, node.args[2]), counts(archive.path, node.args[3])
    if not is_count(offset) or len(shape) != len(strides):
        broken(archive.path, "a tensor in it has no offset, or strides for other dimensions than it has")
    values = num_values(archive.path, "in it", shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if values else 0
    if values and (last >= size // dtype.itemsize or values > size // dtype.itemsize):
        broken(archive.path, f"a tensor in it, {dtype} {list(shape)}, does not fit its {size} bytes")
    return StoredTensor(archive.data, dtype, shape, strides, first + offset * dtype.itemsize)


def storage(archive: Archive, node: Any) -> tuple[torch.dtype, int, int]:
    """Its type, first byte and bytes."""
    key = node.key if isinstance(node, Outside) else None
    if not isinstance(key, tuple) or len(key) != 5 or key[0] != "storage" or not isinstance(key[1], Name):
        broken(archive.path, "a tensor in it names no storage")
    where = archive.storages.get(key[2]) if isinstance(key[2], str) else None
    if where is None or key[1].text not in STORAGES:
        broken(archive.path, f"a tensor in it lies in a storage of type {show(key[1].text)} that is not there")
    return STORAGES[key[1].text], *where


def dtype_of(path: Path, node: Any) -> torch.dtype:
    text = node.text if isinstance(node, Name) else ""
    if text not in DTYPES:
        raise BadInput(f"{path}: a tensor has dtype {show(text)}, which is not read; {', '.join(DTYPES)} are")
    return DTYPES[text]


def counts(path: Path, node: Any) -> tuple[int, ...]:
    """A shape, or an offset in each dimension: a tuple, bare or as torch.Size."""
    if isinstance(node, Made) and node.name == "torch.Size" and len(node.args) == 1:
        node = node.args[0]
    if not isinstance(node, tuple | list) or not all(map(is_count, node)):
        broken(path, f"it should hold the sizes of a tensor, not {kind_of(node)}")
    return tuple(node)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def kind_of(node: Any) -> str:
    match node:
        case Made(name) | Name(name):
            return show(name)
    return type(node).__name__


class Window(io.RawIOBase):
    """Part of a map as a file of its own."""

    def __init__(self, data: mmap.mmap, begin: int, end: int) -> None:
        self._data, self._begin, self._end, self._at = data, begin, end, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._end - self._begin}[whence]
        if base + offset < 0:
            raise ValueError("before the beginning")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        at = min(self._begin + self._at, self._end)
        stop = self._end if size is None or size < 0 else min(at + size, self._end)
        self._at += stop - at
        return self._data[at:stop]
