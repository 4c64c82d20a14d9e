"""The data stage, whole: seeds in, shards out, and only what is missing is made."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from litchi.config import BadInput
from litchi.data.jobs import JOBS
from litchi.data.measure import measure
from litchi.data.shards import VERSION, Manifest, Shard, describe_shard, origin_of, write_manifest, write_shard
from litchi.data.ticket import Split, Ticket
from litchi.record import Progress

TRAIN = {
    "talk": 60_000,
    "describe": 40_000,
    "draw": 60_000,
    "foresee": 25_000,
    "play": 5_000,
    "watch": 30_000,
    "act": 5_000,
}
TEST = {"talk": 1_024, "describe": 1_024, "draw": 1_024, "watch": 1_024, "foresee": 512}


@dataclass(frozen=True, slots=True)
class DataConfig:
    """How many samples of each source. A policy is judged in held-out worlds, so it needs no test samples."""

    train: dict[str, int] = field(default_factory=lambda: dict(TRAIN))
    test: dict[str, int] = field(default_factory=lambda: dict(TEST))
    seed: int = 0
    shard_samples: int = 1_000
    workers: int = 2
    """Processes; how many there are changes nothing in the shards."""


@dataclass(frozen=True, slots=True)
class Task:
    """One shard to make: samples first..stop of a source."""

    source: str
    split: Split
    first: int
    stop: int
    seed: int
    path: Path

    @property
    def origin(self) -> str:
        return f"{self.source} {self.split} {self.first}-{self.stop} seed {self.seed}"

    @property
    def tickets(self) -> Iterator[Ticket]:
        return (Ticket(self.source, self.split, index, self.seed) for index in range(self.first, self.stop))


def run(config: DataConfig, folder: Path) -> Manifest:
    """Make every shard that is not there, then measure them all and write the manifest.

    A shard follows from its task alone, so that a run killed at any point goes on where it was. Raises BadInput for an
    unknown source, and for a shard that is broken.
    """
    tasks = plan(config, folder)
    missing = [task for task in tasks if not done(task)]
    with Progress(sum(t.stop - t.first for t in missing), "data") as progress, workers(config.workers) as each:
        for count in each(make, missing):
            progress.advance(count)
    shards = tuple(describe_shard(task.path, folder) for task in tasks)
    manifest = Manifest(VERSION, shards, measure(folder, shards))
    write_manifest(manifest, folder)
    return manifest


def plan(config: DataConfig, folder: Path) -> list[Task]:
    """Every shard of a configuration."""
    tasks = []
    for split, counts in (("train", config.train), ("test", config.test)):
        for source, count in counts.items():
            if source not in JOBS:
                raise BadInput(f"no source {source!r} in data.{split}; choose among {', '.join(JOBS)}")
            for number, first in enumerate(range(0, count, config.shard_samples)):
                stop = min(first + config.shard_samples, count)
                path = folder / split / f"{source}-{number:05d}.parquet"
                tasks.append(Task(source, split, first, stop, config.seed, path))
    return tasks


def done(task: Task) -> bool:
    """Whether the file is there and was made for this very task, not for other counts or another seed."""
    return task.path.exists() and origin_of(task.path) == task.origin


def make(task: Task) -> int:
    """Make one shard; returns its number of samples."""
    shard: Shard = write_shard(map(JOBS[task.source], task.tickets), task.path, task.path.parent, origin=task.origin)
    return shard.samples


@contextmanager
def workers(count: int) -> Iterator:
    """A `map` over `count` processes, in any case in order; with one it runs right here."""
    if count == 1:
        yield map
        return
    # spawn: a fork would copy threads that a caller may have, such as torch's
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map
