"""A tensor that many ranks hold is written as boxes into one ordinary safetensors file, each at its own bytes.

The header of such a file says where every tensor lies before any of it is there, so that nobody has to gather: the file
is the same bytes whatever the layout, and everything that reads safetensors reads it.
Source of the format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from litchi.config import BadInput
from litchi.model.tensorfile import DTYPES, TensorFile, open_safetensors, open_shards
from litchi.model.tensorwriter import SHARD_BYTES, num_bytes

Box = tuple[tuple[int, int], ...]
"""What a rank has of a tensor: begin and stop in each dim."""

INDEX_END = ".index.json"

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER: tuple[str, ...] = (
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("I16", "F16", "BF16", "I32", "F32", "F64", "I64"),
)
"""Types as the safetensors library ranks them; it writes the last first, and of one type by name."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What this rank holds of the tensor `name`, whose whole shape is `shape`: the values in `box`."""

    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor
    """Of the shape of the box."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor's local values are part `index` of `degree` equal parts along `dim`: what tensor parallelism cuts."""

    dim: int
    index: int
    degree: int


class Claim(NamedTuple):
    """A piece without its values: what ranks tell each other. `path` is the file that shall hold it.

    Of a large model on many ranks there are millions, and tuples are made faster than dataclasses.
    """

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a whole tensor lies: from byte `offset` of `file` on."""

    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What files there will be and who writes which box; every rank makes the same one from the same claims."""

    heads: Mapping[str, bytes]
    """The first bytes of each file: its header."""
    sizes: Mapping[str, int]
    """Bytes of each file."""
    indexes: Mapping[str, str]
    """Text of the index of each file that was divided."""
    slots: Mapping[tuple[str, str], Slot]
    """By path and name of the tensor."""
    writers: Mapping[tuple[str, str, Box], int]
    """The one rank that writes a box, of those that claim it."""


# ---- what a rank holds --------------------------------------------------------------------------------------------


def piece_of(name: str, tensor: Tensor, part: Part | None = None) -> Piece:
    """The piece that `tensor` is: plain, sharded by FSDP2 (a DTensor), one of the equal parts of tensor parallelism, or
    such a part sharded by FSDP2.

    Raises ValueError for a DTensor that is neither sharded nor replicated.
    """
    local, shape, box = tensor, list(tensor.shape), [(0, dim) for dim in tensor.shape]
    if isinstance(tensor, DTensor):
        local, box = tensor.to_local(), local_box(tensor)
    if part is not None:
        begin, stop = box[part.dim]
        before = part.index * shape[part.dim]
        box[part.dim] = (before + begin, before + stop)
        shape[part.dim] *= part.degree
    if tuple(local.shape) != lengths(box):
        raise ValueError(f"{name}: its values are {tuple(local.shape)}, its box is {box}")
    return Piece(name, tuple(shape), tuple(box), local.detach())


def local_box(tensor: DTensor) -> list[tuple[int, int]]:
    """What this rank has of a DTensor: each axis cuts what the axes before it left into chunks, the first ones full."""
    place = tensor.device_mesh.get_coordinate()
    if place is None:
        raise ValueError("this rank holds nothing of a tensor on a mesh that it is not in")
    box = [(0, dim) for dim in tensor.shape]
    for axis, placement in enumerate(tensor.placements):
        if type(placement) is Shard:
            begin, stop = box[placement.dim]
            chunk = -(-(stop - begin) // tensor.device_mesh.size(axis))
            first = min(stop, begin + place[axis] * chunk)
            box[placement.dim] = (first, min(stop, first + chunk))
        elif not isinstance(placement, Replicate):
            raise ValueError(f"a tensor placed as {placement} cannot be saved: only Shard and Replicate can")
    return box


def lengths(box: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(stop - begin for begin, stop in box)


def claim_of(path: str, piece: Piece) -> Claim:
    return Claim(path, piece.name, NAMES[piece.tensor.dtype], piece.shape, piece.box)


# ---- who writes what ----------------------------------------------------------------------------------------------


def make_plan(claims: Sequence[Sequence[Claim]], shard_bytes: int = SHARD_BYTES) -> Plan:
    """The plan for what each rank claims. A box that several claim is written by the one with the least to write.

    Raises ValueError if the boxes of a tensor are not exactly the whole of it, or ranks disagree about it.
    """
    kinds: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}
    claimants: dict[tuple[str, str], dict[Box, list[int]]] = defaultdict(dict)
    for rank, mine in enumerate(claims):
        for claim in mine:
            key, kind = (claim.path, claim.name), (claim.dtype, claim.shape)
            if kinds.setdefault(key, kind) != kind:
                raise ValueError(f"{claim.name} is {kinds[key]} on one rank and {kind} on rank {rank}")
            if math.prod(lengths(claim.box)):
                claimants[key].setdefault(claim.box, []).append(rank)
    writers: dict[tuple[str, str, Box], int] = {}
    load = [0] * len(claims)
    for key in sorted(kinds):
        dtype, shape = kinds[key]
        check_tiling(key[1], shape, claimants[key])
        for box, ranks in claimants[key].items():
            writer = min(ranks, key=lambda rank: (load[rank], rank))
            load[writer] += num_bytes(lengths(box), DTYPES[dtype])
            writers[(*key, box)] = writer
    return Plan(*lay_out(kinds, shard_bytes), writers)


def check_tiling(name: str, shape: tuple[int, ...], boxes: Iterable[Box]) -> None:
    """Raises ValueError unless the boxes are cells of one grid and fill `shape`: then none overlaps and none lacks."""
    boxes = list(boxes)
    for dim, size in enumerate(shape):
        cuts = sorted({cut for box in boxes for cut in box[dim]} | {0, size})
        cells = set(zip(cuts, cuts[1:], strict=False))
        if any(box[dim] not in cells for box in boxes):
            raise ValueError(f"{name} {list(shape)}: boxes of ranks overlap, or reach beyond it, along dim {dim}")
    held, whole = sum(math.prod(lengths(box)) for box in boxes), math.prod(shape)
    if held != whole:
        raise ValueError(f"{name} {list(shape)}: ranks hold {held} of its {whole} values")


def lay_out(
    kinds: Mapping[tuple[str, str], tuple[str, tuple[int, ...]]], shard_bytes: int
) -> tuple[dict[str, bytes], dict[str, int], dict[str, str], dict[tuple[str, str], Slot]]:
    """Headers, sizes, indexes and slots of all files."""
    heads, sizes, indexes, slots = {}, {}, {}, {}
    for path in sorted({path for path, _ in kinds}):
        tensors = {name: kind for (p, name), kind in kinds.items() if p == path}
        groups = divide(tensors, shard_bytes)
        files = file_names(path, len(groups))
        for file, names in zip(files, groups, strict=True):
            heads[file], ends = header({name: tensors[name] for name in names})
            sizes[file] = ends[-1]
            slots |= {(path, name): Slot(file, begin) for name, begin in zip(names, ends, strict=False)}
        if len(groups) > 1:
            where = {n: PurePosixPath(f).name for f, names in zip(files, groups, strict=True) for n in names}
            total = sum(num_bytes(shape, DTYPES[dtype]) for dtype, shape in tensors.values())
            whole = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            indexes[path + INDEX_END] = json.dumps(whole, indent=1)
    return heads, sizes, indexes, slots


def divide(tensors: Mapping[str, tuple[str, tuple[int, ...]]], most: int) -> list[list[str]]:
    """Names as they follow each other, in groups of at most `most` bytes; a larger tensor has a group of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        dtype, shape = tensors[name]
        size = num_bytes(shape, DTYPES[dtype])
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return [sorted(group, key=lambda n: (-ORDER.index(tensors[n][0]), n)) for group in groups]


def file_names(path: str, count: int) -> list[str]:
    """ "model/model.safetensors", or its shards as Hugging Face names them."""
    stem = path.removesuffix(".safetensors")
    return [path] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, list[int]]:
    """A file's first bytes, then where each tensor begins in it, and where the last ends."""
    said: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for name, (dtype, shape) in tensors.items():
        ends.append(ends[-1] + num_bytes(shape, DTYPES[dtype]))
        said[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": ends[-2:]}
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + end for end in ends]


# ---- bytes --------------------------------------------------------------------------------------------------------


def write_box(handle: int, offset: int, piece: Piece) -> None:
    """Put a piece where it belongs in a file whose whole tensor begins at `offset`. Raises OSError on a full disk."""
    raw = piece.tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    begins, length = runs(piece.shape, piece.box, piece.tensor.itemsize)
    for i, begin in enumerate(begins.tolist()):
        write_all(handle, raw[i * length : (i + 1) * length], offset + begin)


def write_all(handle: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


def runs(shape: Sequence[int], box: Box, itemsize: int) -> tuple[np.ndarray, int]:
    """The bytes of a box that lie together: where each run begins in the whole tensor, in order, and its length."""
    begins, length, stride, joined = np.zeros(1, np.int64), itemsize, itemsize, True
    for size, (begin, stop) in zip(reversed(shape), reversed(box), strict=True):
        if joined:  # all that is inside is whole, so that these rows follow each other
            begins, length, joined = begins + begin * stride, (stop - begin) * stride, (begin, stop) == (0, size)
        else:
            begins = (np.arange(begin, stop)[:, None] * stride + begins).reshape(-1)
        stride *= size
    return begins, length


# ---- reading ------------------------------------------------------------------------------------------------------


def open_pieces(path: Path) -> TensorFile:
    """A safetensors file, or the files that its index names if it was divided."""
    index = path.with_name(path.name + INDEX_END)
    return open_shards(index) if index.is_file() else open_safetensors(path)


def read_boxes(path: Path, wanted: Mapping[str, Box]) -> dict[str, Tensor]:
    """Boxes by name, each as stored. Only their bytes are read."""
    with open_pieces(path) as file:
        return {name: file.read_box(name, box) for name, box in wanted.items()}


def fill(path: Path, pieces: Iterable[Piece]) -> None:
    """Read into the tensors of these pieces what the file holds of them: the other way round of a save.

    Raises BadInput, naming the tensor, if one is not there or has another shape.
    """
    with open_pieces(path) as file, torch.no_grad():
        for piece in pieces:
            entry = file.entries.get(piece.name)
            if entry is not None and entry.shape != piece.shape:
                said = f"{piece.name} is {list(entry.shape)} in it and {list(piece.shape)} here"
                raise BadInput(f"{path}: {said}: resume with the model that was saved")
            piece.tensor.copy_(file.read_box(piece.name, piece.box))
