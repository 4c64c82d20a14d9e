"""Samples at rest: Parquet shards of one row a sample, under a manifest that can tell when one is broken."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from litchi.config import BadInput, from_json, to_json
from litchi.data.rows import SCHEMA, from_row, to_row
from litchi.schema.sample import Sample

VERSION = 1
"""The version of the row schema; a reader refuses others."""

MANIFEST = "manifest.json"
MEND = "delete it and run `litchi data ...` again: it is regenerated from its seed"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its path under the root, its checksum, and what it holds."""

    path: str
    sha256: str
    samples: int
    source: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The shards of a folder. `facts` are what generation measured about them."""

    version: int
    shards: tuple[Shard, ...]
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Samples by folder and source, such as "train/talk"."""
        found: dict[str, int] = {}
        for shard in self.shards:
            name = str(Path(shard.path).parent / shard.source)
            found[name] = found.get(name, 0) + shard.samples
        return found


# ---- writing ----


def write_shards(samples: Iterable[Sample], root: Path, *, shard_samples: int) -> Manifest:
    """Write samples of any sources under `root`, `shard_samples` to a file named by the source of its first."""
    shards = []
    for index, group in enumerate(groups(samples, shard_samples)):
        path = root / f"{group[0].source}-{index:05d}.parquet"
        shards.append(write_shard(group, path, root))
    manifest = Manifest(VERSION, tuple(shards))
    write_manifest(manifest, root)
    return manifest


def write_shard(samples: Iterable[Sample], path: Path, root: Path, *, origin: str = "") -> Shard:
    """Write one file; it is there whole or not at all. The same samples and `origin` (a note) give the same bytes."""
    table = pa.Table.from_pylist([to_row(sample) for sample in samples], schema=SCHEMA)
    table = table.replace_schema_metadata({"litchi": str(VERSION), "origin": origin})
    write_whole(path, lambda part: pq.write_table(table, part, compression="zstd"))
    return describe_shard(path, root)


def describe_shard(path: Path, root: Path) -> Shard:
    """The manifest entry of a file. Raises BadInput if it is broken."""
    table = read_table(path)
    source = str(table["source"][0]) if len(table) else ""
    return Shard(str(path.relative_to(root)), checksum(path), len(table), source)


def write_manifest(manifest: Manifest, root: Path) -> None:
    text = to_json(manifest)
    write_whole(root / MANIFEST, lambda part: part.write_text(text))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside, flush to disk, rename: a kill leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    write(part)
    for place, flags in ((part, os.O_RDWR), (path.parent, os.O_RDONLY)):
        if place == path.parent:
            os.replace(part, path)
        handle = os.open(place, flags)
        os.fsync(handle)
        os.close(handle)


# ---- reading ----


def read_shard(path: Path) -> list[Sample]:
    """The samples of one file. Raises BadInput if it is missing, broken or of another version."""
    return [from_row(row) for row in read_table(path).to_pylist()]


def read_table(path: Path) -> pa.Table:
    """One file as it lies on disk, pictures still compressed."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing: run `litchi data ...` again: it is regenerated from its seed") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadInput(f"{path} is broken: {MEND}") from error
    version = (table.schema.metadata or {}).get(b"litchi", b"none").decode()
    if version != str(VERSION):
        raise BadInput(f"{path} has schema version {version}, this program reads {VERSION}: {MEND}")
    return table


def origin_of(path: Path) -> str:
    """The note that a file was written with. Raises BadInput if it is broken."""
    try:
        return (pq.read_schema(path).metadata or {}).get(b"origin", b"").decode()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadInput(f"{path} is broken: {MEND}") from error


def read_manifest(root: Path) -> Manifest:
    try:
        return from_json(Manifest, (root / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise BadInput(f"{root / MANIFEST} is missing: run `litchi data ...` first") from error


def verify(root: Path) -> Manifest:
    """Check every shard against its checksum. Raises BadInput naming the first that differs."""
    manifest = read_manifest(root)
    for shard in manifest.shards:
        path = root / shard.path
        if not path.exists():
            raise BadInput(f"{path} is missing: run `litchi data ...` again: it is regenerated from its seed")
        if checksum(path) != shard.sha256:
            raise BadInput(f"{path} is broken: {MEND}")
    return manifest


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def groups(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    rest = iter(samples)
    while group := list(islice(rest, size)):
        yield group
