"""The training stage, whole: samples in, checkpoints out, and nothing lost when it is killed in between."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litchi.config import BadInput, to_json
from litchi.model.network import Model, ModelConfig
from litchi.model.tensorfile import open_tensors
from litchi.model.weights import from_hugging_face, read_meta, save_processor, to_hugging_face
from litchi.parallel.checkpoint import Saver, newest, step_name
from litchi.parallel.collectives import gather_all
from litchi.parallel.leaf import Leaf
from litchi.parallel.mesh import DATA, Layout, World, join, leave
from litchi.parallel.pieces import Piece
from litchi.parallel.pieces import fill as read_pieces
from litchi.parallel.plan import Placed, build, fill, first_values
from litchi.record import Progress, Recorder
from litchi.schema.processor import Processor
from litchi.train.batches import BatchConfig, Batches, Samples, check_coverage, coverage
from litchi.train.optimizer import Muon, OptimizerConfig, build_optimizers
from litchi.train.pictures import Pictures
from litchi.train.schedule import Schedule, Trapezoid, factor
from litchi.train.step import train_step


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One run of the loop. `dtype` is what matrices are multiplied in: "float32" or "bfloat16"; weights are fp32.

    A step reads `num_accumulate` batches, which ranks of data parallelism share out: their number divides it.
    """

    num_steps: int
    seed: int = 0
    batches: BatchConfig = BatchConfig()
    num_accumulate: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: Schedule = Trapezoid()
    ema: float = 0.998
    """Decay of the averaged weights, which are what a checkpoint offers."""
    scale: dict[str, float] = field(default_factory=dict)
    """Factor of each modality's mean loss, 1 where not named."""
    dtype: str = "float32"
    compile: bool = False
    """Fuse the elementwise work of layers with torch.compile, which on a CPU needs a C++ compiler."""
    layout: Layout = Layout()
    """How ranks share the work, where there are several."""
    device: str = "auto"
    start: Path | None = None
    """A checkpoint whose weights the network begins with; what it lacks begins at its first values."""
    frozen: tuple[str, ...] = ()
    """Beginnings of the names of parameters that stay as they are: "layers." is the trunk without its table."""
    threads: int = 0
    """CPU threads, 0 for all."""
    log_every: int = 20
    save_every: int = 200
    keep: int = 2


LEARNED_FROM = ("data", "mixture", "fit", "model", "train")
"""The parts of a Run that decide what is learned; only the same ones may continue a checkpoint."""

HABITS = ("log_every", "save_every", "keep", "layout", "device", "threads")
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
    seconds: float = 0.0
    """Time spent training and saving, over all continuations."""


def run(
    config: TrainConfig, model_config: ModelConfig, processor: Processor, samples: Samples, folder: Path, run_json: str
) -> Path:
    """Train to the last step, from the newest checkpoint in `folder` if there is one; returns the last checkpoint.

    Every rank calls this, and the first one writes.
    """
    world = join(config.layout, prepare(config))
    state = fresh(config, model_config, processor, samples, world)
    saver = Saver(world, folder, config.keep)
    if newest := saver.newest():
        restore(state, newest, run_json)
    recorder = Recorder(folder, silent=world.rank > 0)
    recorder.rewind(state.step + 1)
    pictures = Pictures(folder, processor, samples, silent=world.rank > 0)

    with Interrupt() as stop, Progress(config.num_steps, "train", done=state.step, silent=world.rank > 0) as progress:
        mark = time.monotonic()
        while state.step < config.num_steps:
            group = [next(batches).to(world.device) for batches in state.batches]
            if state.step == 0 and world.rank == 0:
                check_coverage(group[0])
                print(coverage(group[0], processor))
            adjust(state.optimizers, factor(config.schedule, state.step, config.num_steps))
            metrics = train_step(
                state.placed,
                state.optimizers,
                group,
                scale=config.scale,
                clip_at=config.optimizer.clip,
                dtype=getattr(torch, config.dtype),
                draw=(config.seed, state.step),
            )
            average(state, config.ema)
            state.step += 1
            state.seconds, mark = state.seconds + time.monotonic() - mark, time.monotonic()

            saver.poll()
            last, stopped = state.step == config.num_steps, anyone(stop.asked, world)
            if state.step % config.log_every == 0 or last:
                recorder.write(state.step, {**metrics.row(), "seconds": state.seconds})
            progress.advance(1, note=" ".join(f"{m} {v:.3f}" for m, v in metrics.losses.items()))
            if state.step % config.save_every == 0 or last or stopped:
                checkpoint(state, saver, processor, run_json)
                if pictures.samples:
                    saver.wait()
                    pictures.draw(folder / step_name(state.step), state.step)
            if stopped and not last:
                saver.wait()
                raise KeyboardInterrupt
    saver.wait()
    leave(world)
    return newest_checkpoint(folder) or folder


def anyone(asked: bool, world: World) -> bool:
    """Whether any rank was asked to stop: they stop together."""
    return asked if world.mesh is None else any(said for (said,) in gather_all([asked], world.everyone()))


# ---- a run's beginning --------------------------------------------------------------------------------------------


def prepare(config: TrainConfig) -> torch.device:
    """Threads and memory of this process, and the device."""
    if config.threads:
        torch.set_num_threads(config.threads)
    tame_memory()
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tame_memory() -> None:
    """Two habits of a CPU step's libraries that cost time or memory; call before the first matrix product.

    glibc gives big tensors back to the kernel, and page faults cost a tenth of a step. oneDNN keeps a thousand compiled
    products by shape, and shapes change with every batch: megabytes a step.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # another C library has its own habits
    for option, value in ((-3, 1 << 26), (-1, 1 << 29), (-8, 1)):  # mmap threshold, trim threshold, arenas
        libc.mallopt(option, value)


def fresh(config, model_config: ModelConfig, processor: Processor, samples: Samples, world: World) -> State:
    if 0 < model_config.max_length < config.batches.row:
        most = model_config.max_length
        raise BadInput(
            f"train.batches.row={config.batches.row}, but this network reads {most} tokens: lower it to {most}"
        )
    first, ranks, slots = world.index(*DATA), world.degree(*DATA), config.num_accumulate
    if slots % ranks:
        raise BadInput(
            f"train.num_accumulate={slots} batches a step cannot be shared out over {ranks} ranks that read: "
            f"set a multiple of {ranks}"
        )
    placed = build(model_config, world, freeze=lambda model: freeze(model, config.frozen))
    begin(placed, config)
    if config.compile:
        fuse(placed.model)
    learned = placed.learned()
    return State(
        step=0,
        placed=placed,
        average={leaf.name: leaf.local.detach().clone() for leaf in learned},
        optimizers=build_optimizers(learned, config.optimizer),
        batches=[
            Batches(samples, processor, config.batches, config.seed, m, slots) for m in range(first, slots, ranks)
        ],
    )


def begin(placed: Placed, config: TrainConfig) -> None:
    """First values, or those of a checkpoint where it has them.

    Raises BadInput if the network has no place of that shape for one of the checkpoint's.
    """
    values = first_values(placed, config.seed)
    if config.start is None:
        fill(placed, values)
        return
    with open_tensors(config.start / "model") as tensors:
        names = {from_hugging_face(theirs): theirs for theirs in tensors.entries}
        for name, theirs in names.items():
            leaf, shape = placed.leaves.get(name), tuple(tensors.entries[theirs].shape)
            if leaf is None or leaf.shape != shape:
                found = "none" if leaf is None else list(leaf.shape)
                raise BadInput(f"{config.start}: {name} is {list(shape)}, the network has {found}: start from another")
        fill(
            placed,
            lambda name, shape: tensors.read(names[name], torch.float32) if name in names else values(name, shape),
        )


def freeze(model: Model, beginnings: tuple[str, ...]) -> None:
    """Raises BadInput for a beginning that no name has, and if nothing is left to learn."""
    names = [name for name, _ in model.named_parameters()]
    if idle := [beginning for beginning in beginnings if not any(name.startswith(beginning) for name in names)]:
        raise BadInput(f"train.frozen: no parameter begins with {idle[0]!r}: they begin like {names[0]!r}")
    for name, parameter in model.named_parameters():
        if name.startswith(beginnings):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BadInput("train.frozen leaves nothing to learn: name fewer")


def fuse(model: Model) -> None:
    """Compile what layers do to tokens one by one; attention stays as it is. oracle: the same layers, not compiled"""
    if next(model.parameters()).device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise BadInput("train.compile needs a C++ compiler on a CPU: install g++, or set train.compile=false")
    for layer in model.layers:
        for expert in layer.experts:
            expert.read, expert.write = torch.compile(expert.read), torch.compile(expert.write)


class Interrupt:
    """Within it Ctrl-C asks the loop to save and stop, asked twice stops it at once; after it, what it did before."""

    def __init__(self) -> None:
        self.asked = False
        self.before: Any = None

    def __enter__(self) -> Interrupt:
        try:
            self.before = signal.signal(signal.SIGINT, self.ask)
        except ValueError:
            pass  # not the main thread: whoever runs it there decides when it ends
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


# ---- a step's ends ------------------------------------------------------------------------------------------------


def adjust(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Set every group's learning rate to `rate` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * rate


@torch.no_grad()
def average(state: State, decay: float) -> None:
    """Move the averaged weights towards the weights, faster at the beginning."""
    pace = 1 - min(decay, (state.step + 1) / (state.step + 10))
    weights = [state.placed.leaves[name].local for name in state.average]
    torch._foreach_lerp_(list(state.average.values()), weights, pace)


# ---- checkpoints --------------------------------------------------------------------------------------------------

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
    leaves = {leaf.local: leaf for leaf in state.placed.learned()}
    return [
        piece(leaves[parameter], f"{leaves[parameter].name}.{key}", value)
        for optimizer in state.optimizers
        for parameter, entry in optimizer.state.items()
        for key, value in entry.items()
    ]


def checkpoint(state: State, saver: Saver, processor: Processor, run_json: str) -> None:
    """Begin to save; training goes on meanwhile."""
    meta = {"step": state.step, "seconds": state.seconds, "batches": stand(state), "torch": torch.__version__}
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


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole one."""
    return newest(folder)


def summary(path: Path) -> str:
    """One line about a checkpoint."""
    meta = json.loads((path / "meta.json").read_text())
    return f"{path}: step {meta['step']}, {meta['seconds'] / 60:.1f} minutes of training"
