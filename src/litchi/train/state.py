"""All that a run needs to go on where it stood, on any number of ranks: what is saved, and how it is taken up again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litchi.config import BadInput, from_json, to_json
from litchi.model.weights import read_meta, save_processor, to_hugging_face
from litchi.parallel.checkpoint import Saver
from litchi.parallel.collectives import gather_all
from litchi.parallel.leaf import Leaf
from litchi.parallel.mesh import DATA
from litchi.parallel.pieces import Piece
from litchi.parallel.pieces import fill as read_pieces
from litchi.parallel.plan import Placed
from litchi.schema.processor import Processor
from litchi.train.batches import Batches
from litchi.train.guard import History
from litchi.train.optimizer import Muon

LEARNED_FROM = ("data", "mixture", "fit", "model", "train")
"""The parts of a Run that decide what is learned; only the same ones may continue a checkpoint."""

HABITS = (
    *("log_every", "save_every", "keep", "bucket", "on_failed_save", "watch"),
    *("layout", "device", "threads", "recompute", "offload"),
)
"""Settings of training that change nothing in the weights."""


@dataclass(slots=True)
class State:
    """All that a continuation needs; tensors are this rank's parts."""

    step: int
    placed: Placed
    average: dict[str, Tensor]
    """Of what is learned, by name."""
    optimizers: list[torch.optim.Optimizer]
    batches: list[Batches]
    """This rank's, one a round of a step."""
    history: History = field(default_factory=History)
    """What losses are usual."""
    seconds: float = 0.0
    """Time spent training and saving, over all continuations."""


MODEL, WEIGHTS, OPTIMIZER = "model/model.safetensors", "resume/weights.safetensors", "resume/optimizer.safetensors"


def files_of(state: State) -> dict[str, list[Piece]]:
    """What of this rank belongs in a checkpoint: averaged weights for use, and for resuming those that are trained."""
    leaves = state.placed.leaves
    offered = [piece(leaf, to_hugging_face(name), state.average.get(name)) for name, leaf in leaves.items()]
    trained = [piece(leaves[name], name) for name in state.average]
    return {MODEL: offered, WEIGHTS: trained, OPTIMIZER: optimizer_pieces(state)}


def piece(leaf: Leaf, name: str, values: Tensor | None = None) -> Piece:
    """This rank's values of a parameter, or of something of its shape."""
    values = leaf.local.detach() if values is None else values
    return Piece(name, leaf.shape, leaf.box(), values) if values.dim() else Piece(name, (), (), values)


def optimizer_pieces(state: State) -> list[Piece]:
    """What optimizers remember: "parameter.key"."""
    return [
        piece(leaf, f"{leaf.name}.{key}", value)
        for optimizer in state.optimizers
        for leaf in state.placed.learned()
        if leaf.local in optimizer.state
        for key, value in optimizer.state[leaf.local].items()
    ]


def checkpoint(state: State, saver: Saver, processor: Processor, run_json: str) -> None:
    """Begin to save; training goes on meanwhile."""
    meta = {
        "step": state.step,
        "seconds": state.seconds,
        "batches": stand(state),
        "history": json.loads(to_json(state.history)),
        "torch": torch.__version__,
    }
    texts = {"run.json": run_json, "model/config.json": to_json(state.placed.model.config)}
    write_processor = partial(save_processor_in, processor)
    saver.save(state.step, files_of(state), meta=meta, texts=texts, others=write_processor)


def save_processor_in(processor: Processor, draft: Path) -> None:
    save_processor(draft / "processor", processor)


def stand(state: State) -> dict[str, dict]:
    """Where every stream of batches stands, by its number, from all ranks."""
    width = max(len(b.waiting) for b in state.batches) + 3
    told = [[b.slot, b.position, *(at for at, _ in b.waiting)] for b in state.batches]
    group = state.placed.world.group(*DATA)
    width = int(max(w for (w,) in gather_all([width], group)))
    flat = [float(n) for row in told for n in row + [-1] * (width - len(row))]
    stands = {}
    for found in gather_all(flat, group):
        for start in range(0, len(found), width):
            slot, position, *waiting = (int(n) for n in found[start : start + width])
            stands[str(slot)] = {"position": position, "waiting": [at for at in waiting if at >= 0]}
    return stands


def restore(state: State, path: Path, run_json: str) -> None:
    """Continue from a checkpoint. Raises BadInput if it was written by a Run that trains something else."""
    ours, theirs = learned_from(run_json), learned_from((path / "run.json").read_text())
    changed = [key for key in LEARNED_FROM if ours[key] != theirs[key]]
    meta = read_meta(path)
    if "position" in meta["batches"]:
        raise BadInput(f"{path} was written by an older version: give this Run a folder of its own (--folder)")
    if changed:
        said = ", ".join(changed)
        raise BadInput(f"{path} was trained with another {said}: give this Run a folder of its own (--folder)")
    begin_optimizers(state.optimizers)
    for file, pieces in files_of(state).items():
        read_pieces(path / file, pieces)
    for batches in state.batches:
        batches.restore(meta["batches"][str(batches.slot)])
    state.history = from_json(History, json.dumps(meta["history"]))
    state.step, state.seconds = meta["step"], meta["seconds"]


def begin_optimizers(optimizers: list[torch.optim.Optimizer]) -> None:
    """Let optimizers remember zeros, so that there is something to read into."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                keys = ("momentum",) if isinstance(optimizer, Muon) else ("exp_avg", "exp_avg_sq")
                optimizer.state[p] |= {key: torch.zeros_like(p) for key in keys}
                if not isinstance(optimizer, Muon):
                    optimizer.state[p]["step"] = torch.zeros((), device=p.device)


def learned_from(run_json: str) -> dict[str, Any]:
    """What a Run says about what is learned."""
    run = json.loads(run_json)
    training = {key: value for key, value in run.get("train", {}).items() if key not in HABITS}
    return {key: training if key == "train" else run.get(key) for key in LEARNED_FROM}
