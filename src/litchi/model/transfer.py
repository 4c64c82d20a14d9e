"""A network goes between its owners' files and our module by a list of places, one for each tensor.

`adopt` fills a module that lies on torch's meta device, so that memory is asked for only after every shape was found
in the file; `export` gives the tensors back under their owners' names. `Said` reads configurations with their errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from litchi.config import BadInput, nearest
from litchi.model.asked import Asked
from litchi.model.tensorfile import check_finite, first_bytes, open_tensors
from litchi.model.torchfile import read_pickled

MAX_DEPTH, MAX_WIDTH = 64, 1 << 16
"""Layers of a stage or stages, and channels, beyond any autoencoder that there is."""


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor: its name in their file, its name in our module."""

    theirs: str
    ours: str
    tail: tuple[int, ...] = ()
    """Dimensions of one at the end of theirs: a convolution of one pixel, where ours is a matrix."""


def adopt(module: nn.Module, places: Sequence[Place], tensors: Mapping[str, Tensor], source: Path) -> None:
    """Fill `module`, built on the meta device, in fp32 on the CPU.

    Raises BadInput for a tensor that is missing, left over, of another shape, or that holds NaN or infinity.
    """
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes.keys() == {place.ours for place in places}
    for place in places:
        if place.theirs not in tensors:
            raise BadInput(f"{source} has no tensor {place.theirs!r}{nearest(place.theirs, tensors)}")
        found, asked = tuple(tensors[place.theirs].shape), shapes[place.ours] + place.tail
        if found != asked:
            raise BadInput(
                f"{source}: {place.theirs} has shape {list(found)}, its configuration asks for {list(asked)}"
            )
    if over := tensors.keys() - {place.theirs for place in places}:
        raise BadInput(f"{source} holds {len(over)} tensors that nothing reads, such as {min(over)!r}")
    for place in places:
        check_finite(tensors[place.theirs], place.theirs, source)
    module.to_empty(device="cpu")
    named = dict(module.named_parameters())
    with torch.no_grad():
        for place in places:
            named[place.ours].copy_(tensors[place.theirs].reshape(named[place.ours].shape))


def export(module: nn.Module, places: Sequence[Place], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor under its owners' name, as they shape it; exact if `dtype` is what they were read from."""
    named = dict(module.named_parameters())
    found = {}
    for place in places:
        ours = named[place.ours].detach().to("cpu", dtype)
        found[place.theirs] = ours.reshape(*ours.shape, *place.tail).clone(memory_format=torch.contiguous_format)
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of an archive of torch.save. Raises BadInput for anything else."""
    if first_bytes(path)[:4] == b"PK\x03\x04":
        return read_pickled(path)
    with open_tensors(path) as file:
        return {name: file.read(name) for name in file.entries}


# ---- configurations -----------------------------------------------------------------------------------------------


class Said(Asked):
    """A configuration of diffusers, read with its errors."""

    def count(self, key: str, default: int, most: int = MAX_WIDTH) -> int:
        [count] = self.counts(key, [default], most)
        return count

    def counts(self, key: str, default: Sequence[int], most: int = MAX_WIDTH) -> tuple[int, ...]:
        """A number or a list of numbers from 1 to `most`."""
        value = self.config.get(key, default)
        values = value if isinstance(value, (list, tuple)) else [value]
        good = [isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= most for v in values]
        if not all(good) or not 1 <= len(values) <= MAX_DEPTH:
            raise BadInput(f"{self.family}: config.json must give {key} as numbers from 1 to {most}, not {value!r}")
        return tuple(values)

    def flags(self, key: str, default: Sequence[bool]) -> tuple[bool, ...]:
        value = self.config.get(key, default)
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, bool) for v in value):
            raise BadInput(f"{self.family}: config.json must give {key} as a list of true and false, not {value!r}")
        return tuple(value)

    def reals(self, key: str, default: Sequence[float]) -> tuple[float, ...]:
        """A number or a list of numbers; null is the default."""
        value = self.config.get(key)
        values = default if value is None else value if isinstance(value, (list, tuple)) else [value]
        if not values or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
            raise BadInput(f"{self.family}: config.json must give {key} as finite numbers, not {value!r}")
        return tuple(float(v) for v in values)


def check_scales(shift: Sequence[float], scale: Sequence[float], channels: int) -> None:
    """That latents can be normalised and restored: one number for all channels, or one each, and no scale of 0."""
    if {len(shift), len(scale)} - {1, channels} or not all(scale):
        raise BadInput(
            f"{len(shift)} shifts and {len(scale)} scales for {channels} channels: give one, or one each, not 0"
        )
