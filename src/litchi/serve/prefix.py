"""What the bits of a page depend on, as a key: weights, and all of the document up to where its last span ends."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from hashlib import blake2b

from litchi.schema.processor import Builder
from litchi.schema.sequence import Modality, Vectors


def page_keys(builder: Builder, length: int, size: int, weights: str) -> Iterator[bytes]:
    """The key of each whole page within the first `length` tokens.

    A page that ends within a span depends on the rest of it, since tokens of a span read each other.
    """
    shown = dict(pictures(builder))
    digest = blake2b(weights.encode(), digest_size=24)
    at = 0
    for end in range(size, length + 1, size):
        stop = end
        while stop < length and builder.spans[stop] == builder.spans[end - 1]:
            stop += 1
        for index in range(at, stop):
            first = index and builder.spans[index] == builder.spans[index - 1]
            digest.update(struct.pack("<q3q?", builder.tokens[index], *builder.positions[index], bool(first)))
            digest.update(shown.get(index, b""))
        at = max(at, stop)
        yield digest.digest()


def pictures(builder: Builder) -> Iterator[tuple[int, bytes]]:
    """Where each token of a picture stands, and what stands for all rows of it."""
    for modality, blocks in builder.rows.items():
        for block in blocks:
            whole = summed(modality, block)
            for index in block.index.tolist():
                if index >= 0:
                    yield index, whole


def summed(modality: Modality, block: Vectors) -> bytes:
    digest = blake2b(str(modality).encode(), digest_size=16)
    place = block.place.clone()
    place[:, 0] -= block.first_picture * (place[:, 0] >= 0)
    first = int(block.index[block.index >= 0].min())
    for column in (block.index - first, place, block.value, block.time):
        digest.update(column.contiguous().numpy().tobytes())
    return digest.digest()
