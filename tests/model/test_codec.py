"""A picture comes back: exactly from patches, to the byte from the tiles that a codec was fitted on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litchi.config import BadInput
from litchi.model.codec import (
    PixelCodec,
    PixelCodecConfig,
    TileCodec,
    TileCodecConfig,
    build_codec,
    cut,
    fit,
    join,
    lossless,
    spread,
    strides,
)

laws = settings(max_examples=25, deadline=None, derandomize=True)


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tile_codec() -> TileCodec:
    torch.manual_seed(0)
    return TileCodec(TileCodecConfig(patch=8, tile=4, levels=(3, 4), width=24))


@laws
@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2, 4, 8]))
def test_join_undoes_cut(seed: int, rows: int, columns: int, size: int) -> None:
    pixels = picture(seed, rows * size, columns * size)
    pieces = cut(pixels, size)
    assert pieces.shape == (rows * columns, size * size * 3)
    assert np.array_equal(pieces[columns - 1].numpy(), pixels[:size, -size:].reshape(-1)), "reading order"
    assert np.array_equal(join(pieces, size, rows * size, columns * size), pixels)


@laws
@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 3))
def test_patches_come_back_to_the_byte(seed: int, rows: int, columns: int) -> None:
    codec = build_codec(PixelCodecConfig(patch=4))
    pixels = picture(seed, rows * 4, columns * 4)
    encoded = codec.encode(pixels)
    assert encoded.shape == (rows * columns, 48) and float(encoded.abs().max()) <= 1.0
    assert np.array_equal(codec.decode(encoded, rows * 4, columns * 4), pixels)


@pytest.mark.parametrize("codec", [PixelCodec(PixelCodecConfig(patch=8)), tile_codec()])
@pytest.mark.parametrize("height", [9, 12])
def test_a_size_that_no_patch_divides_is_refused(codec: PixelCodec | TileCodec, height: int) -> None:
    """Tiles of 4 divide a height of 12, but patches of 8 do not."""
    with pytest.raises(BadInput, match=f"a picture of {height}x16 cannot be cut into patches of 8: resize it to a mul"):
        codec.encode(picture(0, height, 16))


@laws
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_a_tile_looked_up_is_the_tile_quantised(seeds: list[int]) -> None:
    """Pictures share tiles, so that some are looked up and some are fresh."""
    codec, oracle = tile_codec(), tile_codec()
    for seed in seeds:
        pixels = np.concatenate([picture(seed, 8, 8), picture(seed + 1, 8, 8)], axis=1)
        expected = oracle.quantise(cut(pixels, 4)).float()
        assert torch.equal(codec.encode(pixels), oracle.group(expected, 8, 16))


@laws
@given(st.integers(1, 4), st.integers(1, 4))
def test_tiles_are_grouped_under_the_patch_that_covers_them(rows: int, columns: int) -> None:
    codec = tile_codec()
    order = torch.arange(rows * columns * 4).float()
    grouped = codec.group(order, rows * 8, columns * 8)
    assert grouped.shape == (rows * columns, 4)
    assert grouped[0].tolist() == [0, 1, 2 * columns, 2 * columns + 1]
    assert torch.equal(codec.ungroup(grouped, rows * 8, columns * 8), order)


@laws
@given(st.lists(st.integers(2, 5), min_size=1, max_size=4).map(tuple))
def test_every_code_is_a_point_of_its_own(levels: tuple[int, ...]) -> None:
    codec = TileCodec(TileCodecConfig(patch=4, tile=4, levels=levels, width=4))
    codes = torch.arange(codec.config.codes)
    points = codec.points(codes)
    assert points.shape == (len(codes), sum(levels)) and len(points.unique(dim=0)) == len(codes)
    assert bool((points.sum(1) == len(levels)).all()), "one level of each dimension"


@laws
@given(st.integers(0, 99), st.integers(1, 12))
def test_no_two_tiles_are_given_one_code(seed: int, count: int) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).random((count, 12), dtype=np.float32))
    index = (spread(values, (3, 4)) * strides((3, 4))).sum(1)
    assert len(index.unique()) == count and int(index.max()) < 12


def test_a_fitted_codec_is_lossless_and_the_same_for_a_seed() -> None:
    tiles = torch.from_numpy(np.random.default_rng(0).choice([0, 100, 255], (6, 48)).astype(np.uint8))
    codecs = [tile_codec(), tile_codec()]
    shares = [fit(codec, tiles, seed=1, max_steps=2000) for codec in codecs]
    assert shares == [1.0, 1.0] and lossless(codecs[0], tiles) == 1.0
    assert all(torch.equal(a, b) for a, b in zip(*(c.state_dict().values() for c in codecs), strict=True))
    pixels = join(tiles[[0, 1, 2, 3, 4, 5, 0, 1]], 4, 8, 16)
    assert np.array_equal(codecs[0].decode(codecs[0].encode(pixels), 8, 16), pixels)


def test_more_tiles_than_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="13"):
        fit(tile_codec(), torch.randint(0, 256, (13, 48), dtype=torch.uint8), seed=0)
