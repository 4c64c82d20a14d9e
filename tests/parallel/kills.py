"""Two ranks save again and again, each time killed at another touch of a file, and what is left is always whole.

    python -m tests.parallel.kills FOLDER STRIDE [URL]

Files change only where they are touched, so that a kill before each touch is a kill at any moment. First the touches of
one save are counted, then every STRIDE-th is made fatal, of either rank, to itself alone or to both. After each
kill the same is tried again, as a person would. Each attempt is a fork, which spares it the imports. With the URL of a
bucket each save goes there too, requests that change it are touches as well, and each attempt first looks whether what
is newest in it is whole.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # noqa: F401  here it is paid once
from torch import Tensor

from litchi.config import BadInput
from litchi.parallel.checkpoint import Saver, newest, step_name, step_of
from litchi.parallel.mesh import Layout, World, join
from litchi.parallel.pieces import Piece, read_boxes

FILES = ("model/model.safetensors", "resume/a.safetensors")
SHAPE = (6, 5)
WHOLE, STOPPED, SILENT = 0, 3, 9
"""Exit codes of a rank: its save is whole, it stopped with one clear line, it was killed."""


def main(folder: Path, stride: int, url: str = "") -> None:
    os.environ["KILLS_URL"] = url
    for _ in range(2):  # from the third on a save removes an older one
        assert attempt(folder, 0, 0, False) == [WHOLE, WHOLE]
    counts = [count(folder, rank) for rank in (0, 1)]
    print(f"touches of a file by each rank: {counts}")
    assert counts[0] > 30 and counts[1] > 4, "both ranks write"
    for _ in range(40):  # the other rank is still connecting in a few of them
        codes = attempt(folder, 0, 1, False)
        assert codes == [SILENT, STOPPED], codes
    for both in (False, True):
        for victim in (0, 1):
            for fatal in range(1, counts[victim] + 1, stride):
                before = last(folder)
                codes = attempt(folder, victim, fatal, both)
                after = last(folder)
                assert codes[victim] == SILENT, f"rank {victim} was to be killed at {fatal}: {codes}"
                assert codes[1 - victim] in ((SILENT,) if both else (STOPPED, WHOLE)), codes
                assert after in (before, before + 1), f"from step {before} to {after}"
                print(f"rank {victim}{' and the other' if both else ''} killed at {fatal}: step {after}", flush=True)
                assert attempt(folder, 0, 0, False) == [WHOLE, WHOLE] and last(folder) == after + 1
                names = sorted(path.name for path in folder.iterdir())
                assert names == [step_name(after), step_name(after + 1)], "drafts and older ones are removed"
    print("done")


def last(folder: Path) -> int:
    """The step of the newest checkpoint, which is whole to its last bit."""
    path = newest(folder)
    assert path is not None
    check(path, step_of(path.name))
    return step_of(path.name)


def count(folder: Path, rank: int) -> int:
    """Touches of files by this rank in one attempt that nobody kills."""
    with tempfile.TemporaryDirectory() as told:
        assert attempt(folder, rank, -1, False, Path(told) / "count") == [WHOLE, WHOLE]
        return int((Path(told) / "count").read_text())


def attempt(folder: Path, victim: int, fatal: int, both: bool, told: Path | None = None) -> list[int]:
    """The exit codes of two ranks of which one is killed at its `fatal`-th touch; 0 is never."""
    with tempfile.TemporaryDirectory() as meeting:
        children: list[int] = []
        for rank in (0, 1):
            if child := os.fork():
                children.append(child)
                os.setpgid(child, children[0])
                continue
            code = 1
            try:
                os.setpgid(0, children[0] if children else 0)
                signal.alarm(600)
                reaper = Reaper(folder, fatal if rank == victim else 0, both)
                code = live(folder, rank, Path(meeting) / "store", reaper)
                if told is not None and rank == victim:
                    told.write_text(str(reaper.touches))
            finally:
                os._exit(code)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [SILENT if code == -signal.SIGKILL else code for code in codes]


def live(folder: Path, rank: int, store: Path, reaper: Reaper) -> int:
    """One rank: begin with the newest checkpoint, save the next one, say how it went."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    world = join(Layout(), torch.device("cpu"))
    url = os.environ["KILLS_URL"]
    if url:
        look_into_bucket(world, store.parent / "elsewhere", url, newest(folder))
    reaper.watch(url)
    try:
        saver = Saver(world, folder, keep=2, bucket=url)
        begin, step = saver.newest(), 0
        if begin is not None:
            step = step_of(begin.name)
            check(begin, step)
        saver.save(step + 1, {file: [piece(rank, step + 1)] for file in FILES}, meta={"step": step + 1})
        saver.wait()
    except BadInput as error:
        assert "does not answer" in str(error) and "\n" not in str(error)
        print(f"  {error}", flush=True)
        return STOPPED
    return WHOLE


def look_into_bucket(world: World, elsewhere: Path, url: str, here: Path | None) -> None:
    """What is newest there is whole, and no more than one save behind."""
    found = Saver(world, elsewhere, bucket=url).newest()
    if here is not None:
        assert found is not None and step_of(here.name) - step_of(found.name) in (0, 1)
        check(found, step_of(found.name))


def piece(rank: int, step: int) -> Piece:
    """One column of two for each rank, so that both write into every file, and more than once."""
    box = ((0, 6), (0, 2)) if rank == 0 else ((0, 6), (2, 5))
    return Piece("w", SHAPE, box, values(step)[:, slice(*box[1])])


def values(step: int) -> Tensor:
    return torch.arange(30.0).view(SHAPE) + 1000 * step


def check(path: Path, step: int) -> None:
    for file in FILES:
        assert torch.equal(read_boxes(path / file, {"w": ((0, 6), (0, 5))})["w"], values(step)), f"{path} is torn"


class Reaper:
    """Counts touches of files and kills at one of them; bytes that are written or flushed are touches too."""

    def __init__(self, folder: Path, fatal: int, both: bool) -> None:
        self.prefix, self.fatal, self.both, self.touches = str(folder), fatal, both, 0

    def watch(self, url: str) -> None:
        sys.addaudithook(self.hear)
        os.pwrite, os.fsync = self.after(os.pwrite), self.after(os.fsync)
        if url:
            store = importlib.import_module("obstore")
            store.put, store.delete = self.after(store.put), self.after(store.delete)

    def hear(self, event: str, args: tuple) -> None:
        if event.startswith(("open", "os.", "shutil.")) and any(str(a).startswith(self.prefix) for a in args):
            self.touch()

    def after(self, call: Callable) -> Callable:
        def counted(*args: object, **options: object) -> object:
            self.touch()
            return call(*args, **options)

        return counted

    def touch(self) -> None:
        self.touches += 1
        if self.touches == self.fatal:
            os.killpg(0, signal.SIGKILL) if self.both else os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
