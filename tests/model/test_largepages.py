"""Memory in large pages is memory like other, and goes back when what lies in it does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from litchi.checkpoints import find_checkpoint
from litchi.model import largepages
from litchi.model.largepages import CHUNK, LEAST, PAGE, LargePages
from litchi.model.tensorfile import open_tensors
from litchi.model.weights import load_model

LINUX = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads how much memory is resident")
SHAPES = [
    (3,),
    (LEAST // 4,),
    (257, 129),
    (1, 1 << 20),
    (CHUNK // 2 + 4,),
    (CHUNK // 4 + 1,),
    (2, 2, 1 << 16),
    (0, 5),
    (),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_are_as_asked_for_and_lie_beside_each_other(dtype: torch.dtype) -> None:
    room = LargePages()
    found = [room.empty(shape, dtype=dtype) for shape in SHAPES]
    for number, (tensor, shape) in enumerate(zip(found, SHAPES, strict=True)):
        like = torch.empty(shape, dtype=dtype)
        assert (tensor.shape, tensor.dtype, tensor.stride()) == (like.shape, like.dtype, like.stride())
        tensor.fill_(number)
        assert tensor.nbytes < LEAST or tensor.data_ptr() % 64 == 0
    assert all((tensor == number).all() for number, tensor in enumerate(found)), "one was written over another"
    ends = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in found if t.nbytes)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))


def test_a_chunk_begins_at_a_large_page() -> None:
    data = largepages.chunk(CHUNK)
    assert data.data_ptr() % PAGE == 0 and CHUNK <= len(data) <= CHUNK + PAGE and not data[::4096].any()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@LINUX
def test_memory_goes_back_with_the_last_tensor_of_a_chunk() -> None:
    room = LargePages()
    first = [room.empty((1 << 20,), dtype=torch.float32).fill_(1) for _ in range(16)]  # a chunk
    second = [room.empty((1 << 20,), dtype=torch.float32).fill_(2) for _ in range(16)]
    full = resident()
    del first
    assert full - resident() > CHUNK // 2
    assert all((tensor == 2).all() for tensor in second)


def test_where_the_system_has_none_memory_is_had_all_the_same(monkeypatch) -> None:
    monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    assert LargePages().empty((LEAST,), dtype=torch.float32).fill_(3).sum() == 3 * LEAST


def test_a_network_that_is_read_into_them_is_the_same() -> None:
    folder, asked = find_checkpoint("tiny"), []
    room = LargePages()

    def empty(shape, *, dtype):
        asked.append(shape)
        return room.empty(shape, dtype=dtype)

    plain, other = load_model(folder).state_dict(), load_model(folder, empty=empty).state_dict()
    assert len(asked) == len(set(plain)) and plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_a_folder_of_several_files_reads_into_them_too(tmp_path) -> None:
    from safetensors.torch import save_file

    weights = {"a": torch.arange(5.0), "b": torch.arange(7.0, 9.0)}
    for name, tensor in weights.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    index = '{"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    asked = []
    with open_tensors(tmp_path) as tensors:
        tensors.lay(lambda shape, *, dtype: asked.append(shape) or torch.empty(shape, dtype=dtype))
        assert all(torch.equal(tensors.read(name), tensor) for name, tensor in weights.items())
    assert asked == [(5,), (2,)]
