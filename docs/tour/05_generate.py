"""The decoder that keeps a cache and the one that reads everything again give the same answers."""

# %% An untrained model with heads that are not zero, so that its answers are arbitrary, and different if anything is.
import numpy as np
import torch

from litchi.envs.minigrid import ACTIONS, SPACE, Room
from litchi.model.codec import TileCodecConfig, build_codec
from litchi.model.generate import Generator
from litchi.model.network import Mask, Model, ModelConfig, initialise
from litchi.schema.processor import Discrete, Noising, Processor, action_token
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Action, Role, Text
from litchi.schema.tokenizer import Tokenizer

torch.manual_seed(0)
tiles, space = TileCodecConfig(), Discrete(ACTIONS)
tokenizer = Tokenizer.train(["the red ball"], vocab_size=300, actions=[action_token(SPACE, i) for i in range(7)])
processor = Processor(tokenizer, build_codec(tiles), {SPACE: space}, Noising())
digits = Mask(tiles.digits, tiles.codes)
model = Model(ModelConfig(len(tokenizer), width=64, num_layers=2, modalities={"image": digits}))
initialise(model, seed=0)
model.writers["image"].slots.weight.data.normal_(0, 0.1)
fast, slow = Generator(model, processor), Generator(model, processor, cached=False)

# %% Four wants, one sequence: a chat turn, a picture from words, the next frame of a world, the next action.
(frame,) = Room().reset(seed=0)
ask = Text(text="the red ball", role=Role.USER)
warm = SamplingParams(temperature=1.0, seed=3, max_tokens=24, steps=4)
requests = [
    Request(parts=(ask,), want="chat", params=warm),
    Request(parts=(ask,), want="image", params=warm),
    Request(parts=(frame, Action.discrete(2, SPACE)), want="frame", params=warm),
    Request(parts=(ask, frame), want="action", space=SPACE, params=warm),
]

# %% Token for token, and byte for byte.
for request in requests:
    with_cache, without = fast.complete(request), slow.complete(request)
    same = with_cache.tokens == without.tokens and with_cache.text == without.text
    for a, b in zip(with_cache.parts, without.parts, strict=True):
        ours, theirs = (x.values if isinstance(x, Action) else x.pixels for x in (a, b))
        same = same and np.array_equal(ours, theirs)
    what = f"{len(with_cache.tokens)} tokens, {len(with_cache.parts)} parts"
    print(f"{request.want:7} read {with_cache.prompt_tokens:3} tokens, gave {what:20} the same: {same}")
    assert same
