"""What can be said about generated data without a model: test pictures seen in training, and what a guesser scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from litchi.data.questions import question_only_baseline
from litchi.data.shards import Shard
from litchi.schema.sample import Sample


def measure(root: Path, shards: Sequence[Shard]) -> dict[str, float]:
    """`seen/SOURCE`: test samples whose first picture is the first of a training sample. `guess/KIND`: see there."""
    facts: dict[str, float] = {}
    train, test = by_source(shards, "train"), by_source(shards, "test")
    for source in sorted(set(train) & set(test)):
        known = set(first_pictures(root, train[source]))
        facts[f"seen/{source}"] = float(sum(picture in known for picture in first_pictures(root, test[source])))
    if "talk" in train and "talk" in test:
        guesses = question_only_baseline(truths(root, train["talk"]), truths(root, test["talk"]))
        facts |= {f"guess/{kind}": round(accuracy, 4) for kind, accuracy in guesses.items()}
    return facts


def by_source(shards: Sequence[Shard], split: str) -> dict[str, list[Shard]]:
    found: dict[str, list[Shard]] = {}
    for shard in shards:
        if Path(shard.path).parts[0] == split:
            found.setdefault(shard.source, []).append(shard)
    return found


def first_pictures(root: Path, shards: Sequence[Shard]) -> Iterator[bytes]:
    """The first picture of each sample, as PNG: equal pictures have equal bytes."""
    for shard in shards:
        for parts in pq.read_table(root / shard.path, columns=["parts"])["parts"].to_pylist():
            yield next(part["frames"][0] for part in parts if part["frames"])


def truths(root: Path, shards: Sequence[Shard]) -> Iterator[Sample]:
    """Samples with nothing but their `meta`: no picture is decoded."""
    for shard in shards:
        for meta in pq.read_table(root / shard.path, columns=["meta"])["meta"].to_pylist():
            yield Sample((), key="", source=shard.source, meta=json.loads(meta))
