"""A training loop of a few lines on gloo, on whose ranks a test may play a trick: what supervisors are tried on.

    python -m tests.train.toy FOLDER

The sums of the ranks are exact, so that whoever restarts it, it ends with the same weights.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from litchi.parallel.mesh import World, started_by_launcher
from litchi.train.blame import read_standings
from litchi.train.launch import adopt_slurm
from litchi.train.watch import FOLDER, Watch, WatchConfig

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["__main__", __name__])  # torch is imported once for the ranks of all tests
STEPS = 8
PLAYED = "played"
"""A file that is there once a trick has been played."""
CONFIG = WatchConfig(hang_after=60.0, patience=60.0, beat=0.1, sample=0.01, grace=0.3)


class Keen(Watch):
    """Patient, until a rank of this attempt has played a trick of which all others wait already."""

    def limit(self) -> float:
        played = first_attempt() and (self.folder.parent / PLAYED).exists()
        return 1.2 if played else super().limit()


def train(folder: Path, trick: str = "", steps: int = STEPS, config: WatchConfig = CONFIG) -> None:
    """`trick` is "RANK KIND STEP": at that step that rank does what KIND says, in the first attempt only.

    Of a rank that is slow that attempt has no end but by the supervisor, though what it saves ends where it should.
    """
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    if started_by_launcher():
        dist.init_process_group("gloo")
    world = World(rank=int(os.environ.get("RANK", "0")), size=int(os.environ.get("WORLD_SIZE", "1")))
    step, weights = restore(folder)
    endless = " slow " in trick and first_attempt()
    with Keen(world, folder, config) as watch:
        while step < (40 * steps if endless else steps):
            if not play(trick, world, step + 1, folder, asked):
                weights += gradient(world, step)
            step += 1
            if world.size > 1:
                dist.barrier()
            watch.step(step)
            stop = agreed(bool(asked), world)
            if world.rank == 0 and (step % 2 == 0 or stop) and step < (steps if endless else steps + 1):
                with watch.during("save"):
                    save(folder, step, weights)
            if stop:
                os._exit(130)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def gradient(world: World, step: int) -> torch.Tensor:
    part = torch.full((4,), float((step + 1) * (world.rank + 1)))
    if world.size > 1:
        dist.all_reduce(part)
    return part


def agreed(asked: bool, world: World) -> bool:
    """Whether any rank was asked to stop: they stop together."""
    flag = torch.tensor(int(asked))
    if world.size > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def expected(size: int, steps: int = STEPS) -> list[float]:
    """The weights of a run that nobody disturbed."""
    return [float(sum(range(steps + 1)) * sum(range(size + 1)))] * 4


def first_attempt() -> bool:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def play(trick: str, world: World, step: int, folder: Path, asked: list[int]) -> bool:
    """Do what a trick says, if it is this rank's turn; whether this step has no gradient then."""
    who, kind, when = trick.split() if trick else ("-1", "", "0")
    if world.rank != int(who) or not (first_attempt() or kind.startswith("always-")):
        return False
    if kind == "slow":
        work(0.1 if step >= int(when) else 0.0)
        return False
    if step != int(when):
        return False
    if kind in ("stop", "sleep", "hold", "skip"):
        await_others(folder, world, step)
    match kind.removeprefix("always-"):
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise ValueError("a tile is torn")
        case "sleep":
            read_from_a_dead_disk()
        case "hold":
            ctypes.PyDLL(None).sleep(600)  # in C, and the interpreter stays locked
        case "refuse":
            os._exit(2)
        case "obey":
            while not asked:
                time.sleep(0.01)
        case "skip":
            return True
    return False


def await_others(folder: Path, world: World, step: int) -> None:
    """Until all others wait for this rank, and will for good; from then on they may lose patience."""
    while True:
        standings = read_standings(folder / FOLDER, world.size)
        waiting = [s for s in standings.values() if s.step == step - 1 and s.collective == "all_reduce"]
        if len({s.rank for s in waiting} - {world.rank}) == world.size - 1:
            break
        time.sleep(0.01)
    (folder / PLAYED).touch()


def read_from_a_dead_disk() -> None:
    time.sleep(600)


def work(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.001)


def live(place: dict[str, str], folder: Path, trick: str, steps: int) -> None:
    """A rank in a process of `SERVER`. What it says goes to a file, because failing is what is tried."""
    os.environ.update(place)
    sys.stderr = (folder / f"said_{place['RANK']}").open("a")
    train(folder, trick, steps)


def save(folder: Path, step: int, weights: torch.Tensor) -> None:
    draft = folder / "toy.writing"
    draft.write_text(" ".join(map(str, [step, *weights.tolist()])))
    os.replace(draft, folder / "toy.txt")


def restore(folder: Path) -> tuple[int, torch.Tensor]:
    path = folder / "toy.txt"
    if not path.exists():
        return 0, torch.zeros(4)
    step, *weights = path.read_text().split()
    return int(step), torch.tensor([float(w) for w in weights])


if __name__ == "__main__":
    adopt_slurm(os.environ)
    train(Path(sys.argv[1]), os.environ.get("TRICK", ""))
