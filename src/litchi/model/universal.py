"""A DeepSpeed universal checkpoint is a folder with one file a weight, and is read as such.

    zero/model.layers.0.mlp.up_proj.weight/fp32.pt      {"param": tensor, ...}, or a bare tensor, flat after ZeRO 3
    zero/model.layers.0.mlp.up_proj.weight/exp_avg.pt   and other states of the optimizer, which are not read

Source: deepspeed/checkpoint/ds_to_universal.py, which has already joined what ranks had of each weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litchi.config import BadInput, nearest
from litchi.model.tensorfile import Entry, TensorFile, map_file, show
from litchi.model.torchzip import TENSOR_NAMES, StoredTensor, open_archive, stored_tensor

FOLDER, FILE = "zero", "fp32.pt"
ADMITTED = TENSOR_NAMES | {"torch.Size", "deepspeed.checkpoint.universal_checkpoint.SubparamShape"}


class Universal(TensorFile):
    """The fp32 weights of such a folder."""

    metadata: Mapping[str, Any] = {}

    def __init__(self, path: Path, files: Mapping[str, Path], entries: Mapping[str, Entry]) -> None:
        """`files`: a weight's name -> its file."""
        self.path, self.entries, self._files = path, entries, files

    def under(self, names: Mapping[str, str], shapes: Mapping[str, torch.Size]) -> Universal:
        """The same under other names (`names`: new -> old), and what ZeRO 3 left flat in the shape that it must have.

        What has another number of values stays as it is.
        """
        entries = {new: replace(self.entries[old], name=new) for new, old in names.items()}
        for name, entry in entries.items():
            if name in shapes and entry.shape == (shapes[name].numel(),):
                entries[name] = replace(entry, shape=tuple(shapes[name]))
        return Universal(self.path, {new: self._files[old] for new, old in names.items()}, entries)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self.entries:
            raise BadInput(f"{self.path} has no tensor {show(name)}{nearest(name, self.entries)}")
        found = stored(self._files[name]).read()
        return found.view(self.entries[name].shape).to(dtype or found.dtype)

    def close(self) -> None:
        """Files are open only while a tensor is read."""


def open_universal(folder: Path) -> Universal:
    """Raises BadInput for a weight without its file, and for a file that holds no tensor."""
    files = {each.name: each / FILE for each in sorted((folder / FOLDER).iterdir()) if each.is_dir()}
    if lacking := [name for name, file in files.items() if not file.is_file()]:
        raise BadInput(f"{folder}: {FOLDER}/{show(lacking[0])[1:-1]} has no {FILE}: convert the checkpoint again")
    entries = {}
    for name, file in files.items():
        found = stored(file)
        entries[name] = Entry(name, found.shape, str(found.dtype), 0, math.prod(found.shape) * found.dtype.itemsize)
    return Universal(folder, files, entries)


def stored(file: Path) -> StoredTensor:
    data = map_file(file)
    archive = open_archive(file, data, 0, len(data), ADMITTED)
    return stored_tensor(archive, archive.tree.get("param") if isinstance(archive.tree, dict) else archive.tree)
