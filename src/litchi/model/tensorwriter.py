"""Safetensors files whose headers are written first and whose tensors follow in any order, one at a time.

What is written never has to be in memory at once, so that a model larger than the machine can pass through it.
Source: https://github.com/huggingface/safetensors#format; the index is Hugging Face's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

SHARD_BYTES = 5_000_000_000
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class TensorWriter:
    """A folder's model.safetensors, or its shards and their index; `finish` checks that all is there."""

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, Sequence[int]],
        dtype: torch.dtype,
        shard_bytes: int = SHARD_BYTES,
        *,
        written: Iterable[str] = (),
    ) -> None:
        """`written` are those that an earlier writer of the very same files has put there: what there is stays."""
        self.folder, self.shapes, self.dtype = folder, {name: tuple(s) for name, s in shapes.items()}, dtype
        self.files = file_names(divide(self.shapes, dtype, shard_bytes))
        self.places: dict[str, tuple[str, int]] = {}
        self.written = set(written)
        folder.mkdir(parents=True, exist_ok=True)
        for file, names in self.files.items():
            self._begin(file, names)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor where it belongs. Raises ValueError for a name, shape or repetition not announced."""
        if name in self.written or tuple(tensor.shape) != self.shapes.get(name):
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} was not announced so, or is written twice")
        file, offset = self.places[name]
        raw = tensor.detach().to("cpu", self.dtype).contiguous().reshape(-1).view(torch.uint8)
        with (self.folder / file).open("r+b") as out:
            out.seek(offset)
            out.write(raw.numpy().data)
        self.written.add(name)

    def finish(self) -> None:
        if missing := sorted(set(self.shapes) - self.written):
            raise ValueError(f"{len(missing)} tensors were announced and not written, the first is {missing[0]}")
        self.index()
        for file in self.files:
            with (self.folder / file).open("rb") as out:
                os.fsync(out.fileno())

    def index(self) -> None:
        """Write which file holds which tensor, where there is more than one."""
        if len(self.files) > 1:
            total = sum(num_bytes(shape, self.dtype) for shape in self.shapes.values())
            where = {name: file for file, names in self.files.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

    def _begin(self, file: str, names: Sequence[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            size = num_bytes(self.shapes[name], self.dtype)
            shape = list(self.shapes[name])
            header[name] = {"dtype": NAMES[self.dtype], "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = at = 8 + len(text)
        with (self.folder / file).open("r+b" if self.written else "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                self.places[name] = (file, at)
                at += num_bytes(self.shapes[name], self.dtype)
            out.truncate(max(at, begin))


def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def divide(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, most: int) -> list[list[str]]:
    """Names in their order, in groups of at most `most` bytes; a larger tensor has a group of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = num_bytes(shape, dtype)
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def file_names(groups: Sequence[Sequence[str]]) -> dict[str, Sequence[str]]:
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}
