"""What must be learned before the network: merges of the tokenizer from texts, and the codec from distinct tiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from litchi.config import BadInput
from litchi.model.codec import (
    CodecConfig,
    PixelCodec,
    PixelCodecConfig,
    TileCodec,
    TileCodecConfig,
    build_codec,
    cut,
    fit,
    regroup,
)
from litchi.model.codecfolder import CodecFolder, load_codec
from litchi.model.latent import LatentCodec
from litchi.schema.processor import Discrete, Noising, Processor, Space, action_token
from litchi.schema.sample import Image, Sample, Text, Video
from litchi.schema.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class FitConfig:
    """How a processor is made from data."""

    vocab_size: int = 700
    """Upper bound; training stops earlier when no pair of tokens repeats."""
    phrases: int = 0
    """Tokens more that join words which nearly always stand together."""
    codec: CodecConfig | CodecFolder | None = TileCodecConfig()
    spaces: dict[str, Space] = field(default_factory=dict)
    noising: Noising = Noising()
    film_patch: int = 0
    """Pixels of a token of a frame of a world or clip; 0 codes frames as pictures are coded."""
    sight: PixelCodecConfig | None = None
    """Give the model a `Tower` for VISION as well: pictures that a user shows are then read through it."""
    max_tiles: int = 200_000
    """Distinct tiles kept for fitting the codec."""


def fit_processor(config: FitConfig, samples: Iterable[Sample], *, seed: int) -> Processor:
    """Learn a processor from samples. Raises BadInput if a tile codec cannot be made lossless on what it has seen."""
    texts, tiles = [], {}
    for sample in samples:
        texts += [part.text for part in sample.parts if isinstance(part, Text)]
        if isinstance(config.codec, TileCodecConfig) and len(tiles) < config.max_tiles:
            for pixels in pictures(sample):
                tiles |= dict.fromkeys(row.tobytes() for row in cut(pixels, config.codec.tile).numpy())
    actions = action_names(config.spaces)
    tokenizer = Tokenizer.train(texts, vocab_size=config.vocab_size, actions=actions, phrases=config.phrases)
    codec = begin_codec(config.codec)
    if isinstance(codec, TileCodec):
        fit_tiles(codec, sorted(tiles), seed)
    sight = None if config.sight is None else PixelCodec(config.sight)
    if isinstance(codec, LatentCodec) and config.film_patch:
        raise BadInput("an autoencoder codes frames as it codes pictures: set fit.film_patch=0")
    own = isinstance(codec, PixelCodec | TileCodec) and config.film_patch
    film = regroup(codec, config.film_patch) if own else None
    return Processor(tokenizer, codec, dict(config.spaces), config.noising, film=film, sight=sight)


def begin_codec(config: CodecConfig | CodecFolder | None) -> PixelCodec | TileCodec | LatentCodec | None:
    match config:
        case None:
            return None
        case CodecFolder(folder, pack):
            return load_codec(folder, pack=pack)
    return build_codec(config)


def fit_tiles(codec: TileCodec, tiles: list[bytes], seed: int) -> None:
    if not tiles:
        raise BadInput("no sample has a picture to fit a codec on: give some, or set fit.codec=none")
    if len(tiles) > codec.config.codes:
        raise BadInput(
            f"{len(tiles)} distinct tiles do not fit {codec.config.codes} codes: raise codec.levels, "
            f"or take a codec for photographs"
        )
    distinct: UInt8[Tensor, "n values"] = torch.from_numpy(np.stack([np.frombuffer(t, np.uint8) for t in tiles]))
    exact = fit(codec, distinct, seed=seed)
    print(f"codec: {len(tiles)} distinct tiles, {exact:.1%} come back to the byte")
    if exact < 1.0:
        print("codec: not lossless; the score of every picture is bounded by it. Raise codec.width or codec.levels.")


def pictures(sample: Sample) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    for part in sample.parts:
        match part:
            case Image(pixels=pixels):
                yield pixels
            case Video(frames=frames):
                yield from frames


def action_names(spaces: Mapping[str, Space]) -> list[str]:
    """The control tokens of all discrete spaces."""
    discrete = ((name, space) for name, space in spaces.items() if isinstance(space, Discrete))
    return [action_token(name, i) for name, space in discrete for i in range(len(space.names))]
