"""Random documents for the laws: text, pictures, frames and continuous actions in any order, from real processors."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from litchi.model.codec import PixelCodec, PixelCodecConfig, TileCodec, TileCodecConfig, regroup
from litchi.model.network import Flow, Mask, Model, ModelConfig, initialise
from litchi.model.vision import Tower
from litchi.schema.processor import Continuous, Discrete, Noising, Processor, action_token
from litchi.schema.sample import Action, Image, Role, Sample, Text, Video
from litchi.schema.tokenizer import Tokenizer

WORDS = "the red ball is left of a blue key where does it lie what colour row column one two three".split()
SPACES = {"grid": Discrete(("left", "right", "forward")), "arm": Continuous((0.1, -0.2), (1.0, 2.0), 3, chunk=2)}
SIGHT = PixelCodec(PixelCodecConfig(patch=4))
TOKENS = [action_token("grid", i) for i in range(3)]


def processor(*, flow: bool = False, tower: bool = False, film: bool = False) -> Processor:
    """A small processor; pictures are raw patches (flow) or digits of a codec (mask).

    With `tower` a user's are seen through a tower, with `film` frames have coarser tokens than pictures.
    """
    tokenizer = Tokenizer.train([" ".join(WORDS)] * 3, vocab_size=330, actions=TOKENS)
    torch.manual_seed(0)
    patch = 4 if film else 8
    codec = PixelCodec(PixelCodecConfig(4)) if flow else TileCodec(TileCodecConfig(patch, tile=4, levels=(3, 3)))
    coarse = regroup(codec, 8) if film else None
    sight = SIGHT if tower else None
    return Processor(tokenizer, codec, SPACES, Noising(blank_frames=0.5), film=coarse, sight=sight)


def model(p: Processor, *, flow: bool = False, experts: int = 1, seed: int = 0, wide: bool = False) -> Model:
    """A small network for a processor; `wide` in multiples of 32, as kernels want it."""
    kind = Flow(48) if flow else Mask(digits=1 if p.film else 4, levels=9)
    video = {"video": Mask(digits=4, levels=9)} if p.film else {}
    tower = {"vision": Tower(48, width=16, num_layers=1)} if p.sight else {}
    config = ModelConfig(
        vocab_size=len(p.tokenizer),
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_width=32 if wide else 12,
        mlp_width=64 if wide else 48,
        modalities={"image": kind, "action": Flow(3), **tower, **video},
        experts=experts,
    )
    built = Model(config)
    initialise(built, seed)
    with torch.no_grad():  # heads that start at zero would make every law hold
        for parameter in built.writers.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return built.eval()


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Up to six parts of any kind; at least one."""
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    kinds = draw(
        st.lists(
            st.sampled_from(["user", "answer", "see", "draw", "frame", "video", "step", "move"]), min_size=1, max_size=6
        )
    )
    return Sample(tuple(part(kind, rng) for kind in kinds), key=str(seed), source="law")


def part(kind: str, rng: np.random.Generator):
    words = " ".join(rng.choice(WORDS, size=rng.integers(1, 6)))
    pixels = rng.integers(0, 256, (8, 16, 3), dtype=np.uint8)
    match kind:
        case "user":
            return Text(text=words, role=Role.USER)
        case "answer":
            return Text(text=words, role=Role.ASSISTANT, weight=1.0)
        case "see":
            return Image(pixels=pixels, role=Role.USER)
        case "draw":
            return Image(pixels=pixels, role=Role.ASSISTANT, weight=1.0)
        case "frame":
            return Image(pixels=pixels, weight=1.0)
        case "video":
            return Video(frames=np.stack([pixels, 255 - pixels]), fps=1.0)
        case "step":
            return Action.discrete(int(rng.integers(3)), "grid", weight=1.0)
        case _:
            values = rng.normal(size=(2, 2)).astype(np.float32)
            return Action(values=values, space="arm", weight=1.0)
