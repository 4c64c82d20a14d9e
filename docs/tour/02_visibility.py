"""One rule says who reads whom; here it is printed as a mask, for an instruction, an action and a frame to foresee."""

# %% Pictures of 8x8 pixels in patches of 4 are four tokens each, small enough to print.
import numpy as np

from litchi.model.attention import dense_mask
from litchi.model.cache import Columns
from litchi.model.codec import PixelCodec, PixelCodecConfig
from litchi.schema.processor import Discrete, Noising, Processor, action_token
from litchi.schema.sample import Action, Image, Sample, Text
from litchi.schema.sequence import Modality, pack
from litchi.schema.tokenizer import Tokenizer

moves = Discrete(("left", "right"))
tokenizer = Tokenizer.train(["go go"], vocab_size=300, actions=[action_token("grid", i) for i in range(2)])
processor = Processor(tokenizer, PixelCodec(PixelCodecConfig(patch=4)), {"grid": moves}, Noising())

# %% The second frame is learned (weight 1): it stands twice, as a noised copy and then clean, for what follows.
frame = np.zeros((8, 8, 3), np.uint8)
parts = (
    Text(text="go"),
    Image(pixels=frame),
    Action.discrete(0, "grid"),
    Image(pixels=frame, weight=1.0),
    Action.discrete(1, "grid", weight=1.0),
)
sequence = processor.encode(Sample(parts, key="a", source="tour"), np.random.default_rng(0))
batch = pack([sequence])
mask = dense_mask(Columns.of(batch), Columns.of(batch))

# %% A row reads the columns marked #. Nobody but the noised copy itself reads the noised copy.
vectors = sequence.vectors[Modality.IMAGE]
kinds = dict(zip(vectors.index.tolist(), vectors.weight.tolist(), strict=True))
labels = []
for i, token in enumerate(sequence.tokens.tolist()):
    text = tokenizer.backend.decode([token], skip_special_tokens=False)
    labels.append({1.0: "noised", 0.0: "clean"}[kinds[i]] if i in kinds else text)
for label, place, line in zip(labels, sequence.positions.tolist(), mask.tolist(), strict=True):
    print(f"{label:14} t={place[0]}  " + "".join("#" if seen else "." for seen in line))

# %% Three facts that can be read off the picture.
noised = ~sequence.readable
clean = [i for i, w in kinds.items() if w == 0.0]
assert not mask[~noised][:, noised].any(), "a noised copy is read by nobody else"
assert mask[noised][:, noised].all(), "it reads itself in both directions"
assert mask[-1, clean].all(), "the last action reads the clean frames"
print("\nnoised and clean copy stand at the same positions, so that training and serving place them alike")
