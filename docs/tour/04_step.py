"""A training step: corrupt, read, sum the loss by modality, divide once, and let two optimizers step."""

# %% One rollout, in which frames are learned, one drawing, and one dialogue.
import torch

from litchi.data.jobs import JOBS
from litchi.data.ticket import Ticket
from litchi.envs.minigrid import ACTIONS, SPACE
from litchi.model.network import Mask, Model, ModelConfig, count, initialise
from litchi.model.objective import corrupt, loss_of
from litchi.parallel.mesh import World
from litchi.parallel.plan import apply
from litchi.schema.processor import Discrete
from litchi.schema.sequence import supervised
from litchi.train.batches import BatchConfig, Batches
from litchi.train.fit import FitConfig, fit_processor
from litchi.train.optimizer import OptimizerConfig, build_optimizers
from litchi.train.step import train_step

samples = [JOBS[source](Ticket(source, "train", 0)) for source in ("foresee", "draw", "talk")]
fit = FitConfig(vocab_size=320, spaces={SPACE: Discrete(ACTIONS)})
processor = fit_processor(fit, samples, seed=0)
batch = next(Batches(lambda i: samples[i % 3], processor, BatchConfig(rows=3, row=320, lookahead=3), seed=0))
print("supervised weight:", {str(m): w for m, w in supervised(batch).items()})

# %% The model: every modality is one more way in and one more head on the same trunk.
digits = Mask(fit.codec.digits, fit.codec.codes)
model = Model(ModelConfig(len(processor.tokenizer), width=64, num_layers=2, modalities={"image": digits}))
initialise(model, seed=0)
print(f"{count(model):,} parameters")

# %% What a loss is: a sum and a weight for each modality, so that documents, microbatches and ranks add up.
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    loss = loss_of(model, batch, corrupt(model, batch, generator))
before = loss.means()
for modality, mean in before.items():
    total, weight = float(loss.total[modality]), float(loss.weight[modality])
    print(f"{modality:6} sum {total:8.1f}  weight {weight:6.0f}  mean {mean:.3f}")
print("chance of a digit: log 256 = 5.545; the heads of spans start at zero, so that they know nothing yet")

# %% Steps on this one batch. Muon has the matrices of the trunk, AdamW the rest.
placed = apply(model, World())  # a world of one process; on many ranks nothing else changes
optimizers = build_optimizers(placed.learned(), OptimizerConfig())
for step in range(10):
    metrics = train_step(placed, optimizers, [batch], scale={}, clip_at=1.0, dtype=torch.float32, draw=(0, step))
    if step % 5 == 4:
        print(f"step {step + 1:2}", {str(m): round(value, 3) for m, value in metrics.losses.items()})
assert all(metrics.losses[m] < before[m] for m in before), "it learns by heart what it is shown"
