"""Packing is invisible: a document gives the same numbers alone, in company, and laid out in rows."""

# %% A small untrained model and three dialogues about rooms.
import torch

from litchi.data.jobs import JOBS
from litchi.data.ticket import Ticket
from litchi.model.codec import TileCodecConfig, build_codec
from litchi.model.network import Mask, Model, ModelConfig, initialise
from litchi.model.objective import Loss, loss_of
from litchi.schema.processor import Noising, Processor
from litchi.schema.sequence import pack, pack_rows
from litchi.schema.tokenizer import Tokenizer
from litchi.train.batches import BatchConfig, Batches

torch.manual_seed(0)
tiles = TileCodecConfig()
tokenizer = Tokenizer.train(["where is the red ball", "row column"], vocab_size=300)
processor = Processor(tokenizer, build_codec(tiles), {}, Noising())
config = ModelConfig(
    vocab_size=len(tokenizer), width=64, num_layers=2, modalities={"image": Mask(tiles.digits, tiles.codes)}
)
model = Model(config)
initialise(model, seed=0)

stream = Batches(lambda i: JOBS["talk"](Ticket("talk", "train", i)), processor, BatchConfig(row=1024), seed=0)
documents = [stream.encode(i) for i in range(3)]
print("lengths:", [len(d) for d in documents])

# %% Hidden states: alone, packed end to end, and in rows with padding.
with torch.no_grad():
    alone = torch.cat([model(pack([d])) for d in documents])
    packed = model(pack(documents))
    row = max(map(len, documents)) + 8
    laid = model(pack_rows([[d] for d in documents], row, tokenizer.pad))
real = torch.cat([torch.arange(len(d)) + i * row for i, d in enumerate(documents)])
print(f"largest hidden state        {float(alone.abs().max()):.2f}")
print(f"packed differs from alone   {float((packed - alone).abs().max()):.1e}")
print(f"rows differ from alone      {float((laid[real] - alone).abs().max()):.1e}")
assert torch.allclose(packed, alone, atol=1e-4) and torch.allclose(laid[real], alone, atol=1e-4)


# %% The loss: sums and weights add up over documents, and are divided once.
def loss(batch) -> Loss:
    with torch.no_grad():
        return loss_of(model, batch, batch)


first, second, third = (loss(pack([d])) for d in documents)
apart, together = first + second + third, loss(pack(documents))
print(f"mean text loss, apart       {apart.means()['text']:.6f}")
print(f"mean text loss, together    {together.means()['text']:.6f}")
assert abs(apart.means()["text"] - together.means()["text"]) < 1e-4
