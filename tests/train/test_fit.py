"""A processor is made from data: the codec gives its tiles back to the byte, the tokenizer its texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from litchi.config import BadInput
from litchi.model.codec import PixelCodecConfig, TileCodecConfig
from litchi.schema.processor import Discrete
from litchi.schema.sample import Image, Sample, Text, Video
from litchi.train.fit import FitConfig, fit_processor

SPACES = {"grid": Discrete(("left", "right"))}


def flat(grey: int) -> np.ndarray:
    return np.full((8, 8, 3), grey, np.uint8)


def samples() -> list[Sample]:
    video = Video(frames=np.stack([flat(10), flat(250)]), fps=1.0)
    return [Sample((Text(text="the red ball is red"), Image(pixels=flat(128)), video), "a", "b")] * 3


def test_a_processor_gives_back_what_it_was_fitted_on() -> None:
    config = FitConfig(vocab_size=300, codec=TileCodecConfig(patch=8, tile=4, levels=(2, 2), width=16), spaces=SPACES)
    p = fit_processor(config, samples(), seed=0)
    assert p.codec is not None
    for grey in (10, 128, 250):
        assert np.array_equal(p.codec.decode(p.codec.encode(flat(grey)), 8, 8), flat(grey))
    assert p.tokenizer.decode(p.tokenizer.encode("the red ball")) == "the red ball"
    assert p.action_ids("grid") == [p.tokenizer.control("<|grid:0|>"), p.tokenizer.control("<|grid:1|>")]
    again = fit_processor(config, samples(), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(p.codec.parameters(), again.codec.parameters(), strict=True))


def test_a_codec_without_parameters_and_no_codec_need_no_fitting() -> None:
    assert fit_processor(FitConfig(vocab_size=300, codec=PixelCodecConfig(4)), samples(), seed=0).codec.patch == 4
    bare = fit_processor(FitConfig(vocab_size=300, codec=None), samples(), seed=0)
    with pytest.raises(BadInput, match="has no codec"):
        bare.encode(samples()[0], np.random.default_rng(0))


def test_words_alone_need_no_codec_and_say_so() -> None:
    words = [Sample((Text(text="the red ball"),), "a", "b")]
    with pytest.raises(BadInput, match="no sample has a picture to fit a codec on: give some, or set fit.codec=none"):
        fit_processor(FitConfig(vocab_size=300), words, seed=0)


def test_more_tiles_than_codes_name_the_mend() -> None:
    config = FitConfig(vocab_size=300, codec=TileCodecConfig(patch=8, tile=4, levels=(2,), width=8))
    with pytest.raises(BadInput, match="3 distinct tiles do not fit 2 codes: raise codec.levels"):
        fit_processor(config, samples(), seed=0)


def test_a_codec_is_lossless_on_every_tile_of_the_real_rooms() -> None:
    """The 24 tiles that MiniGrid draws, in random arrangements that no picture of the fit showed."""
    pytest.importorskip("minigrid", reason="pip install 'litchi[rooms]'")
    from litchi.envs.tiles import catalogue, draw

    def room(seed: int) -> Image:
        board = np.random.default_rng(seed).integers(0, len(catalogue()), (8, 8)).astype(np.uint8)
        return Image(pixels=draw(board))

    config = FitConfig(vocab_size=300, codec=TileCodecConfig(patch=16, tile=8, levels=(4, 4, 4, 4), width=96))
    p = fit_processor(config, [Sample((Text(text="room"), room(i)), str(i), "rooms") for i in range(4)], seed=0)
    assert p.codec is not None
    for seed in range(10, 16):
        pixels = room(seed).pixels
        rows = p.codec.encode(pixels)
        assert rows.shape == (16, 4)
        assert np.array_equal(p.codec.decode(rows, 64, 64), pixels)
