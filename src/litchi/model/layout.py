"""Which part of which tensor lies on which rank, by tensor and pipeline parallelism: names and sizes, no weights.

The rule is Megatron's: what reads the residual stream is divided by its rows, what writes to it by its columns, tables
of the vocabulary by their rows; norms, and what reads pictures, are copied. Layers are dealt to stages in order, the
table to the first stage, the last norm and the head to the last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from litchi.config import BadInput
from litchi.model.families import parameters
from litchi.model.network import ModelConfig

BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
BY_COLUMNS = ("o_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a tensor: rows [begin, stop) of dimension `dim`, or all of it (`dim` None)."""

    name: str
    stage: int
    rank: int
    shape: tuple[int, ...]
    dim: int | None
    begin: int
    stop: int

    @property
    def size(self) -> int:
        """Its values."""
        count = 1
        for length in self.shape:
            count *= length
        return count


def pieces(c: ModelConfig, *, tensor: int, pipeline: int) -> Iterator[Piece]:
    """Every piece of every rank. Raises BadInput, naming the size that does not divide."""
    check(c, tensor, pipeline)
    for name, shape in parameters(c).items():
        stages = stages_of(name, c, pipeline)
        dim = split_dim(name, len(shape))
        for stage in stages:
            for rank in range(tensor):
                yield piece(name, tuple(shape), dim, stage, rank, tensor)


def check(c: ModelConfig, tensor: int, pipeline: int) -> None:
    sizes = {"heads": c.num_heads, "key-value heads": c.num_kv_heads, "an MLP width": c.mlp_width}
    if tensor < 1:
        raise BadInput(f"{tensor} ranks cannot hold a tensor: give --tensor a number from 1 up")
    for what, size in (sizes | {"a vocabulary": c.vocab_size}).items():
        if size % tensor:
            raise BadInput(f"{size} {what} cannot be divided over {tensor} ranks: choose a divisor")
    if not 1 <= pipeline <= c.num_layers:
        raise BadInput(f"{c.num_layers} layers cannot be dealt to {pipeline} stages")


def stages_of(name: str, c: ModelConfig, pipeline: int) -> list[int]:
    """Where a tensor lives; a table that is also the head lives on the first and on the last stage."""
    kind, _, rest = name.partition(".")
    if kind == "layers":
        return [int(rest.partition(".")[0]) * pipeline // c.num_layers]
    if kind == "embed_tokens":
        return sorted({0, pipeline - 1}) if c.tied else [0]
    return [0] if kind in ("embed_positions", "readers") else [pipeline - 1]


def split_dim(name: str, num_dims: int) -> int | None:
    if name.startswith("readers."):
        return None
    module = name.split(".")[-2]
    if module in BY_ROWS:
        return 0
    return 1 if module in BY_COLUMNS and num_dims == 2 else None


def piece(name: str, shape: tuple[int, ...], dim: int | None, stage: int, rank: int, tensor: int) -> Piece:
    if dim is None:
        return Piece(name, stage, rank, shape, None, 0, 0)
    length = shape[dim] // tensor
    part = (*shape[:dim], length, *shape[dim + 1 :])
    return Piece(name, stage, rank, part, dim, rank * length, (rank + 1) * length)
