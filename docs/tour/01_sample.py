"""A sample is what is stored, a token sequence is what the model reads, and the processor goes between them."""

# %% One picture of a real room, a question about it, and the answer that is to be learned.
from dataclasses import replace

import numpy as np

from litchi.envs.minigrid import Room
from litchi.schema.arrays import IGNORE
from litchi.schema.sample import Role, Sample, Text
from litchi.schema.sequence import Modality
from litchi.train.fit import FitConfig, fit_processor

room = Room("BabyAI-GoToLocal-v0")
(picture,) = room.reset(seed=7)
row, column, direction = room.scene.agent
question = Text(text="Where is the agent?", role=Role.USER)
answer = Text(text=f"At row {row}, column {column}.", role=Role.ASSISTANT, weight=1.0)
sample = Sample((replace(picture, role=Role.USER), question, answer), key="room-7", source="tour")

# %% A processor is learned from samples: merges of a tokenizer, and a codec that brings every tile back to the byte.
processor = fit_processor(FitConfig(vocab_size=300), [sample], seed=0)
tokenizer, codec = processor.tokenizer, processor.codec

# %% The sequence. A picture of 64x64 pixels is 16 tokens of 4 digits, one digit a tile, and all 16 are one span.
sequence = processor.encode(sample, np.random.default_rng(0))


def name(index: int) -> str:
    return "-" if index == IGNORE else repr(tokenizer.backend.decode([index], skip_special_tokens=False))


print("place token            span  (t, h, w)      learns")
for i, token in enumerate(sequence.tokens.tolist()):
    t, h, w = sequence.positions[i].tolist()
    learns = name(int(sequence.labels[i]))
    print(f"{i:5} {name(token):16} {int(sequence.spans[i]):4}  {f'({t}, {h}, {w})':14} {learns}")

# %% The rows that are written over the placeholders, and the way back.
rows = sequence.vectors[Modality.IMAGE]
print(f"\nfirst picture token: digits {rows.value[0].long().tolist()} at place {int(rows.index[0])}")
back = codec.decode(rows.value, *picture.pixels.shape[:2])
print("the picture comes back to the byte:", np.array_equal(back, picture.pixels))
assert np.array_equal(back, picture.pixels)
