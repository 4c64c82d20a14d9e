"""The ranks of one worker: processes that each hold a slice of the network, started by the one that has the engine.

They meet by a file and speak over loopback only. If one ends, the worker ends with all of them, and its supervisor
starts another.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import init_device_mesh

from litchi.config import BadInput, parse, plain
from litchi.model.weights import load_model
from litchi.parallel.mesh import AXES, Layout, World, degrees
from litchi.serve.models import read_adapters
from litchi.serve.placing import device_of, placing
from litchi.serve.tensor import TensorRunner

if TYPE_CHECKING:
    from litchi.serve.run import ServeConfig

log = logging.getLogger("litchi.serve")

GRACE = 30.0
"""Seconds in which the first rank says itself what is wrong with a folder."""


def muster(folder: Path, config: ServeConfig, number: int = 0) -> World:
    """Start the other ranks of `serve.tensor`, which load the folder as well, and meet them. Raises BadInput.

    `number` is that of the first rank's device among those of this machine.
    """
    dtype_of(config)
    device = device_of(config.engine, number)
    if device.type == "cuda" and (seen := torch.cuda.device_count()) < config.tensor:
        raise BadInput(f"serve.tensor={config.tensor} wants as many GPUs, here are {seen}: set serve.tensor={seen}")
    place, size = Path(tempfile.mkdtemp(prefix="litchi-ranks-")), config.tensor
    told = {"folder": str(folder), "serve": plain(config, type(config)), "threads": torch.get_num_threads()}
    for rank in range(1, size):
        process = subprocess.Popen(
            [sys.executable, "-m", "litchi.serve.ranks"], stdin=subprocess.PIPE, text=True
        )  # in the worker's group of processes, which its supervisor ends as one
        assert process.stdin is not None
        process.stdin.write(json.dumps(told | {"rank": rank, "place": str(place), "number": number + rank}) + "\n")
        process.stdin.flush()  # and stays open: its end is ours
        threading.Thread(target=mourn, args=(process, rank), name=f"litchi-rank-{rank}", daemon=True).start()
    return join(place, 0, size, device)


def mourn(process: subprocess.Popen, rank: int) -> None:
    """End with a rank that ends: its slice of every step is missing."""
    atexit.register(process.kill)
    code = process.wait()
    log.error("rank %d ended (%s), and the worker with it", rank, code)
    os._exit(1)


def join(place: Path, rank: int, size: int, device: torch.device) -> World:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(str(place / "store"), size), rank=rank, world_size=size)
    layout = Layout(data=1, tensor=size, sequence=False)
    mesh = init_device_mesh(device.type, tuple(degrees(layout).values()), mesh_dim_names=AXES)
    dist.all_reduce(torch.zeros(1))
    if rank == 0:
        shutil.rmtree(place, ignore_errors=True)  # all have met
    return World(layout, rank, size, device, mesh)


def dtype_of(config: ServeConfig) -> torch.dtype:
    """Raises BadInput for what slices cannot be computed in, or with."""
    c = config.engine
    if c.weights not in ("float32", "bfloat16") or c.path == "native" or not c.exact:
        raise BadInput("serve.tensor takes the path in PyTorch, exact, in float32 or bfloat16: set serve.engine so")
    return torch.float32 if c.weights == "float32" else torch.bfloat16


def main() -> None:
    """The life of a rank that follows; it ends when who started it does."""
    warnings.filterwarnings("ignore", message=".*torch.*")
    from litchi.serve.run import ServeConfig

    told: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    config = parse(ServeConfig, told["serve"], "serve")
    torch.set_num_threads(told["threads"])
    c, number = config.engine, told["number"]
    where = placing(c, number)
    world = join(Path(told["place"]), told["rank"], config.tensor, device_of(c, number))
    try:
        model = load_model(Path(told["folder"]), where)
        runner = TensorRunner(model, dtype_of(config), world, read_adapters(model, config.model, config.adapters))
    except BadInput as error:
        threading.Event().wait(GRACE)  # most often the first rank finds the same; who ends before it takes it along
        sys.exit(f"error: rank {told['rank']}: {error}")
    runner.follow(*runner.room(c.cache_tokens // c.page + 1, c.page))


if __name__ == "__main__":
    main()
