"""A Run is one experiment, complete: the configuration of every stage, as data that a checkpoint can carry."""

from __future__ import annotations

from dataclasses import dataclass, field

from litchi.act.run import ActConfig
from litchi.data.run import DataConfig
from litchi.eval.run import EvalConfig
from litchi.model.network import ModelConfig
from litchi.serve.run import ServeConfig
from litchi.train.fit import FitConfig
from litchi.train.run import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What `litchi` needs to know, from seeds to server. `from_json(Run, to_json(run)) == run`."""

    name: str
    data: DataConfig
    mixture: dict[str, float]
    """How often each source is drawn, in samples."""
    fit: FitConfig
    model: ModelConfig
    """A `vocab_size` of 0 is that of the tokenizer that is fitted."""
    train: TrainConfig
    eval: EvalConfig = field(default_factory=EvalConfig)
    act: ActConfig = field(default_factory=ActConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
