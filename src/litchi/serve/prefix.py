"""What the bits of a page depend on, as a key: weights, and all of the document up to where its last span ends."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from hashlib import blake2b

from litchi.schema.processor import Builder
from litchi.schema.sequence import Modality, Vectors


class PageKeys:
    """The keys of the whole pages of one document, which grows."""

    def __init__(self, size: int, weights: str) -> None:
        """`size` tokens lie in a page; `weights` tells what read them."""
        self.size = size
        self.found: list[bytes] = []
        self.digest = blake2b(weights.encode(), digest_size=24)
        self.count = 0
        """Tokens that the digest knows."""

    def upto(self, builder: Builder, length: int, whole: int) -> list[bytes]:
        """Of the pages within the first `length` tokens. The document is complete, and stays as it is, up to `whole`.

        A page that ends within a span depends on the rest of it, since tokens of a span read each other.
        """
        first = (len(self.found) + 1) * self.size
        shown = dict(pictures(builder)) if first <= length else {}
        for end in range(first, length + 1, self.size):
            stop, spans = end, builder.spans
            while stop < whole and spans[stop] == spans[end - 1]:
                stop += 1
            for index in range(self.count, stop):
                follows = index > 0 and spans[index] == spans[index - 1]
                self.digest.update(struct.pack("<q3q?", builder.tokens[index], *builder.positions[index], follows))
                self.digest.update(shown.get(index, b""))
            self.count = max(self.count, stop)
            self.found.append(self.digest.digest())
        return self.found[: length // self.size]


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
