"""Samples in the global order of a mixture, decoded as they are asked for and resumable to the sample."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import pyarrow as pa

from litchi.config import BadInput
from litchi.data.mixture import plan_epoch
from litchi.data.rows import from_row
from litchi.data.shards import read_manifest, read_table
from litchi.schema.sample import Sample


class Shelf(Sequence[Sample]):
    """All samples of one source in memory as they lie on disk, pictures compressed; indexing decodes one."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self.batches = [batch for table in tables for batch in table.combine_chunks().to_batches()]
        self.ends: list[int] = []
        for batch in self.batches:
            self.ends.append((self.ends[-1] if self.ends else 0) + len(batch))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self.ends, index)
        first = self.ends[number - 1] if number else 0
        return from_row({name: column[index - first].as_py() for name, column in columns(self.batches[number])})


def columns(batch: pa.RecordBatch) -> Iterator[tuple[str, pa.Array]]:
    return zip(batch.schema.names, batch.columns, strict=True)


def open_shelves(root: Path, split: str) -> dict[str, Shelf]:
    """The samples of each source of a split. Raises BadInput for a missing manifest or a broken shard."""
    tables: dict[str, list[pa.Table]] = {}
    for shard in read_manifest(root).shards:
        if Path(shard.path).parts[0] == split:
            tables.setdefault(shard.source, []).append(read_table(root / shard.path))
    return {source: Shelf(found) for source, found in tables.items()}


class Loader(Iterator[Sample]):
    """An endless iterator over a mixture. Its whole state is a position; `loader.at(position)` is pure."""

    def __init__(
        self,
        samples_by_source: Mapping[str, Sequence[Sample]],
        mixture: Mapping[str, float],
        seed: int,
        state: Mapping[str, Any] | None = None,
        *,
        epoch_samples: int = 65_536,
    ) -> None:
        self.samples, self.mixture = samples_by_source, dict(mixture)
        self.seed, self.epoch_samples = seed, epoch_samples
        self.counts = {source: len(found) for source, found in samples_by_source.items()}
        self.plans: OrderedDict[int, list[tuple[str, int]]] = OrderedDict()
        self.position = 0
        if state is not None:
            self.restore(state)

    def __next__(self) -> Sample:
        sample = self.at(self.position)
        self.position += 1
        return sample

    def at(self, position: int) -> Sample:
        """The sample at a position of the endless order."""
        epoch, place = divmod(position, self.epoch_samples)
        source, index = self.plan(epoch)[place]
        return self.samples[source][index]

    def plan(self, epoch: int) -> list[tuple[str, int]]:
        """The order of an epoch; the last two are kept, because a packer looks ahead and back."""
        if epoch not in self.plans:
            self.plans[epoch] = plan_epoch(self.counts, self.mixture, self.seed, self.epoch_samples, epoch=epoch)
            if len(self.plans) > 2:
                self.plans.popitem(last=False)
        return self.plans[epoch]

    def state(self) -> dict[str, Any]:
        return {"position": self.position, **self.identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises BadInput if it was taken from other data."""
        for name, mine in self.identity().items():
            if state[name] != mine:
                was = f"{name} was {state[name]}, now {mine}"
                raise BadInput(f"the saved position is of another order: {was}; use the same data")
        self.position = state["position"]

    def identity(self) -> dict[str, Any]:
        """What the order follows from."""
        return {"seed": self.seed, "mixture": self.mixture, "counts": self.counts, "epoch_samples": self.epoch_samples}
