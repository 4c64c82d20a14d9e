"""How long training stands still for a checkpoint of four ranks, and how fast all of it is on the disk.

    python bench/checkpoint.py [MEGABYTES]

Four local ranks hold 512 MB of fp32 in equal shards, as FSDP2 has them. The peer is torch.distributed.checkpoint with
its usual writer, which checks nothing and writes a format of its own; both flush to the disk. The best of three, as the
disk is everybody's; memory for copies is there from the first save on, in both.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bench.row import append
from litchi.parallel.checkpoint import Saver
from litchi.parallel.crew import Crew
from litchi.parallel.mesh import Layout, World, join
from litchi.parallel.pieces import fill, piece_of

RANKS, TENSORS, REPEATS = 4, 16, 3


def main(megabytes: int) -> None:
    folder = Path(tempfile.mkdtemp(dir=Path.cwd(), prefix=".bench_checkpoint_"))
    try:
        with Crew(RANKS) as crew:
            ours = crew.run(measure_ours, folder / "ours", megabytes)[0]
            theirs = crew.run(measure_theirs, folder / "theirs", megabytes)[0]
    finally:
        shutil.rmtree(folder)
    size = megabytes / 1000
    what = f"{RANKS} ranks, {megabytes} MB in shards"
    peer = "torch.distributed.checkpoint"
    append("checkpoint", f"{what}: save returns", ours[0], "s", peer="the same save, waited for", peer_figure=ours[1])
    append("checkpoint", f"{what}: save returns", ours[0], "s", peer=f"{peer} async_save", peer_figure=theirs[0])
    append("checkpoint", f"{what}: written, flushed and summed", size / ours[1], "GB/s")
    append("checkpoint", f"{what}: whole on the disk", ours[1], "s", peer=f"{peer} save", peer_figure=theirs[1])
    append("checkpoint", f"{what}: checked and read", size / ours[2], "GB/s")


def shards(world: World, megabytes: int) -> dict[str, DTensor]:
    assert world.mesh is not None
    shape = (megabytes * 1_000_000 // 4 // TENSORS // 1000, 1000)
    placed = {
        f"layers.{i}.weight": distribute_tensor(torch.full(shape, float(i)), world.mesh["spread"], [Shard(0)])
        for i in range(TENSORS)
    }
    assert all(isinstance(tensor, DTensor) for tensor in placed.values())
    return placed


def measure_ours(folder: Path, megabytes: int) -> tuple[float, float, float]:
    world = join(Layout(), torch.device("cpu"))
    pieces = [piece_of(name, tensor) for name, tensor in shards(world, megabytes).items()]
    saver, returned, done = Saver(world, folder, keep=1), [], []
    for step in range(REPEATS + 1):
        dist.barrier()
        began = time.perf_counter()
        saver.save(step, {"model/model.safetensors": pieces}, meta={"step": step})
        returned.append(time.perf_counter() - began)
        saver.wait()
        done.append(time.perf_counter() - began)
    dist.barrier()
    began = time.perf_counter()
    path = saver.newest()
    assert path is not None
    fill(path / "model" / "model.safetensors", pieces)
    dist.barrier()
    return min(returned[1:]), min(done[1:]), time.perf_counter() - began


def measure_theirs(folder: Path, megabytes: int) -> tuple[float, float]:
    warnings.simplefilter("ignore")
    world = join(Layout(), torch.device("cpu"))
    state = dict(shards(world, megabytes))
    group = dist.new_group(backend="gloo")
    returned, done = [], []
    for i in range(REPEATS + 1):
        dist.barrier()
        began = time.perf_counter()
        future = dcp.async_save(state, checkpoint_id=folder / f"a{i}", process_group=group)
        returned.append(time.perf_counter() - began)
        future.result()  # type: ignore[union-attr]
        dist.barrier()
        began = time.perf_counter()
        dcp.save(state, checkpoint_id=folder / f"s{i}")
        done.append(time.perf_counter() - began)
        if world.rank == 0:
            shutil.rmtree(folder)
    return min(returned[1:]), min(done[1:])


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) == 2 else 512)
