"""A folder of the size of Yi-34B becomes a checkpoint: how much memory of its own that takes, and how long.

    python bench/convert_34b.py FOLDER [LAYERS]

FOLDER is a new one, on a disk that knows holes (ext4, xfs, btrfs) and has 3 GB free. Its source is made of holes, which
read as zeros: 15 files of safetensors and their index. Every byte is read, checked, written and summed as with real
weights; what was written of one tensor is given back as a hole before the next, so that the disk never holds more than
the largest tensor (0.92 GB). LAYERS is 60, the whole (68.8 GB); with 5 it is a tenth. FOLDER is removed at the end.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from bench.row import append
from litchi.model import adopt
from litchi.model.families import links, parameters, write_config
from litchi.model.network import ModelConfig
from litchi.model.presets import YI_34B
from litchi.model.tensorwriter import TensorWriter, num_bytes

KEEP_SIZE, PUNCH_HOLE = 1, 2
"""Flags of Linux's fallocate."""

EVERY = 0.02
"""Seconds between two looks at the memory."""


class Released(TensorWriter):
    """Writes as its parent does and gives the disk back after each tensor: the file is as long, and a hole there."""

    def put(self, name: str, tensor: Tensor) -> None:
        super().put(name, tensor)
        file, offset = self.places[name]
        handle = os.open(self.folder / file, os.O_RDWR)
        try:
            release(handle, offset, num_bytes(self.shapes[name], self.dtype))
        finally:
            os.close(handle)


class Watch(threading.Thread):
    """The most anonymous memory of this process at any look. Pages of files are not counted: they can be dropped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.done = anonymous(), threading.Event()

    def run(self) -> None:
        while not self.done.wait(EVERY):
            self.most = max(self.most, anonymous())


def main(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True)
    try:
        config = replace(YI_34B, num_layers=layers)
        source = write_source(folder / "source", config)
        size = sum(shape.numel() for shape in parameters(config).values()) * 2
        adopt.TensorWriter = Released
        before, watch = anonymous(), Watch()
        watch.start()
        began = time.perf_counter()
        adopt.adopt(source, folder / "checkpoint")
        seconds = time.perf_counter() - began
        watch.done.set()
        written = sum(path.stat().st_size for path in (folder / "checkpoint" / "model").glob("*.safetensors"))
        on_disk = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    finally:
        shutil.rmtree(folder)
    assert written > size, (written, size)
    what = f"Yi-34B with {layers} of {YI_34B.num_layers} layers, bf16, to a checkpoint"
    grown = (watch.most - before) / 1e9
    append("convert_34b", f"{what}: memory of its own", grown, "GB", peer="its weights", peer_figure=size / 1e9)
    append("convert_34b", f"{what}: wall time", seconds, "s")
    append("convert_34b", f"{what}: read, checked, written and summed", size / 1e9 / seconds, "GB/s")
    print(f"{size / 1e9:.1f} GB in, {written / 1e9:.1f} GB out, {on_disk / 1e6:.1f} MB on the disk at the end")
    print(f"{before / 1e9:.2f} GB before it began, at most {watch.most / 1e9:.2f} GB")


def write_source(folder: Path, config: ModelConfig) -> Path:
    """A folder as Hugging Face has it, whose weights are holes."""
    shapes = parameters(config)
    TensorWriter(folder, {link.theirs: shapes[link.ours[0]] for link in links(config, "llama")}, torch.bfloat16).index()
    (folder / "config.json").write_text(json.dumps(write_config(config, "llama")))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, [])).save(
        str(folder / "tokenizer.json")
    )
    return folder


def release(handle: int, offset: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    numbers = ctypes.c_int(handle), ctypes.c_int(KEEP_SIZE | PUNCH_HOLE), ctypes.c_int64(offset), ctypes.c_int64(size)
    if libc.fallocate(*numbers):
        raise OSError(ctypes.get_errno(), "this disk knows no holes: name a FOLDER on ext4, xfs or btrfs")


def anonymous() -> int:
    """Bytes of memory that only this process can have filled."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


if __name__ == "__main__":
    if len(sys.argv) in (2, 3) and sys.platform == "linux":
        main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else YI_34B.num_layers)
    else:
        print("not measured: name a new FOLDER on a Linux disk with 3 GB free")
