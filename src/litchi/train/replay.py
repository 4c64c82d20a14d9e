"""Take any step of a run again, on one machine, and compare what it finds with what the run found then.

Begins at the newest checkpoint before the step that is still there, or at the beginning of the run, and takes all steps
up to it: with exact sums their figures are those of the run to the last digit, on however many ranks it ran.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from litchi.config import BadInput
from litchi.model.network import ModelConfig
from litchi.parallel.checkpoint import step_of, whole
from litchi.parallel.mesh import Layout, World
from litchi.record import Progress
from litchi.schema.processor import Processor
from litchi.train.batches import Samples
from litchi.train.ledger import Ledger, figures
from litchi.train.run import TrainConfig, fresh, prepare, take_step
from litchi.train.state import restore


@dataclass(frozen=True, slots=True)
class Replay:
    """A step taken again. `then` is what the run recorded, `now` what was found; figures by name."""

    step: int
    begun: int
    """The step of the checkpoint that it was begun from; 0 is the beginning."""
    then: dict[str, float | str]
    now: dict[str, float | str]
    reason: str
    """Why the run dropped the step's gradient, if it did."""
    documents: tuple[tuple[str, str], ...]
    """Source and key of every sample that the step read."""

    @property
    def same(self) -> bool:
        return self.then == self.now


def replay(
    config: TrainConfig,
    model_config: ModelConfig,
    processor: Processor,
    samples: Samples,
    folder: Path,
    run_json: str,
    step: int,
) -> Replay:
    """Raises BadInput if the run has not come so far, or trains something else now."""
    row = Ledger(folder, silent=True).row(step)
    if row is None:
        known = Ledger(folder, silent=True).rows()
        reach = f"its steps are {known[0]['step']} to {known[-1]['step']}" if known else "it has taken none yet"
        raise BadInput(f"step {step} is not in the ledger of {folder}: {reach}")
    config = replace(config, layout=Layout(data=1, exact=config.layout.exact))
    state = fresh(config, model_config, processor, samples, World(config.layout, device=prepare(config)))
    before = [path for path in whole(folder) if step_of(path.name) < step]
    if before:
        restore(state, before[-1], run_json)
    begun = state.step
    with Progress(step, "replay", done=begun) as progress:
        while True:
            group = [next(batches).to(state.placed.world.device) for batches in state.batches]
            metrics, _ = take_step(state, config, group)
            progress.advance()
            if state.step == step:
                break
    then = {name: value for name, value in row.items() if name not in ("step", "reason")}
    read = [samples(position) for batches in state.batches for position in batches.taken]
    documents = tuple((sample.source, sample.key) for sample in read)
    return Replay(step, begun, then, figures(metrics), row.get("reason", ""), documents)
