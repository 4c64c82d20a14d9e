"""A folder that torch.distributed.checkpoint wrote is read without it: whole tensors out of the pieces of every rank.

    with open_distributed(folder) as file:  # .metadata and *.distcp
        weight = file.read("decoder.final_layernorm.weight", torch.float32)

`.metadata` is a pickle of a few dataclasses; it is read as data, and a name outside them is refused. Before anything is
read, the pieces of each tensor are known to cover it once and to lie within their files. Of a tensor's pieces one is in
memory at a time, and of a stack of layers only the layer asked for. Sources: torch/distributed/checkpoint/metadata.py
and filesystem.py; the names of planners are those that Megatron-core leaves in `all_local_plans`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litchi.config import BadInput, nearest
from litchi.model.pickled import Made, read_pickle
from litchi.model.tensorfile import Entry, TensorFile, broken, map_file, num_values, show
from litchi.model.torchzip import DTYPES, TENSOR_NAMES, counts, dtype_of, open_archive, stored_tensor

METADATA = ".metadata"

Fields = Mapping[str, Any]
Sizes = Mapping[str, int]
"""Bytes of each file of the folder."""

TORCH = "torch.distributed.checkpoint."
ADMITTED = {
    *DTYPES,
    *(f"{TORCH}metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata")),
    *(f"{TORCH}metadata.{name}" for name in ("TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties")),
    *(f"{TORCH}filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
    *(f"{TORCH}planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *(f"megatron.core.dist_checkpointing.strategies.torch.MCore{name}" for name in ("Metadata", "SavePlan")),
    f"{TORCH}metadata._MEM_FORMAT_ENCODING",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    "torch.Size",
    "torch.serialization._get_layout",
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(f"pathlib._local.{name}" for name in ("PosixPath", "WindowsPath")),
    *(f"collections.{name}" for name in ("OrderedDict", "defaultdict")),
    *(f"builtins.{name}" for name in ("list", "dict", "set", "tuple", "getattr")),
}
"""All that such a pickle names. `getattr` is how Python 3.14 writes members of enums; like the others it is not run."""

FREE_CELLS, CELLS_PER_PIECE = 1 << 16, 64
"""Of the grid that a tensor's pieces make: pieces of ranks in rows and columns are its cells, each one of them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, and the bytes of a file where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


@dataclass(frozen=True, slots=True)
class Spread:
    """A tensor in pieces."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


class Distributed(TensorFile):
    """The tensors of such a folder. `blobs` are what it holds besides: bytes that were saved under a name."""

    metadata: Mapping[str, Any] = {}

    def __init__(self, path: Path, spreads: Mapping[str, Spread], blobs: Mapping[str, Piece]) -> None:
        self.path, self.blobs, self._spreads = path, blobs, spreads
        self.entries = {
            name: Entry(name, s.shape, str(s.dtype), 0, math.prod(s.shape) * s.dtype.itemsize)
            for name, s in spreads.items()
        }

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        spread = self._find(name)
        out = torch.empty(spread.shape, dtype=dtype or spread.dtype)
        for piece in spread.pieces:
            box = tuple(slice(at, at + n) for at, n in zip(piece.offsets, piece.sizes, strict=True))
            out[box] = self._read_piece(name, spread, piece, ())
        return out

    def read_row(self, name: str, row: int, dtype: torch.dtype | None = None) -> Tensor:
        """Entry `row` of the first dimension: a layer of a stack; of the pieces only those that hold it are touched."""
        spread = self._find(name)
        out = torch.empty(spread.shape[1:], dtype=dtype or spread.dtype)
        for piece in spread.pieces:
            inside = row - piece.offsets[0]
            if 0 <= inside < piece.sizes[0]:
                box = tuple(slice(at, at + n) for at, n in zip(piece.offsets[1:], piece.sizes[1:], strict=True))
                out[box] = self._read_piece(name, spread, piece, (slice(inside, inside + 1),))[0]
        return out

    def close(self) -> None:
        """Files are open only while a piece is read."""

    def _find(self, name: str) -> Spread:
        if name not in self._spreads:
            raise BadInput(f"{self.path} has no tensor {show(name)}{nearest(name, self.entries)}")
        return self._spreads[name]

    def _read_piece(self, name: str, spread: Spread, piece: Piece, part: tuple[slice, ...]) -> Tensor:
        path = self.path / piece.file
        archive = open_archive(path, map_file(path), piece.begin, piece.begin + piece.length, TENSOR_NAMES)
        stored = stored_tensor(archive, archive.tree)
        if (stored.shape, stored.dtype) != (piece.sizes, spread.dtype):
            found, told = f"{stored.dtype} {list(stored.shape)}", f"{spread.dtype} {list(piece.sizes)}"
            broken(path, f"its piece of {show(name)} at byte {piece.begin} is {found}, {METADATA} says {told}")
        return stored.read(part)


# ---- opening ------------------------------------------------------------------------------------------------------


def open_distributed(folder: Path) -> Distributed:
    """Raises BadInput for a `.metadata` that names what it should not, and for pieces that overlap, lack or end."""
    path = folder / METADATA
    fields = state_of(path, read_pickle(map_file(path)[:], path, ADMITTED), "Metadata")
    told, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(told, dict) or not isinstance(stored, dict):
        broken(path, "it lacks state_dict_metadata or storage_data")
    places = {index_of(path, key): state_of(path, info, "_StorageInfo") for key, info in stored.items()}
    sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()}
    spreads: dict[str, Spread] = {}
    blobs: dict[str, Piece] = {}
    for name, node in told.items():
        if not isinstance(name, str):
            broken(path, "a name in it is no text")
        if is_made(node, "BytesStorageMetadata"):
            if (where := places.get((name, None))) is not None:
                blobs[name] = place(path, name, where, (), (), sizes)
        else:
            spreads[name] = spread_of(path, name, state_of(path, node, "TensorStorageMetadata"), places, sizes)
    return Distributed(folder, spreads, blobs)


def spread_of(path: Path, name: str, fields: Fields, places: Mapping[tuple, Fields], sizes: Sizes) -> Spread:
    shape, dtype = counts(path, fields.get("size")), element_type(path, fields.get("properties"))
    num_values(path, name, shape)
    chunks = fields.get("chunks")
    if not isinstance(chunks, list):
        broken(path, f"tensor {show(name)} has no list of pieces")
    pieces: dict[tuple, Piece] = {}
    for chunk in chunks:
        box = state_of(path, chunk, "ChunkStorageMetadata")
        offsets, lengths = counts(path, box.get("offsets")), counts(path, box.get("sizes"))
        where = places.get((name, offsets))
        if where is None and not shape:
            where = places.get((name, None))
        if where is None:
            broken(path, f"it does not say where the piece of {show(name)} at {list(offsets)} lies")
        pieces[offsets, lengths] = place(path, name, where, offsets, lengths, sizes)
    check_cover(path, name, shape, list(pieces.values()))
    return Spread(shape, dtype, tuple(p for p in pieces.values() if math.prod(p.sizes)))


def place(
    path: Path, name: str, where: Fields, offsets: tuple[int, ...], lengths: tuple[int, ...], sizes: Sizes
) -> Piece:
    file, begin, length = (where.get(key) for key in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or not isinstance(begin, int) or not isinstance(length, int) or min(begin, length) < 0:
        broken(path, f"it does not say in which bytes of which file {show(name)} lies")
    if where.get("transform_descriptors"):
        raise BadInput(f"{path}: {show(name)} was transformed when it was saved: save it again without extensions")
    if set(file) & set("/\\\0") or file in ("", ".", ".."):
        broken(path, f"it puts {show(name)} into {show(file)}, which is no plain file name")
    if file not in sizes:
        raise BadInput(f"{path.parent}: {show(file)} is missing, which {METADATA} names: copy the folder again, whole")
    if begin + length > sizes[file]:
        broken(path.parent / file, f"it is cut off: it has {sizes[file]} bytes, {show(name)} ends at {begin + length}")
    return Piece(offsets, lengths, file, begin, length)


def check_cover(path: Path, name: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> None:
    """That every value of a tensor lies in exactly one piece."""
    for piece in pieces:
        ends = [at + n for at, n in zip(piece.offsets, piece.sizes, strict=False)]
        if not len(shape) == len(piece.offsets) == len(piece.sizes) or any(
            end > n for end, n in zip(ends, shape, strict=True)
        ):
            broken(path, f"a piece of {show(name)} reaches {ends} in a tensor of shape {list(shape)}")
    if not math.prod(shape):
        return
    filled = [p for p in pieces if math.prod(p.sizes)]
    edges = [sorted({0, n, *edges_of(filled, dim)}) for dim, n in enumerate(shape)]
    if math.prod(len(each) - 1 for each in edges) > max(FREE_CELLS, CELLS_PER_PIECE * len(filled)):
        broken(path, f"the pieces of {show(name)} make no grid")
    index = [{edge: i for i, edge in enumerate(each)} for each in edges]
    times = np.zeros([len(each) - 1 for each in edges], np.uint32)
    for p in filled:
        box = zip(index, p.offsets, p.sizes, strict=True)
        times[tuple(slice(at[begin], at[begin + n]) for at, begin, n in box)] += 1
    if not times.min():
        broken(path, f"the pieces of {show(name)} leave a hole: a rank's file is not in {METADATA}")
    if times.max() > 1:
        broken(path, f"pieces of {show(name)} overlap")


def edges_of(pieces: Sequence[Piece], dim: int) -> set[int]:
    return {edge for p in pieces for edge in (p.offsets[dim], p.offsets[dim] + p.sizes[dim])}


def element_type(path: Path, node: Any) -> torch.dtype:
    """The dtype of TensorProperties, whose state is a tuple or, in old files, a dict."""
    state = node.state if is_made(node, "TensorProperties") else None
    first = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    return dtype_of(path, first)


def index_of(path: Path, node: Any) -> tuple[str, tuple[int, ...] | None]:
    """What finds a piece: its tensor's name, and its offset if it is one."""
    state = state_of(path, node, "MetadataIndex")
    name, offset = state.get("fqn"), state.get("offset")
    if not isinstance(name, str):
        broken(path, "it places what has no name")
    return name, None if offset is None else counts(path, offset)


def state_of(path: Path, node: Any, kind: str) -> Mapping[str, Any]:
    """The fields of a dataclass."""
    state = node.state if is_made(node, kind) else None
    if isinstance(state, tuple) and len(state) == 2 and state[0] is None:  # frozen or slotted: (dict, slots)
        state = state[1]
    if not isinstance(state, dict):
        broken(path, f"it has no {kind} where one should stand")
    return state


def is_made(node: Any, kind: str) -> bool:
    return isinstance(node, Made) and node.name.rpartition(".")[2].removeprefix("MCore") == kind
